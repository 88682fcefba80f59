"""Checking YAML files before training, without the framework that reads them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gradclip.config import ClipConfig, load_section
from gradclip.config.by_class import PARTS
from gradclip.config.load import parse_section, parse_written, read_yaml
from gradclip.errors import ConfigError
from gradclip.models import KeyPath, Lines, dotted, line_of
from gradclip.records.trace_file import spell_out

__all__ = ["Checked", "check_file", "describe_as_json", "describe_as_yaml"]

_CALLBACKS = ("lightning_clip.GradientClip", "lightning_clip.callback.GradientClip", "GradientClip")
_ARGUMENTS = ("policy", "progress_bar", "restore")
_SECTION = "gradient_clip_config"
_ACCELERATE = {"compute_environment", "distributed_type", "num_machines", "num_processes"}


@dataclass(frozen=True)
class Checked:
    """A file that was checked.

    Attributes:
        path: The file.
        kind: `gradclip`, `lightning` or `accelerate`; None if the file isn't YAML.
        configs: Valid configurations by their key path in the file; "" is the whole file.
        fault: What is wrong; None if nothing is.
    """

    path: Path
    kind: str | None
    configs: Mapping[str, ClipConfig]
    fault: str | None = None


def check_file(path: str | Path) -> Checked:
    """Find out which kind of file it is, and validate what it says about clipping."""
    path, kind = Path(path), None
    try:
        file = _File(path, *read_yaml(path))
        kind = file.kind()
        if kind == "lightning":
            configs = _check_lightning(file)
        elif kind == "accelerate":
            configs = {_SECTION: load_section(path, _SECTION)}
            _refuse_deepspeed(file, configs[_SECTION])
        else:
            configs = {"": parse_written(file.content, str(path), file.lines)}
    except ConfigError as error:
        return Checked(path, kind, {}, str(error))
    return Checked(path, kind, configs)


def describe_as_yaml(checked: Sequence[Checked]) -> str:
    """The settings in effect, one YAML document for each configuration."""
    parts = [
        f"# {file.path}{f': {where}' if where else ''}\n"
        + yaml.safe_dump(config.model_dump(), sort_keys=False)
        for file in checked
        for where, config in file.configs.items()
    ]
    return "---\n".join(parts)


def describe_as_json(checked: Sequence[Checked]) -> str:
    """The settings in effect and the faults, as JSON; infinity is the text ".inf"."""
    files = [
        {
            "file": str(file.path),
            "kind": file.kind,
            "settings": {where: config.model_dump() for where, config in file.configs.items()},
            "fault": file.fault,
        }
        for file in checked
    ]
    return json.dumps(spell_out(files), indent=2) + "\n"


@dataclass(frozen=True)
class _File:
    """A YAML file: its content, and the line of each key path."""

    path: Path
    content: Any
    lines: Lines

    def kind(self) -> str:
        keys = {str(key) for key in self.content} if isinstance(self.content, Mapping) else set()
        if any(at[-1:] == ("trainer",) for at in self.lines):
            return "lightning"
        return "accelerate" if keys & {_SECTION, *_ACCELERATE} else "gradclip"

    def value(self, at: KeyPath) -> Any:
        value = self.content
        for part in at:
            value = value[part]
        return value

    def refuse(self, at: KeyPath, fault: str) -> NoReturn:
        msg = f"{self.path}, line {line_of(at, self.lines)}: {fault}."
        raise ConfigError(msg)


def _check_lightning(file: _File) -> dict[str, ClipConfig]:
    """The GradientClip among the callbacks of each trainer: a file may have one per subcommand."""
    configs: dict[str, ClipConfig] = {}
    others: dict[str, int | None] = {}
    for at in [at for at in file.lines if at[-1:] == ("trainer",)]:
        trainer = file.value(at)
        given = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
        here = (*at, "callbacks")
        spots = [(*here, i) for i in range(len(given))] if isinstance(given, list) else [here]
        ours = []
        for spot in spots if given else []:
            callback = file.value(spot)
            named = callback.get("class_path") if isinstance(callback, Mapping) else callback
            if str(named) in _CALLBACKS:
                ours.append(spot)
            else:
                others[str(named)] = line_of(spot, file.lines)
        if not ours:
            continue
        where, config = _check_callback(file, ours[0])
        configs[where] = config
        if value := trainer.get("gradient_clip_val"):
            fault = f"gradient_clip_val is {value!r}, and GradientClip clips too. Remove it"
            file.refuse((*at, "gradient_clip_val"), fault)
        if len(ours) > 1:
            fault = "a second GradientClip would clip again. Keep one, with a list of policies"
            file.refuse(ours[1], fault)
    if not configs:
        close = difflib.get_close_matches(_CALLBACKS[0], others, n=1, cutoff=0.7)
        hint = f" Line {others[close[0]]} has {close[0]!r}." if close else ""
        msg = (
            f"{file.path}: no callback of a trainer has class_path {_CALLBACKS[0]}, so nothing "
            f"here clips by gradclip.{hint} Add it under trainer.callbacks."
        )
        raise ConfigError(msg)
    return configs


def _check_callback(file: _File, at: KeyPath) -> tuple[str, ClipConfig]:
    """The key path of the callback's policy as text, and the configuration it stands for."""
    arguments = _check_arguments(file, at)
    if "policy" not in arguments:
        fault = "init_args.policy is missing; give policies, or the path of a file with them"
        file.refuse(at, fault)
    at = arguments["policy"]
    lines: dict[KeyPath, int] = {(): line_of(at, file.lines) or 1}
    lines |= {spot[len(at) :]: line for spot, line in file.lines.items() if spot[: len(at)] == at}
    return dotted(at), parse_section(file.value(at), str(file.path), lines)


