"""From what a user wrote to a `ClipConfig`, or to an error that names the line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gradclip.config.models import ClipConfig, GroupConfig, LogConfig, RecorderConfig
from gradclip.errors import ConfigError
from gradclip.policies import AnyPolicy, Policy, Schedule

__all__ = ["PolicyLike", "as_config", "load_section", "load_yaml", "parse_mapping"]

PolicyLike = Policy | Sequence[Policy] | ClipConfig | Mapping[str, Any] | str | Path
"""What a clipper can be built from: policies, a configuration, a mapping, or a YAML file."""

KeyPath = tuple[str | int, ...]
Lines = Mapping[KeyPath, int]
"""The line of each key and list item, counted from 1."""


# ruamel.yaml was tried: 22 lines fewer, but 8 tests of tests/config fail (errors lose their line),
# and it reads `yes` as text where Lightning and Accelerate, by YAML 1.1, read true.
class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-6 as a number; YAML 1.1 accepts only 1.0e-6."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; an impossible date or number becomes an error with its line."""
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
    """Validate a configuration given in any of the accepted forms.

    Raises:
        ConfigError: If it isn't valid. The message says where, what was found, and what is allowed.
    """
    if isinstance(policy, ClipConfig):
        return policy
    if isinstance(policy, str | Path):
        return load_yaml(policy)
    if isinstance(policy, Mapping):
        return parse_mapping(policy)
    policies = [policy] if isinstance(policy, Policy) else policy
    if isinstance(policies, Sequence) and all(isinstance(item, Policy) for item in policies):
        return parse_mapping({"policies": list(policies)})
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
    content, lines = read_yaml(path)
    return parse_mapping(content, str(path), lines)


def load_section(path: str | Path, key: str) -> ClipConfig:
    """Read a configuration that is one section of a larger YAML file.

    Args:
        path: The file.
        key: The section's top-level key.

    Raises:
        ConfigError: If the file can't be read, isn't YAML, has no such section, or the section
            isn't a valid configuration.
    """
    content, lines = read_yaml(path)
    keys = [str(word) for word in content] if isinstance(content, Mapping) else []
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
        found = f"{path}, line {lines[(close[0],)]}: found {close[0]!r}" if close else path
        msg = (
            f"{found}: the section {key!r} is missing. Add it, for instance:\n"
            f"{key}:\n  policies:\n    - type: norm\n      max_norm: 1.0"
        )
        raise ConfigError(msg)
    inside = {at[1:]: line for at, line in lines.items() if at[:1] == (key,)}
    return parse_mapping(content[key], str(path), inside)


def read_yaml(path: str | Path) -> tuple[Any, Lines]:
    """The content of a YAML file, and the line of each key path in it.

    Raises:
        ConfigError: If the file can't be read, isn't one YAML document, or has a key twice in one
            mapping.
    """
    where = f"{path}"
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _collect_lines(node, (), lines, path)
        return loader.construct_document(node), lines
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        fault = f"the file can't be read ({reason}). Give the path of a YAML file."
    except yaml.reader.ReaderError as error:
        fault = f"this isn't YAML: {error.reason} at character {error.position}."
    except yaml.MarkedYAMLError as error:
        where += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        fault = f"this isn't YAML: {error.problem}. Check indentation and quotes."
        if error.problem == "but found another document":
            fault = "the file holds several documents; keep one."
    except RecursionError:
        fault = "values are nested too deeply, or an alias contains itself. Write them out."
    msg = f"{where}: {fault}"
    raise ConfigError(msg)


def parse_mapping(content: Any, where: str = "", lines: Lines | None = None) -> ClipConfig:
    """Validate a mapping. The error names every fault, one per line.

    Args:
        content: The mapping; its keys are the fields of `ClipConfig`.
        where: The file that errors name.
        lines: The line of each key path in that file.

    Raises:
        ConfigError: If it isn't valid.
    """
    lines = lines or {}
    if not isinstance(content, Mapping):
        line = f", line {lines[()]}" if lines else ""
        prefix = f"{where}{line}: " if where else ""
        msg = f"{prefix}found {content!r:.80}; a mapping with the key 'policies' is needed."
        raise ConfigError(msg)
    try:
        return ClipConfig.model_validate(dict(content))
    except ValidationError as error:
        # A misspelt key also shows as a missing one: the misspelling stands first.
        found = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")
        faults = [_explain(dict(fault), where, lines) for fault in found]
        raise ConfigError("\n".join(faults)) from None


def policy_types() -> dict[str, type[BaseModel]]:
    """The policies by what `type` calls them."""
    union = get_args(AnyPolicy)[0]
    return {str(policy.model_fields["type"].default): policy for policy in get_args(union)}


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


def _collect_lines(
    node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], where: str | Path
) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, line = (*at, str(key.value)), key.start_mark.line + 1
            if here in lines:
                msg = (
                    f"{where}, line {line}: {dotted(here)} is given twice "
                    f"(first on line {lines[here]}). Remove one."
                )
                raise ConfigError(msg)
            lines[here] = line
            _collect_lines(value, here, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*at, index), lines, where)


def _explain(fault: dict[str, Any], where: str, lines: Lines) -> str:
    """One fault as: where: what was found; what is allowed."""
    types = policy_types()
    loc: KeyPath = fault["loc"]
    path = tuple(part for index, part in enumerate(loc) if not _is_tag(loc, index, types))
    line = line_of(path, lines)
    found, allowed = _found_and_allowed(fault, path, types)
    text = f"{dotted(path)} {found}".replace(" .", ".").strip()
    text += f"; {allowed}" if allowed else ""
    place = where if line is None else f"{where}, line {line}"
    return f"{place}: {text}" if place else text


def _is_tag(loc: KeyPath, index: int, types: Mapping[str, type[BaseModel]]) -> bool:
    """Whether a part of pydantic's path names the member of a union that was tried, not a key."""
    if index and isinstance(loc[index - 1], int):
        return loc[index] in types
    return loc[index] in ("number", "schedule") and loc[index - 1] != "schedule"


def _found_and_allowed(
    fault: dict[str, Any], path: KeyPath, types: Mapping[str, type[BaseModel]]
) -> tuple[str, str]:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_beside(fault["loc"], types)
        if path[-1] == "type" and "policies" in known:
            return "is not a key here", "a policy stands in a list: policies: [{type: ...}]."
        return "is not a known key", nearest(str(path[-1]), known)
    if kind == "missing":
        return "is missing", "add it."
    if kind == "union_tag_invalid":
        return f".type is {context['tag']!r}", nearest(str(context["tag"]), list(types))
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


def _keys_beside(loc: KeyPath, types: Mapping[str, type[BaseModel]]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    models: dict[Any, type[BaseModel]] = {**types, "schedule": Schedule}
    models |= {"groups": GroupConfig, "log": LogConfig, "recorder": RecorderConfig}
    model = next((models[part] for part in reversed(loc[:-1]) if part in models), ClipConfig)
    return sorted(model.model_fields, key=lambda field: field != "type")
