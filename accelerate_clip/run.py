"""Run an unchanged script with clipping on: `python -m accelerate_clip.run script.py args...`.

The configuration comes from the environment variable `ACCELERATE_CLIP_CONFIG`: JSON (a
configuration, or a list of policies), or the path of a YAML file. `accelerate-clip launch` sets it.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from accelerate_clip.enable import enable
from gradclip import ClipConfig, ConfigError, as_config

__all__ = ["CONFIG_VARIABLE", "config_from_environment", "enable_on_creation", "main"]

CONFIG_VARIABLE = "ACCELERATE_CLIP_CONFIG"

_USAGE = (
    "usage: python -m accelerate_clip.run script.py [arguments]\n"
    "       python -m accelerate_clip.run -m module [arguments]"
)


def config_from_environment() -> ClipConfig:
    """The configuration that the launcher hands over.

    Raises:
        ConfigError: If `ACCELERATE_CLIP_CONFIG` isn't set, or isn't a valid configuration.
    """
    value = os.environ.get(CONFIG_VARIABLE, "")
    if not value:
        msg = (
            f"The environment variable {CONFIG_VARIABLE} is not set; allowed: a configuration or "
            "a list of policies as JSON, or the path of a YAML file. Set it, or start the script "
            "with accelerate-clip launch --config_file FILE script.py."
        )
        raise ConfigError(msg)
    if not value.lstrip().startswith(("{", "[")):
        return as_config(value)
    try:
        given = json.loads(value)
    except json.JSONDecodeError as error:
        msg = f"{CONFIG_VARIABLE} is {value!r}, which isn't JSON: {error}. Check its quotes."
        raise ConfigError(msg) from None
    return as_config({"policies": given} if isinstance(given, list) else given)


def enable_on_creation(config: ClipConfig) -> None:
    """Make every `Accelerator` created from now on clip with this configuration."""
    create = Accelerator.__init__

    @functools.wraps(create)
    def create_and_enable(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        enable(self, config)

    Accelerator.__init__ = create_and_enable


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
        enable_on_creation(config_from_environment())
    except ConfigError as error:
        sys.exit(f"accelerate_clip.run: {error}")
    sys.argv[:] = arguments
    if is_module:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
