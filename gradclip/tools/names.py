"""Which column of a log means what, told by the names that frameworks give."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gradclip.errors import ConfigError
from gradclip.tools.logs import Log

__all__ = ["Columns", "choose_columns"]

_OURS = re.compile(r"(?:.*[/ ])?clip/grad_norm(?:/optimizer\d+)?")
_NORM = re.compile(
    r"""
    (?:.*[/ .])?
    (?: (?:(?:train(?:ing)?|total|global|l2|raw|\w+_opt)[_ -])*
        (?: grad(?:ient)?s?[_ -]?(?:(?P<p>\d+(?:\.\d+)?|inf|l2)[_ -])?norm | (?:grad_)?gnorm
          | total_norm )
        (?:[_ -](?:step|total|global|l2))* (?:/(?:total|global|all|optimizer\d+))?
      | l2_norm/grad/global                        # composer
      | grad/norm/total                            # levanter
      | gradients_(?:\w+_)?optimizer_global_norm   # RLlib
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LOSS = re.compile(
    r"""
    (?:metrics/)?
    (?: (?:(?:train(?:ing)?|lm|learning|train/opt)[/_ -])?loss(?:_step)?
      | (?:train[ ])?loss/train/total              # composer
      | loss_metrics/global_avg_loss               # torchtitan
      | (?:.*/)?total_loss                         # RLlib
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_STEPS = (
    "trainer/global_step",
    "train/global_step",
    "global_step",
    "optimizer_step",
    "step",
    "steps",
    "_step",
    "iteration",
    "iter",
    "num_updates",  # fairseq
    "training_iteration",  # RLlib
    "batch",  # composer
    "time/batch",
    "current_steps",  # LLaMA-Factory
    "global_step/max_steps",  # ms-swift
)
_EPOCHS = ("epoch", "train/epoch", "trainer/epoch", "current_epoch")
_BESIDE = ("limit", "coef", "clipped_norm", "clipped", "skipped", "nonfinite")
_MEGATRON = {
    "skipped": "number of skipped iterations",
    "nonfinite": "number of nan iterations",
}


@dataclass(frozen=True)
class Columns:
    """Columns of a log.

    Attributes:
        taken: Name in the log by column of the trace, and by `nonfinite`: how many steps weren't.
        instead: Column of the norm of steps that have none in the first, if there is one.
        epoch: Column of the epoch, if there is one.
        notes: Remarks for the reader.
    """

    taken: Mapping[str, str]
    instead: str | None
    epoch: str | None
    notes: list[str]

    @property
    def norm_type(self) -> float:
        """The p of the norms, from a name such as `grad_2.0_norm_total`; else 2."""
        match = _NORM.fullmatch(self.taken["grad_norm"])
        said = match.group("p") if match else None
        return float(said.lower().replace("l2", "2")) if said else 2.0


def choose_columns(log: Log, asked: Mapping[str, str]) -> Columns:
    """Tell columns by their names.

    Args:
        log: The log.
        asked: Names that the user gave, by column of the trace.

    Raises:
        ConfigError: If a given name isn't there, or the norm can't be told.
    """
    for role, name in asked.items():
        if name not in log.names:
            close = difflib.get_close_matches(name, log.names, n=3, cutoff=0.3)
            near = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            msg = f"{log.path}: there is no column {name!r} for {role}; {near}{_listed(log)}"
            raise ConfigError(msg)
    norm = asked.get("grad_norm") or _find_norm(log)
    run = norm[: norm.rfind(" - ") + 3] if " - " in norm else ""
    taken, notes = {"grad_norm": norm, **asked}, list[str]()
    step = _first_of(_STEPS, log)
    if "step" not in taken and step is not None:
        taken["step"] = step
    elif "step" not in taken:
        notes.append("no column names the step: rows with a norm are counted from 0")
    instead = None
    if _OURS.fullmatch(norm):
        beside = {role: norm.replace("clip/grad_norm", f"clip/{role}") for role in _BESIDE}
        taken = {**{role: name for role, name in beside.items() if name in log.names}, **taken}
        trainers = norm.replace("clip/grad_norm", "grad_norm")
        instead = trainers if trainers in log.names else None
        largest = norm.replace("clip/grad_norm", "clip/grad_norm_max")
        if largest in log.names:
            notes.append(
                f"{norm} is a mean over the steps between two entries; {largest} is their largest. "
                "Single steps stand in a flight record"
            )
    else:
        beside = {"limit": f"{run}clip/limit", **_MEGATRON}
        taken = {**{role: name for role, name in beside.items() if name in log.names}, **taken}
    if "loss" not in taken:
        losses = [n for n in log.names if n.startswith(run) and _LOSS.fullmatch(n[len(run) :])]
        losses = [n for n in losses if n[len(run) :] == "loss"] or losses
        if len(losses) == 1:
            taken["loss"] = losses[0]
        elif losses:
            notes.append(f"no loss is taken, since several may be meant: {', '.join(losses)}")
    return Columns(taken, instead, _first_of(_EPOCHS, log), notes)


def _first_of(names: tuple[str, ...], log: Log) -> str | None:
    lower = {name.lower(): name for name in reversed(log.names)}
    return next((lower[name] for name in names if name in lower), None)


def _find_norm(log: Log) -> str:
    found = [name for name in log.names if _OURS.fullmatch(name)]
    found = found or [name for name in log.names if _NORM.fullmatch(name)]
    # fairseq has a mean over the epoch too, and maxtext the norm after clipping.
    worse = {f"train_{name}" for name in found}
    worse |= {name.replace("raw_", "") for name in found if "raw_" in name}
    found = [name for name in found if name not in worse]
    found = found or [name for name in log.names if name.lower() == "norm"]
    if len(found) == 1:
        return found[0]
    if found:
        msg = (
            f"{log.path}: several columns may be the gradient norm: "
            f"{', '.join(map(repr, found))}. Name one and make a trace of it: gradclip import "
            f"LOG --norm-column {found[0]!r}."
        )
    else:
        msg = f"{log.path}: no column is named like a gradient norm. {_why_none(log)}{_listed(log)}"
    raise ConfigError(msg)


def _why_none(log: Log) -> str:
    """Why a log of a known framework has no norm, and what to give."""
    if {"current_steps", "total_steps"} <= set(log.names):
        return "LLaMA-Factory writes norms to trainer_state.json, beside this file; give that; "
    if log.kind == "transformers":
        return "transformers logs grad_norm since version 4.38. Train with a newer one; "
    return "Name it and make a trace of it: gradclip import LOG --norm-column NAME; "


def _listed(log: Log) -> str:
    more = f" and {len(log.names) - 30} more" if len(log.names) > 30 else ""
    return f"found: {', '.join(map(repr, log.names[:30])) or 'no columns'}{more}."
