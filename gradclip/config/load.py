"""From what a user wrote to a `ClipConfig`, or to an error that names the line."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from gradclip.config.by_class import PARTS, as_written, is_list
from gradclip.config.models import ClipConfig
from gradclip.config.presets import preset_file, presets
from gradclip.errors import ConfigError
from gradclip.models import POLICIES, KeyPath, Lines, dotted, explain, line_of, nearest
from gradclip.policies import Auto, Policy

__all__ = [
    "PolicyLike",
    "as_config",
    "config_from_environment",
    "load_section",
    "load_yaml",
    "parse_mapping",
    "parse_section",
    "parse_written",
]

PolicyLike = (
    Policy | Sequence[Policy | Mapping[str, Any]] | ClipConfig | Mapping[str, Any] | str | Path
)
"""What a clipper can be built from: policies, the name of a preset, the path of a YAML file, a
mapping or a configuration."""


_MOST_BYTES, _MOST_VALUES = 1 << 20, 20_000  # of a file, so that none takes all memory


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


def as_config(policy: PolicyLike | None) -> ClipConfig:
    """Validate a configuration given in any of the accepted forms; None stands for `Auto()`.

    Raises:
        ConfigError: If it isn't valid. The message says where, what was found, and what is allowed.
    """
    if policy is None:
        return ClipConfig(policies=[Auto()])
    if isinstance(policy, ClipConfig):
        return policy
    if isinstance(policy, str):
        return _by_name(policy)
    if isinstance(policy, Path):
        return load_yaml(policy)
    given: Any = [policy] if isinstance(policy, Policy) else policy
    items = given if is_list(given) else [given]
    if all(isinstance(item, Policy | Mapping) for item in items):
        try:
            return parse_written(given)
        except RecursionError:
            msg = "policy is nested too deeply, or contains itself. Write it out."
            raise ConfigError(msg) from None
    msg = (
        f"policy is {policy!r:.80}; allowed: a policy such as Auto(), a list of them, the name of "
        "a preset, the path of a YAML file, a mapping with the key 'policies', or a ClipConfig. "
        "Write, for instance, ClipByNorm(max_norm=1.0) in its place, or nothing for Auto()."
    )
    raise ConfigError(msg)


def config_from_environment(variable: str) -> ClipConfig | None:
    """The configuration that an environment variable holds.

    Args:
        variable: Its name. Its value is the name of a preset, the path of a YAML file, or a
            configuration, a policy or a list of policies as JSON.

    Returns:
        None if it isn't set, or empty.

    Raises:
        ConfigError: If it isn't a valid configuration.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    try:
        return as_config(json.loads(value) if value.startswith(("{", "[")) else value)
    except json.JSONDecodeError as error:
        msg = f"{variable} is {value!r}, which isn't JSON: {error}. Check its quotes."
        raise ConfigError(msg) from None
    except ConfigError as error:
        msg = f"{variable}: {error}"
        raise ConfigError(msg) from None


def _by_name(name: str) -> ClipConfig:
    """A preset, else a file: `./zclip` and `Path("zclip")` are files in any case."""
    if name in presets():
        return load_yaml(preset_file(name))
    if os.path.lexists(name):
        return load_yaml(name)
    path = Path(name)
    known = nearest(path.stem, list(presets()))
    if path.suffix or len(path.parts) > 1:
        fault = "the file can't be read (No such file or directory)"
    else:
        fault = "there is no such preset, and no such file"
    own = f" A policy of this type is written {{type: {name}}}." if name in POLICIES else ""
    msg = f"{name}: {fault}. Give the path of a YAML file, or a preset: {known}{own}"
    raise ConfigError(msg)


def load_yaml(path: str | Path) -> ClipConfig:
    """Read a configuration from a YAML file.

    Raises:
        ConfigError: If the file can't be read, isn't YAML, or isn't a valid configuration.
    """
    content, lines = read_yaml(path)
    return parse_written(content, str(path), lines)


def load_section(path: str | Path, key: str) -> ClipConfig:
    """Read a configuration that is one section of a larger YAML file.

    Args:
        path: The file.
        key: The section's top-level key. It holds what a file of its own would, or the name of a
            preset or the path of a file.

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
    return parse_section(content[key], str(path), inside)


def read_yaml(path: str | Path) -> tuple[Any, Lines]:
    """The content of a YAML file, and the line of each key path in it.

    Raises:
        ConfigError: If the file can't be read, isn't one YAML document, or has a key twice in one
            mapping.
    """
    where = f"{path}"
    lines: dict[KeyPath, int] = {}
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            msg = (
                f"{path}: the file has more than 1 MiB; a configuration is a few lines. Shorten it."
            )
            raise ConfigError(msg)
        loader = _Loader(text.decode("utf-8"))
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


def parse_section(content: Any, where: str, lines: Lines) -> ClipConfig:
    """Validate a part of a file, which may also be the name of a preset or the path of a file.

    Args:
        content: As `parse_written` takes it, or a name.
        where: The file that errors name.
        lines: The line of each key path in the content.

    Raises:
        ConfigError: If it isn't valid.
    """
    if not isinstance(content, str):
        return parse_written(content, where, lines)
    try:
        return _by_name(content)
    except ConfigError as error:
        msg = f"{where}, line {line_of((), lines)}: {error}"
        raise ConfigError(msg) from None


def parse_written(content: Any, where: str = "", lines: Lines | None = None) -> ClipConfig:
    """Validate a configuration, one policy or a list of policies.

    Args:
        content: A mapping, or a sequence of mappings and policies; `class_path` may name our
            classes in it.
        where: The file that errors name.
        lines: The line of each key path in the content.

    Raises:
        ConfigError: If it isn't valid, or a `class_path` names another class.
    """
    lines = lines or {}

    def refuse(at: KeyPath, fault: str) -> NoReturn:
        line = line_of(at, lines)
        msg = f"{where}, line {line}: {fault}." if line else f"{dotted(('policy', *at))}: {fault}."
        raise ConfigError(msg)

    written, start = as_written(content, refuse)
    moved: dict[KeyPath, int] = {(): lines[()]} if () in lines else {}
    for at, line in lines.items():
        moved.setdefault((*start, *(part for part in at if part not in PARTS)), line)
    return parse_mapping(written, where, moved)


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
        raise ConfigError(explain(error, ClipConfig, where, lines)) from None


def _collect_lines(
    node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], where: str | Path
) -> None:
    lines.setdefault(at, node.start_mark.line + 1)
    if len(lines) > _MOST_VALUES:
        msg = (
            f"{where}, line {node.start_mark.line + 1}: the file stands for more than "
            f"{_MOST_VALUES:,} values, as aliases of aliases do. Write out what is needed."
        )
        raise ConfigError(msg)
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
