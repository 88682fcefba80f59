"""Checking YAML files before anything is trained, without the framework that reads them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gradclip.config import ClipConfig, as_config, load_section, parse_mapping
from gradclip.config.load import Lines, dotted, parse_yaml, read_text
from gradclip.errors import ConfigError
from gradclip.records.trace_file import spell_out
from gradclip.tools.class_paths import PARTS, as_mapping, line_of

__all__ = ["Checked", "check_file", "describe_as_json", "describe_as_yaml"]

Region = tuple[str | int, ...]

_CALLBACKS = ("lightning_clip.GradientClip", "lightning_clip.callback.GradientClip", "GradientClip")
_ARGUMENTS = ("policy", "progress_bar", "restore")
_SECTION = "gradient_clip_config"
_ACCELERATE = {"compute_environment", "distributed_type", "num_machines", "num_processes"}


@dataclass(frozen=True)
class Checked:
    """A file that was checked.

    Attributes:
        path: The file.
        kind: `gradclip`, `lightning` or `accelerate`; None if it can't be told.
        configs: Valid configurations by the place they stand at; "" is the file itself.
        fault: What is wrong; None if nothing is.
    """

    path: Path
    kind: str | None
    configs: Mapping[str, ClipConfig]
    fault: str | None = None


def check_file(path: str | Path) -> Checked:
    """Find out what kind of file it is, and validate what it says about clipping."""
    path, kind = Path(path), None
    try:
        content, lines = parse_yaml(read_text(path), str(path))
        kind = _kind(content, lines)
        if kind == "lightning":
            configs = _check_lightning(content, lines, path)
        elif kind == "accelerate":
            configs = {_SECTION: load_section(path, _SECTION)}
            _refuse_deepspeed(content, configs[_SECTION], lines, path)
        else:
            configs = {"": parse_mapping(content, str(path), lines)}
    except ConfigError as error:
        return Checked(path, kind, {}, str(error))
    return Checked(path, kind, configs)


def describe_as_yaml(checked: Sequence[Checked]) -> str:
    """The settings in effect, one YAML document for each configuration."""
    parts = [
        f"# {file.path}{f': {place}' if place else ''}\n"
        + yaml.safe_dump(config.model_dump(), sort_keys=False)
        for file in checked
        for place, config in file.configs.items()
    ]
    return "---\n".join(parts)


def describe_as_json(checked: Sequence[Checked]) -> str:
    """The same for machines, with what is wrong; infinity is the text ".inf"."""
    files = [
        {
            "file": str(file.path),
            "kind": file.kind,
            "settings": {place: config.model_dump() for place, config in file.configs.items()},
            "fault": file.fault,
        }
        for file in checked
    ]
    return json.dumps(spell_out(files), indent=2) + "\n"


def _kind(content: Any, lines: Lines) -> str:
    keys = {str(key) for key in content} if isinstance(content, Mapping) else set()
    if any(place[-1:] == ("trainer",) for place in lines):
        return "lightning"
    if _SECTION in keys or keys & _ACCELERATE:
        return "accelerate"
    return "gradclip"


def _check_lightning(content: Any, lines: Lines, path: Path) -> dict[str, ClipConfig]:
    """The GradientClip among the callbacks of each trainer: a file may have one per subcommand."""
    configs: dict[str, ClipConfig] = {}
    others: dict[str, int] = {}
    for place in [place for place in lines if place[-1:] == ("trainer",)]:
        trainer = _at(content, place)
        trainer = trainer if isinstance(trainer, Mapping) else {}
        ours = []
        for spot, callback in _callbacks(trainer, place):
            class_path = str(
                callback.get("class_path") if isinstance(callback, Mapping) else callback
            )
            if class_path in _CALLBACKS:
                ours.append(spot)
            else:
                others[class_path] = line_of(spot, lines)
        for spot in ours[:1]:
            where, config = _check_callback(_at(content, spot), spot, lines, path)
            configs[where] = config
        value = trainer.get("gradient_clip_val")
        if ours and value:
            fault = f"gradient_clip_val is {value!r}, and GradientClip clips too. Remove it"
            _refuse(fault, (*place, "gradient_clip_val"), lines, path)
        if len(ours) > 1:
            fault = "a second GradientClip would clip again. Keep one, with a list of policies"
            _refuse(fault, ours[1], lines, path)
    if not configs:
        close = difflib.get_close_matches(_CALLBACKS[0], others, n=1, cutoff=0.7)
        hint = f" Line {others[close[0]]} has {close[0]!r}." if close else ""
        msg = (
            f"{path}: no callback of a trainer has class_path {_CALLBACKS[0]}, so nothing here "
            f"clips by gradclip.{hint} Add it under trainer.callbacks."
        )
        raise ConfigError(msg)
    return configs


def _callbacks(trainer: Mapping[str, Any], place: Region) -> Iterator[tuple[Region, Any]]:
    given = trainer.get("callbacks") or []
    if isinstance(given, list):
        yield from (((*place, "callbacks", index), item) for index, item in enumerate(given))
    else:
        yield (*place, "callbacks"), given


def _check_callback(
    callback: Any, place: Region, lines: Lines, path: Path
) -> tuple[str, ClipConfig]:
    """Where its policy stands, and what it is."""
    arguments = _arguments(callback, place, lines, path)
    if "policy" not in arguments:
        fault = "init_args.policy is missing; give policies, or the path of a file with them"
        _refuse(fault, place, lines, path)
    at = arguments["policy"]
    policy, inside = as_mapping(_at(callback, at[len(place) :]), at, lines, str(path))
    where = dotted(at)
    if isinstance(policy, Mapping):
        return where, parse_mapping(policy, str(path), inside)
    try:
        return where, as_config(policy)
    except ConfigError as error:
        msg = f"{path}, line {line_of(at, lines)}: {error}"
        raise ConfigError(msg) from None


def _arguments(callback: Any, place: Region, lines: Lines, path: Path) -> dict[str, Region]:
    """Where its arguments stand, each of which `GradientClip` has and takes."""
    found: dict[str, Region] = {}
    parts = dict(callback) if isinstance(callback, Mapping) else {}
    parts.pop("class_path", None)
    for part, given in parts.items():
        at: Region = (*place, str(part))
        if part not in PARTS:
            known = ", ".join(("class_path", *PARTS))
            _refuse(f"{part} is not a known key; known: {known}", at, lines, path)
        if not isinstance(given, Mapping | None):
            _refuse(f"{part} is {given!r:.80}; allowed: a mapping of arguments", at, lines, path)
        for name, value in (given or {}).items():
            here = (*at, str(name))
            if name not in _ARGUMENTS:
                known = ", ".join(_ARGUMENTS)
                _refuse(f"{part}.{name} is not a known key; known: {known}", here, lines, path)
            if name != "policy" and not _is_flag(value):
                _refuse(
                    f"{part}.{name} is {value!r:.80}; allowed: true or false", here, lines, path
                )
            found[name] = here
    return found


def _is_flag(value: Any) -> bool:
    """Whether jsonargparse takes it where true or false is expected."""
    words = ("true", "false", "yes", "no")
    return isinstance(value, bool | None) or (isinstance(value, str) and value.lower() in words)


def _refuse(fault: str, at: Region, lines: Lines, path: Path) -> NoReturn:
    msg = f"{path}, line {line_of(at, lines)}: {fault}."
    raise ConfigError(msg)


def _refuse_deepspeed(content: Any, config: ClipConfig, lines: Lines, path: Path) -> None:
    """What DeepSpeed would refuse at start: a threshold of its own that no policy has."""
    section = content.get("deepspeed_config")
    written = section.get("gradient_clipping") if isinstance(section, Mapping) else None
    ours = [getattr(policy, "max_norm", None) for policy in config.policies]
    if written and written != "auto" and written not in ours:
        line = lines[("deepspeed_config", "gradient_clipping")]
        msg = (
            f"{path}, line {line}: deepspeed_config.gradient_clipping is {written}, and only one "
            f"can clip. Remove it, or add a policy {{type: norm, max_norm: {written}}}."
        )
        raise ConfigError(msg)


def _at(content: Any, place: Region) -> Any:
    for part in place:
        content = content[part]
    return content
