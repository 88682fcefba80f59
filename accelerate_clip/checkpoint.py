"""The clipping state as a file of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from accelerate.utils import load, save

from gradclip import ConfigError

if TYPE_CHECKING:
    from accelerate_clip.clipper import AcceleratorClip

__all__ = ["STATE_FILE", "load_clip", "save_clip"]

STATE_FILE = "gradient_clip.bin"

_logger = get_logger(__name__)


def save_clip(clip: AcceleratorClip, folder: str, each_node: bool) -> None:
    """Write the state, on the main process; every process must call it.

    Args:
        clip: Whose state.
        folder: The checkpoint.
        each_node: Write it on the main process of every node.
    """
    state = clip.state_dict()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save(state, Path(folder) / STATE_FILE, save_on_each_node=each_node)


def load_clip(clip: AcceleratorClip, folder: str) -> None:
    """Continue from a checkpoint; from fresh state, and say so, if it has none.

    Raises:
        ConfigError: If it is of other optimizers, policies or parameters.
    """
    file = Path(folder) / STATE_FILE
    if file.exists():
        try:
            clip.load_state_dict(load(file, map_location="cpu"))
        except ConfigError as error:
            msg = f"{error} Delete {file} to start with fresh state."
            raise ConfigError(msg) from None
    else:
        _logger.warning(
            "%s has no %s: it was saved without gradclip. Clipping starts with fresh state.",
            folder,
            STATE_FILE,
        )
