"""A configuration in words: for command lines that build one out of a file of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradclip.config.load import parse_section, read_yaml
from gradclip.errors import ConfigError
from gradclip.models import POLICIES

__all__ = ["fault_in_file", "policies_in_words"]


def policies_in_words() -> str:
    """Every policy with its settings, and their defaults as in YAML: `norm: max_norm, after=0`."""
    lines = []
    for name, model in POLICIES.items():
        fields = {key: field for key, field in model.model_fields.items() if key != "type"}
        shown = (
            key if field.is_required() else f"{key}={json.dumps(field.get_default())}"
            for key, field in fields.items()
        )
        lines.append(f"{name}: {', '.join(shown)}")
    return "; ".join(lines)


def fault_in_file(path: str | Path, key: str, written: Any) -> str | None:
    """What is wrong with a configuration that stands somewhere in a larger YAML file.

    Args:
        path: The file.
        key: What the configuration is called in it, at any depth.
        written: The configuration as another reader took it from the file.

    Returns:
        The error with file and line; None if the file doesn't hold this under the key, or if
        nothing is wrong with it.
    """
    try:
        content, lines = read_yaml(path)
    except ConfigError:
        return None
    for at in lines:
        if at[-1:] != (key,) or _value(content, at) != written:
            continue
        inside = {spot[len(at) :]: line for spot, line in lines.items() if spot[: len(at)] == at}
        try:
            parse_section(written, str(path), inside)
        except ConfigError as error:
            return str(error)
    return None


def _value(content: Any, at: tuple[str | int, ...]) -> Any:
    for part in at:
        is_key = isinstance(content, Mapping) and part in content
        content = content[part] if is_key or isinstance(part, int) else None
    return content
