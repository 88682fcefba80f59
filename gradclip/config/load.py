"""From what a user wrote to a `ClipConfig`, or to an error that points at the line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gradclip.config.models import ClipConfig
from gradclip.errors import ConfigError
from gradclip.policies import AnyPolicy, Policy, Schedule

__all__ = ["PolicyLike", "as_config", "load_section", "load_yaml", "parse_mapping"]

PolicyLike = Policy | Sequence[Policy] | ClipConfig | Mapping[str, Any] | str | Path
"""What a clipper can be built from: policies, a configuration, a mapping, or a YAML file."""

Lines = Mapping[tuple[str | int, ...], int]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-6 as a number (YAML 1.1 wants 1.0e-6)."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; what looks like a date or a number and can't be one names its line."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{error}", node.start_mark
            ) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def as_config(policy: PolicyLike) -> ClipConfig:
    """A validated configuration from anything a user may give.

    Raises:
        ConfigError: If it isn't valid; says where, what was found, and what is allowed.
    """
    if isinstance(policy, ClipConfig):
        return policy
    if isinstance(policy, Policy):
        return parse_mapping({"policies": [policy]})
    if isinstance(policy, str | Path):
        return load_yaml(policy)
    if isinstance(policy, Mapping):
        return parse_mapping(policy)
    if isinstance(policy, Sequence) and all(isinstance(item, Policy) for item in policy):
        return parse_mapping({"policies": list(policy)})
    msg = (
        f"policy is {policy!r}; allowed: a policy such as ZClip(), a list of them, a ClipConfig, "
        "a mapping with the key 'policies', or the path of a YAML file."
    )
    raise ConfigError(msg)


def load_yaml(path: str | Path) -> ClipConfig:
    """Read a configuration from a YAML file.

    Raises:
        ConfigError: If the file can't be read, isn't YAML, or isn't a valid configuration.
    """
    where = str(path)
    content, lines = parse_yaml(read_text(path), where)
    return parse_mapping(content, where, lines)


def load_section(path: str | Path, key: str) -> ClipConfig:
    """Read a configuration that is one section of a larger YAML file.

    Args:
        path: The file.
        key: The section's top-level key.

    Raises:
        ConfigError: If the file can't be read, isn't YAML, has no such section, or the section
            isn't a valid configuration.
    """
    where = str(path)
    content, lines = parse_yaml(read_text(path), where)
    keys = [str(word) for word in content] if isinstance(content, Mapping) else []
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
        found = f"{where}, line {lines[(close[0],)]}: found {close[0]!r}" if close else where
        msg = (
            f"{found}: the section {key!r} is missing. Add it, for instance:\n"
            f"{key}:\n  policies:\n    - type: norm\n      max_norm: 1.0"
        )
        raise ConfigError(msg)
    inside = {loc[1:]: line for loc, line in lines.items() if loc[:1] == (key,)}
    return parse_mapping(content[key], where, inside)


def read_text(path: str | Path) -> str:
    """The text of a YAML file.

    Raises:
        ConfigError: If it can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        msg = f"{path}: the file can't be read ({reason}). Give the path of a YAML file."
        raise ConfigError(msg) from None


