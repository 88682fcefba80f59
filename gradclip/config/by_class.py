"""What may stand for a configuration, as the one mapping that is validated.

A `class_path`, as in LightningCLI's files, names only our own classes. Nodes of OmegaConf are
mappings and sequences like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel

from gradclip.config.models import ClipConfig
from gradclip.models import MODELS, POLICIES, KeyPath, nearest

__all__ = ["PARTS", "as_written", "is_list"]

PARTS = ("init_args", "dict_kwargs")
"""Where the arguments of a class stand."""

Refuse = Callable[[KeyPath, str], NoReturn]


def as_written(value: Any, refuse: Refuse) -> tuple[Any, KeyPath]:
    """What stands for a configuration, as the mapping that `ClipConfig` validates.

    Args:
        value: A mapping, one policy or a list of them, or a class with arguments, at any depth.
            A list may be any sequence.
        refuse: Raises the error of a fault at a key path.

    Returns:
        The mapping, and where the value is in it. Nothing is imported or called for it.

    Raises:
        ConfigError: If a `class_path` names no class of gradclip's configuration.
    """
    fields = _fields(value, (), refuse)
    if is_list(value):
        return {"policies": fields}, ("policies",)
    if isinstance(fields, Mapping) and "type" in fields and "policies" not in fields:
        return {"policies": [fields]}, ("policies", 0)
    return fields, ()


def is_list(value: Any) -> bool:
    """Whether it is a sequence of values, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _fields(value: Any, at: KeyPath, refuse: Refuse) -> Any:
    """The value with the fields of a class in place of each `class_path` and its arguments."""
    if _has_class_path(value):
        known, path = _known_classes(), value["class_path"]
        if path not in known:
            ours = [name for name in known if name.count(".") == 1]
            refuse((*at, "class_path"), f"class_path is {path!r}; {nearest(path, ours)[:-1]}")
        fields: dict[str, Any] = {}
        if known[path] in POLICIES.values():
            fields["type"] = known[path].model_fields["type"].default
        for part in PARTS:
            for key, item in (value.get(part) or {}).items():
                fields[key] = _fields(item, (*at, part, str(key)), refuse)
        return fields
    if isinstance(value, Mapping):
        return {key: _fields(item, (*at, str(key)), refuse) for key, item in value.items()}
    if is_list(value):
        return [_fields(item, (*at, index), refuse) for index, item in enumerate(value)]
    return value


def _has_class_path(value: Any) -> bool:
    """Whether it stands for a class with arguments."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("class_path"), str)
        and set(value) <= {"class_path", *PARTS}
        and all(isinstance(value.get(part) or {}, Mapping) for part in PARTS)
    )


def _known_classes() -> dict[str, type[BaseModel]]:
    """The models of a configuration, by every path they can be imported from."""
    models: list[type[BaseModel]] = [*POLICIES.values(), *MODELS.values(), ClipConfig]
    found: dict[str, type[BaseModel]] = {}
    for model in models:
        module = model.__module__
        while module:
            found[f"{module}.{model.__name__}"] = model
            module = module.rpartition(".")[0]
    return found
