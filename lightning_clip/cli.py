"""What LightningCLI shows of a policy, and how a wrong one ends its program."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TypeVar

from gradclip import ClipConfig, ConfigError, PolicyLike, as_config
from gradclip.adapters import fault_in_file, policies_in_words

__all__ = ["config_of", "with_policies"]

_Class = TypeVar("_Class", bound=type)

_END = "`Auto()` if left out.\n"


def with_policies(callback: _Class) -> _Class:
    """Add every policy and its settings to what `--help` shows of `policy`."""
    more = " A mapping is of one policy, {type: zclip}, or has a list of them as policies. "
    text = f"{more}Policies and their settings: {policies_in_words()}."
    callback.__doc__ = (callback.__doc__ or "").replace(_END, f"{_END[:-1]}{text}\n", 1)
    return callback


def config_of(policy: PolicyLike | None) -> ClipConfig:
    """The configuration of a callback.

    Raises:
        ConfigError: If it isn't valid.
        SystemExit: The same where LightningCLI builds the callback. It would wrap the error in
            some eighty lines; so its program ends with ours alone, which names the line of a file.
    """
    try:
        return as_config(policy)
    except ConfigError as error:
        callers = (frame for frame in inspect.stack()[1:] if frame.function != "__init__")
        builder = next(callers).frame.f_globals.get("__name__", "")
        if not builder.startswith("jsonargparse."):
            raise
        files = (Path(word.rpartition("=")[2]) for word in sys.argv[1:])
        faults = (fault_in_file(file, "policy", policy) for file in files if _is_yaml(file))
        fault = next((fault for fault in faults if fault), f"GradientClip: {error}")
        msg = f"error: {fault}"
        raise SystemExit(msg) from None


def _is_yaml(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml") and file.is_file()