def _check_arguments(file: _File, at: KeyPath) -> dict[str, KeyPath]:
    """The key path of each argument of a callback; `GradientClip` has and takes all of them."""
    found: dict[str, KeyPath] = {}
    callback = file.value(at)
    for part, given in callback.items() if isinstance(callback, Mapping) else ():
        here = (*at, str(part))
        if part == "class_path":
            continue
        if part not in PARTS:
            known = ", ".join(("class_path", *PARTS))
            file.refuse(here, f"{part} is not a known key; known: {known}")
        if not isinstance(given, Mapping | None):
            file.refuse(here, f"{part} is {given!r:.80}; allowed: a mapping of arguments")
        for name, value in (given or {}).items():
            found[name] = (*here, str(name))
            if name not in _ARGUMENTS:
                known = ", ".join(_ARGUMENTS)
                file.refuse(found[name], f"{part}.{name} is not a known key; known: {known}")
            if name != "policy" and not _is_flag(value):
                fault = f"{part}.{name} is {value!r:.80}; allowed: true or false"
                file.refuse(found[name], fault)
    return found


def _is_flag(value: Any) -> bool:
    """Whether jsonargparse takes it where true or false is expected."""
    words = ("true", "false", "yes", "no")
    return isinstance(value, bool | None) or (isinstance(value, str) and value.lower() in words)


def _refuse_deepspeed(file: _File, config: ClipConfig) -> None:
    """Refuse what DeepSpeed refuses at the start: a threshold that no policy has."""
    section = file.content.get("deepspeed_config")
    written = section.get("gradient_clipping") if isinstance(section, Mapping) else None
    ours = [getattr(policy, "max_norm", None) for policy in config.policies]
    if written and written != "auto" and written not in ours:
        fault = (
            f"deepspeed_config.gradient_clipping is {written}, and only one can clip. Remove it, "
            f"or add a policy {{type: norm, max_norm: {written}}}"
        )
        file.refuse(("deepspeed_config", "gradient_clipping"), fault)
