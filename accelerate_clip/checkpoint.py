"""The clipping state as a file of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from accelerate.logging import get_logger
from accelerate.utils import load, save

from gradclip import ConfigError

__all__ = ["load_state", "save_state"]

_FILE = "gradient_clip.bin"

_logger = get_logger(__name__)


class _Clips(Protocol):  # not of torch's Stateful: a protocol made from that breaks isinstance
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def saved_to(self, path: str) -> None: ...


def save_state(of: _Clips, folder: str, *, each_node: bool) -> None:
    """Write its state, on the main process; every process must call it.

    Args:
        of: Whose state.
        folder: The checkpoint.
        each_node: Write it on the main process of every node.
    """
    state = of.state_dict()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(state, Path(folder) / _FILE, save_on_each_node=each_node)
    of.saved_to(folder)


def load_state(into: _Clips, folder: str) -> None:
    """Continue from a checkpoint; if it has no state, start with fresh state and say so.

    Raises:
        ConfigError: If the file can't be read, or its state is refused; nothing is changed then.
    """
    file = Path(folder) / _FILE
    if not file.exists():
        _logger.warning(
            "%s has no %s: it was saved without gradclip. Clipping starts with fresh state, or "
            "goes on with the state that it has.",
            folder,
            _FILE,
        )
        into.saved_to(folder)
        return
    try:
        state = load(file, map_location="cpu")
    except Exception as error:  # torch.load raises what its parts do
        msg = (
            f"{file} can't be read ({type(error).__name__}). Put back the file that was saved, "
            "or delete this one to start with fresh state."
        )
        raise ConfigError(msg) from error
    try:
        into.load_state_dict(state)
    except ConfigError as error:
        msg = f"{error} Delete {file} to start with fresh state."
        raise ConfigError(msg) from None
    into.saved_to(folder)
