"""Checking YAML files before training, without the framework that reads them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gradclip.config import ClipConfig, as_config, load_section
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
_OWN = ("policies", "groups", "on_nonfinite", "recorder", "schedule_on_skip", "verify_every")
_OTHERS = {  # whose file has one of these keys, at the top or (Hydra's) anywhere
    "axolotl": {"base_model", "adapter"},
    "LLaMA-Factory": {"finetuning_type", "cutoff_len"},
    "Hydra": {"defaults", "hydra", "_target_"},
    "DeepSpeed": {"zero_optimization", "train_micro_batch_size_per_gpu"},
    "transformers": {"output_dir", "per_device_train_batch_size"},
}


@dataclass(frozen=True)
class Checked:
    """A file that was checked.

    Attributes:
        path: The file.
        kind: `gradclip`, `lightning` or `accelerate`; None if the file isn't YAML, or none of ours.
        configs: Valid configurations by their key path in the file; "" is the whole file.
        fault: What is wrong; None if nothing is.
    """

    path: Path
    kind: str | None
    configs: Mapping[str, ClipConfig]
    fault: str | None = None


def check_file(path: str | Path) -> Checked:
    """Find out which kind of file it is, and validate what it says about clipping."""
    path, kind, configs = Path(path), None, dict[str, ClipConfig]()
    try:
        file = _File(path, *read_yaml(path))
        kind = file.kind()
        if kind == "lightning":
            configs = _check_lightning(file)
        elif kind == "accelerate":
            _refuse_megatron(file)
            configs = {_SECTION: load_section(path, _SECTION)}
            _refuse_deepspeed(file, configs[_SECTION])
        elif kind is None:
            _refuse_other(file)
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

    @property
    def keys(self) -> set[str]:
        """Those at the top."""
        return {str(key) for key in self.content} if isinstance(self.content, Mapping) else set()

    def kind(self) -> str | None:
        if self.other() == "Hydra" and "policies" not in self.keys:  # it may have a trainer too
            return None
        if any(at[-1:] == ("trainer",) for at in self.lines):
            return "lightning"
        if self.keys & {_SECTION, *_ACCELERATE}:
            return "accelerate"
        known = [key for key in self.keys if difflib.get_close_matches(key, _OWN, n=1, cutoff=0.7)]
        return "gradclip" if known or "type" in self.keys or not self.keys else None

    def other(self) -> str | None:
        """The framework that a file which isn't ours seems to belong to."""
        everywhere = {str(at[-1]) for at in self.lines if at} & {"_target_"} | self.keys
        return next((name for name, signs in _OTHERS.items() if signs & everywhere), None)

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
        return dotted(at), as_config(None)
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


def _refuse_other(file: _File) -> NoReturn:
    """Refuse a file that says nothing about clipping by gradclip."""
    other = file.other()
    found = f"this seems to be a file of {other}" if other else "no key here is one of gradclip's"
    msg = (
        f"{file.path}: {found}; check takes three kinds: a configuration, with the key 'policies'; "
        f"a file of LightningCLI, with 'trainer'; a file of Accelerate, with {_SECTION!r}. Write "
        "the policies to a file of their own and check that."
    )
    raise ConfigError(msg)


def _refuse_megatron(file: _File) -> None:
    """Refuse Megatron-LM, as accelerate_clip does at the start."""
    at = "megatron_lm_config"
    if file.content.get("distributed_type") == "MEGATRON_LM":
        at = "distributed_type"
    elif at not in file.keys:
        return
    fault = (
        f"{at} asks for Megatron-LM, which steps inside its own train_step. Let it clip "
        f"(megatron_lm_config.megatron_lm_gradient_clipping) without {_SECTION}, or use FSDP2"
    )
    file.refuse((at,), fault)


def _refuse_deepspeed(file: _File, config: ClipConfig) -> None:
    """Refuse what DeepSpeed refuses at the start: a threshold that no policy has."""
    section = file.content.get("deepspeed_config")
    if not isinstance(section, Mapping):
        return
    key, settings, named = "gradient_clipping", section, ""
    if name := section.get("deepspeed_config_file"):
        key, settings = "deepspeed_config_file", _deepspeed_file(file, name)
        named = f" of {name}"
    at, written = ("deepspeed_config", key), settings.get("gradient_clipping")
    try:
        threshold = 0.0 if written in (None, "auto", "none") else float(written)
    except (TypeError, ValueError):
        fault = f"gradient_clipping{named} is {written!r:.80}; allowed: a number, or auto"
        file.refuse(at, fault)
    ours = [getattr(policy, "max_norm", None) for policy in config.policies]
    if threshold and threshold not in ours:
        fault = (
            f"deepspeed_config.gradient_clipping{named} is {threshold:g}, and only one can clip. "
            f"Remove it, or add a policy {{type: norm, max_norm: {threshold:g}}}"
        )
        file.refuse(at, fault)


def _deepspeed_file(file: _File, name: Any) -> Mapping[str, Any]:
    """The settings in DeepSpeed's own file, which Accelerate looks up from the current folder."""
    try:
        content = json.loads(Path(str(name)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fault = f"{name} can't be read ({reason}). Give DeepSpeed's JSON, from the current folder"
        file.refuse(("deepspeed_config", "deepspeed_config_file"), fault)
    return content if isinstance(content, Mapping) else {}
