"""`accelerate-clip config` and `accelerate-clip env`: Accelerate's own commands, then ours."""

from __future__ import annotations

import sys
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config import config_command
from accelerate.commands.env import env_command

from gradclip import ConfigError, load_section
from gradclip.adapters import installed_versions, preset_text, presets

__all__ = ["SECTION", "ask", "show_environment", "stock_file"]

SECTION = "gradient_clip_config"
"""Ours in a configuration of Accelerate, which refuses keys that it doesn't know."""

_DEFAULT = "auto"


def ask(file: Path) -> None:
    """Ask Accelerate's questions, then which preset clips, and write one file.

    Args:
        file: The YAML file to write; replaced if it exists.

    Raises:
        ConfigError: If the file has another suffix.
    """
    if file.suffix not in (".yaml", ".yml"):
        msg = f"{file}: allowed: a name in .yaml. Give one with --config_file."
        raise ConfigError(msg)
    config_command(Namespace(config_file=str(file)))
    name = _ask_preset()
    section = textwrap.indent(preset_text(name), "  ")
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{SECTION}:\n{section}")
    config = load_section(file, SECTION)
    sys.stdout.write(
        f"Added {SECTION} ({config.summary}) to {file}, where you may change it. Start with:\n"
        f"  accelerate-clip launch --config_file {file} train.py\n"
    )


def _ask_preset() -> str:
    known = presets()
    width = max(map(len, known))
    sys.stdout.write("How shall gradients be clipped?\n")
    for name, line in known.items():
        sys.stdout.write(f"  {name:{width}}  {line}\n")
    while True:
        answer = input(f"A name of this list [{_DEFAULT}]: ").strip() or _DEFAULT
        if answer in known:
            return answer
        sys.stdout.write(f"{answer} isn't in the list.\n")


def show_environment(file: Path | None) -> None:
    """Print what `accelerate env` prints, then what gradclip adds, to paste into a bug report.

    Args:
        file: A configuration of Accelerate, with our section or without; None for the default one.
    """
    if file is None:
        env_command(Namespace(config_file=None))
        clipping = "no --config_file was given"
    else:
        with stock_file(file) as (stock, rest):
            env_command(Namespace(config_file=str(stock)))
            del rest
        try:
            clipping = load_section(file, SECTION).model_dump_json(exclude_unset=True)
        except ConfigError as error:
            clipping = str(error)
    for name, value in installed_versions().items():
        sys.stdout.write(f"- {name}: {value}\n")
    sys.stdout.write(f"- {SECTION}: {clipping}\n")


@contextmanager
def stock_file(file: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """A copy of a configuration without our section, which Accelerate reads; and its content.

    Raises:
        ConfigError: If the file can't be read.
    """
    try:
        rest = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        msg = f"{file} can't be read: {error}. Give a YAML file, as accelerate config writes it."
        raise ConfigError(msg) from None
    rest.pop(SECTION, None)
    with tempfile.TemporaryDirectory() as folder:
        stock = Path(folder) / "accelerate.yaml"
        stock.write_text(yaml.safe_dump(rest), encoding="utf-8")
        yield stock, rest
