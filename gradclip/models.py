"""What every configuration model is: strict, frozen, and plain about what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gradclip.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

__all__ = [
    "MODELS",
    "POLICIES",
    "KeyPath",
    "Lines",
    "Model",
    "dotted",
    "explain",
    "line_of",
    "nearest",
    "plain",
]

KeyPath = tuple[str | int, ...]
Lines = Mapping[KeyPath, int]
"""The line of each key and list item, counted from 1."""

POLICIES: dict[str, type[BaseModel]] = {}
"""The policies by what `type` calls them."""
MODELS: dict[str, type[BaseModel]] = {}
"""The other models by the key that they stand under."""


class _PlainErrors(ModelMetaclass):
    """Makes a call of the class raise a `ConfigError`, and take what is required by position."""

    def __call__(cls, *given: Any, **fields: Any) -> Any:
        """Build one; nested models are built without this, and report to the outermost."""
        model: Any = cls
        required = [name for name, field in model.model_fields.items() if field.is_required()]
        if len(given) > len(required):
            msg = (
                f"{cls.__name__} got {given[len(required)]!r:.80} without a name; allowed: "
                f"{', '.join(f'{name}=...' for name in model.model_fields)}. Write the name."
            )
            raise ConfigError(msg)
        try:
            by_position = plain(dict(zip(required, given, strict=False)))
            return super().__call__(**by_position, **plain(fields))
        except ValidationError as error:
            raise ConfigError(explain(error, model, cls.__name__)) from None
        except RecursionError:
            msg = f"{cls.__name__}: a value is nested too deeply, or contains itself. Write it out."
            raise ConfigError(msg) from None


class Model(BaseModel, metaclass=_PlainErrors):
    """Base of every policy, and of what goes with policies in a configuration.

    Raises:
        ConfigError: If a value isn't allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        defer_build=True,  # until one is used: there are more than a run needs
        ser_json_inf_nan="constants",
    )


def plain(value: Any) -> Any:
    """The same with a list for each sequence and a dict for each mapping, at any depth.

    Tuples and nodes of OmegaConf stand for them; pydantic's strict mode would refuse these.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def explain(
    error: ValidationError, model: type[BaseModel], where: str = "", lines: Lines | None = None
) -> str:
    """Every fault that was found, one per line, as: where: what was found; what is allowed.

    Args:
        error: Of pydantic.
        model: What was to be built.
        where: The file, or the class.
        lines: The line of each key path in that file.
    """
    # A misspelt key also shows as a missing one: the misspelling stands first.
    found = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")
    return "\n".join(_explained(dict(fault), model, where, lines or {}) for fault in found)


def dotted(path: KeyPath) -> str:
    """A key path as text: `policies[0].type`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def line_of(path: KeyPath, lines: Lines) -> int | None:
    """The line of a key, or of what holds it, as a key merged in by `<<` has none."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word nearest to a wrong one, and all known ones."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(known)}."


def _explained(fault: dict[str, Any], model: type[BaseModel], where: str, lines: Lines) -> str:
    loc: KeyPath = fault["loc"]
    path = tuple(part for index, part in enumerate(loc) if not _is_tag(loc, index))
    line = line_of(path, lines)
    found, allowed = _found_and_allowed(fault, path, model)
    text = f"{dotted(path)} {found}".replace(" .", ".").strip()
    text += f"; {allowed}" if allowed else ""
    place = where if line is None else f"{where}, line {line}"
    return f"{place}: {text}" if place else text


def _is_tag(loc: KeyPath, index: int) -> bool:
    """Whether a part of pydantic's path names the member of a union that was tried, not a key."""
    if index and isinstance(loc[index - 1], int):
        return loc[index] in POLICIES
    return loc[index] in ("number", "schedule") and loc[index - 1] != "schedule"


def _found_and_allowed(
    fault: dict[str, Any], path: KeyPath, model: type[BaseModel]
) -> tuple[str, str]:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_beside(fault["loc"], model)
        if path[-1] == "type" and "policies" in known:
            return "is not a key here", "a policy stands in a list: policies: [{type: ...}]."
        return "is not a known key", nearest(str(path[-1]), known)
    if kind == "missing":
        return "is missing", "add it."
    if kind == "union_tag_invalid":
        return f".type is {context['tag']!r:.80}", nearest(str(context["tag"]), list(POLICIES))
    if kind == "union_tag_not_found":
        return ".type is missing", f"add one of: {', '.join(POLICIES)}."
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "literal_error":
        return f"is {value!r:.80}", f"allowed: {context['expected']}."
    if kind == "too_short":
        return f"is {value!r}", "at least one policy is needed."
    message = fault["msg"].replace("Input should be ", "it must be ")
    hint = ""
    if isinstance(value, str) and "number" in message:
        hint = " Write the number without quotes (infinity is .inf)."
    if isinstance(value, bool) and ("number" in message or "integer" in message):
        hint = " YAML reads yes, no, on and off as true and false."
    return f"is {value!r:.80}", f"{message}.{hint}"


def _keys_beside(loc: KeyPath, model: type[BaseModel]) -> list[str]:
    """The keys allowed where an unknown one was found, in what was to be built."""
    known: Mapping[Any, type[BaseModel]] = {**POLICIES, **MODELS}
    model = next((known[part] for part in reversed(loc[:-1]) if part in known), model)
    return sorted(model.model_fields, key=lambda field: field != "type")
