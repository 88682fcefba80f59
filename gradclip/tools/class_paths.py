"""What jsonargparse builds from `class_path`, as the mapping that it stands for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gradclip.config import ClipConfig, GroupConfig, LogConfig, RecorderConfig
from gradclip.config.load import Lines, policy_types
from gradclip.errors import ConfigError
from gradclip.policies import Policy

__all__ = ["PARTS", "as_mapping", "line_of"]

Region = tuple[str | int, ...]

PARTS = ("init_args", "dict_kwargs")
"""Where the arguments of a class stand."""


def as_mapping(value: Any, at: Region, lines: Lines, where: str) -> tuple[Any, Lines]:
    """A policy, a list of them or a configuration that LightningCLI builds, as a mapping.

    Args:
        value: What was written.
        at: Where it stands.
        lines: Line of each key path of the file.
        where: The file to name in errors.

    Returns:
        The mapping that `ClipConfig` validates, and the line of each key path in it. A value
        without a `class_path` stays as it is.

    Raises:
        ConfigError: If a `class_path` is none of ours.
    """
    moved: dict[Region, int] = {}
    if isinstance(value, list) and value and all(map(_has_class_path, value)):
        built = [
            _built(item, (*at, index), ("policies", index), lines, where, moved)
            for index, item in enumerate(value)
        ]
        return {"policies": built}, moved
    if _has_class_path(value) and issubclass(_model(value, at, lines, where), Policy):
        return {"policies": [_built(value, at, ("policies", 0), lines, where, moved)]}, moved
    return _built(value, at, (), lines, where, moved), moved


def line_of(at: Region, lines: Lines) -> int:
    """The line of a key, or of what it stands in: a merged key (`<<`) has none of its own."""
    while at not in lines:
        at = at[:-1]
    return lines[at]


def _built(
    value: Any, at: Region, to: Region, lines: Lines, where: str, moved: dict[Region, int]
) -> Any:
    """A value whose key paths begin with `to` instead of `at`, without its class paths."""
    moved[to] = line_of(at, lines)
    if _has_class_path(value):
        model = _model(value, at, lines, where)
        fields: dict[Any, Any] = {}
        if issubclass(model, Policy):
            fields["type"] = model.model_fields["type"].default
        for part in PARTS:  # in them jsonargparse leaves a class_path as it is
            fields |= value.get(part) or {}
            start = (*at, part)
            for spot in [spot for spot in lines if spot[: len(start)] == start != spot]:
                moved[(*to, *spot[len(start) :])] = lines[spot]
        return fields
    if isinstance(value, Mapping):
        return {
            key: _built(item, (*at, str(key)), (*to, str(key)), lines, where, moved)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _built(item, (*at, index), (*to, index), lines, where, moved)
            for index, item in enumerate(value)
        ]
    return value


def _has_class_path(value: Any) -> bool:
    """Whether jsonargparse takes it for a class: what else it holds are its arguments."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("class_path"), str)
        and set(value) <= {"class_path", *PARTS}
        and all(isinstance(value.get(part) or {}, Mapping) for part in PARTS)
    )


def _model(value: Mapping[str, Any], at: Region, lines: Lines, where: str) -> type[BaseModel]:
    known = _known()
    path = value["class_path"]
    if path not in known:
        ours = [name for name in known if name.count(".") == 1]
        close = difflib.get_close_matches(path, ours, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}? " if close else ""
        msg = (
            f"{where}, line {line_of((*at, 'class_path'), lines)}: class_path is {path!r}; {hint}"
            f"Known: {', '.join(ours)}."
        )
        raise ConfigError(msg)
    return known[path]


def _known() -> dict[str, type[BaseModel]]:
    """Each of our models by every path that it's imported by."""
    models: list[type[BaseModel]] = [ClipConfig, GroupConfig, LogConfig, RecorderConfig]
    found: dict[str, type[BaseModel]] = {}
    for model in [*policy_types().values(), *models]:
        module = model.__module__
        while module:
            found[f"{module}.{model.__name__}"] = model
            module = module.rpartition(".")[0]
    return found