def parse_yaml(text: str, where: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """The content of a YAML text, and the line of every key and item, counted from 1.

    Raises:
        ConfigError: If the text isn't one YAML document, or a mapping has a key twice.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        msg = f"{where}: this isn't YAML: {error.reason} at character {error.position}."
        raise ConfigError(msg) from None
    try:
        node = loader.get_single_node()
        lines: dict[tuple[str | int, ...], int] = {}
        if node is not None:
            _collect_lines(node, (), lines, where)
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        msg = f"{where}{line}: this isn't YAML: {error.problem}. Check indentation and quotes."
        if error.problem == "but found another document":
            msg = f"{where}{line}: the file holds several documents; keep one."
        raise ConfigError(msg) from None
    except RecursionError:
        msg = (
            f"{where}: values are nested too deeply, or an alias stands within what it names. "
            "Write them out."
        )
        raise ConfigError(msg) from None
    finally:
        loader.dispose()


def parse_mapping(content: Any, where: str = "", lines: Lines | None = None) -> ClipConfig:
    """Validate a mapping; every fault found is named, one per line.

    Args:
        content: The mapping; its keys are the fields of `ClipConfig`.
        where: A file to name in errors.
        lines: Line of each key path in that file.

    Raises:
        ConfigError: If it isn't valid.
    """
    if not isinstance(content, Mapping):
        line = f", line {lines[()]}" if lines else ""
        prefix = f"{where}{line}: " if where else ""
        msg = f"{prefix}found {content!r:.80}; a mapping with the key 'policies' is needed."
        raise ConfigError(msg)
    try:
        return ClipConfig.model_validate(dict(content))
    except ValidationError as error:
        # A misspelt key also shows as a missing one; the spelling is the better hint.
        found = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")
        faults = [_explain(dict(fault), where, lines or {}) for fault in found]
        raise ConfigError("\n".join(faults)) from None


def _collect_lines(
    node: yaml.Node,
    path: tuple[str | int, ...],
    lines: dict[tuple[str | int, ...], int],
    where: str,
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                msg = (
                    f"{where}, line {key.start_mark.line + 1}: {dotted(here)} is given twice "
                    f"(first on line {lines[here]}). Remove one."
                )
                raise ConfigError(msg)
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), lines, where)


def _explain(fault: dict[str, Any], where: str, lines: Lines) -> str:
    """One fault as: where: what was found; what is allowed."""
    types = policy_types()
    loc = cast("tuple[str | int, ...]", fault["loc"])
    path = tuple(part for i, part in enumerate(loc) if not _is_tag(loc, i, types))
    place = where
    if path in lines or path[:-1] in lines:
        place = f"{where}, line {lines.get(path, lines.get(path[:-1]))}"
    found, allowed = _found_and_allowed(fault, path, types)
    name = dotted(path)
    text = f"{name} {found}".replace(" .", ".").strip() + (f"; {allowed}" if allowed else "")
    return f"{place}: {text}" if place else text


def _is_tag(loc: Sequence[str | int], index: int, types: Mapping[str, type[BaseModel]]) -> bool:
    """Whether a part of a path is what pydantic told a union's members apart by, not a key."""
    if index and isinstance(loc[index - 1], int):
        return loc[index] in types
    return loc[index] in ("number", "schedule") and loc[index - 1] != "schedule"


def _found_and_allowed(
    fault: dict[str, Any], path: tuple[str | int, ...], types: Mapping[str, type[BaseModel]]
) -> tuple[str, str]:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_beside(fault["loc"], types)
        if path[-1] == "type" and "policies" in known:
            return "is not a key here", "a policy stands in a list: policies: [{type: ...}]."
        return "is not a known key", _nearest(str(path[-1]), known)
    if kind == "missing":
        return "is missing", "add it."
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return f".type is {tag!r}", _nearest(str(tag), list(types))
    if kind == "union_tag_not_found":
        return ".type is missing", f"add one of: {', '.join(types)}."
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "literal_error":
        return f"is {value!r}", f"allowed: {context['expected']}."
    if kind == "too_short":
        return f"is {value!r}", "at least one policy is needed."
    message = fault["msg"].replace("Input should be ", "it must be ")
    hint = ""
    if isinstance(value, str) and "number" in message:
        hint = " Write the number without quotes (infinity is .inf)."
    if isinstance(value, bool) and ("number" in message or "integer" in message):
        hint = " YAML reads yes, no, on and off as true and false."
    return f"is {value!r}", f"{message}.{hint}"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}Known: {', '.join(known)}."


def policy_types() -> dict[str, type[BaseModel]]:
    """The policies by what `type` calls them."""
    union = get_args(AnyPolicy)[0]
    return {str(policy.model_fields["type"].default): policy for policy in get_args(union)}


def _fields_beside(loc: Sequence[str | int], types: Mapping[str, type[BaseModel]]) -> list[str]:
    """The keys allowed where a key was found."""
    named = [part for part in loc[:-1] if isinstance(part, str)]
    if named and named[-1] == "schedule":
        return list(Schedule.model_fields)
    if named and named[-1] in types:
        return sorted(types[named[-1]].model_fields, key=lambda field: field != "type")
    model: type[BaseModel] = ClipConfig
    for part in named:
        annotation = model.model_fields[part].annotation
        inner = getattr(annotation, "__args__", (annotation,))[0]
        model = cast("type[BaseModel]", inner)
    return list(model.model_fields)


def dotted(path: Sequence[str | int]) -> str:
    """A key path as text: `policies[0].type`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
