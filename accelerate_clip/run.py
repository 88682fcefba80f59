"""Run an unchanged script with clipping on: `python -m accelerate_clip.run script.py args...`.

The configuration comes from the environment variable `ACCELERATE_CLIP_CONFIG`: JSON (a
configuration, a policy or a list of them), the name of a preset, or the path of a YAML file.
`accelerate-clip launch` sets it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from accelerate_clip.enable import enable
from gradclip import ClipConfig, ConfigError
from gradclip.adapters import Patches, config_from_environment

__all__ = ["CONFIG_VARIABLE", "enable_on_creation", "main"]

CONFIG_VARIABLE = "ACCELERATE_CLIP_CONFIG"

_USAGE = (
    "usage: python -m accelerate_clip.run script.py [arguments]\n"
    "       python -m accelerate_clip.run -m module [arguments]"
)


def enable_on_creation(config: ClipConfig) -> Patches:
    """Clip with this configuration in every new `Accelerator`, until the result is undone."""

    def create(method: Callable[..., None], new: Accelerator, *args: Any, **kwargs: Any) -> None:
        method(new, *args, **kwargs)
        enable(new, config)

    patches = Patches()
    patches.wrap(Accelerator, "__init__", create)
    return patches


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script or a module as `__main__`, the way `python` itself would.

    Args:
        argv: What follows `python -m accelerate_clip.run`; taken from the command line if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_module = arguments[:1] == ["-m"]
    if is_module:
        arguments = arguments[1:]
    if not arguments:
        sys.exit(_USAGE)
    try:
        config = config_from_environment(CONFIG_VARIABLE)
    except ConfigError as error:
        sys.exit(f"accelerate_clip.run: {error}")
    if config is None:
        sys.exit(
            f"accelerate_clip.run: The environment variable {CONFIG_VARIABLE} is not set; allowed: "
            "a configuration or a list of policies as JSON, the name of a preset, or the path of a "
            "YAML file. Set it, or start the script with accelerate-clip launch --config_file FILE "
            "script.py."
        )
    sys.argv[:] = arguments
    if not is_module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    patches = enable_on_creation(config)
    try:
        if is_module:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        patches.undo()


if __name__ == "__main__":
    main()
