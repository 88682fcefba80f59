"""From records and configurations to trackers and sentences."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from gradclip import ClipByNorm, ClipConfig, ClipRecord

__all__ = ["describe", "is_same_rule", "read", "report"]


def report(accelerator: Accelerator, record: ClipRecord, step: int, index: int | None) -> None:
    """Give a record to the accelerator's trackers.

    Args:
        accelerator: Nothing is read or logged unless its trackers are initialised.
        record: Of the step.
        step: Steps of this optimizer so far, from 1.
        index: Which optimizer, if there are several.
    """
    if not accelerator.trackers:
        return
    accelerator.log(read(record, index), step=step)


def read(record: ClipRecord, index: int | None) -> dict[str, float]:
    """A record's metrics on the host.

    Args:
        record: Of a step.
        index: Which optimizer, if there are several; keys then end in `/optimizer<index>`.
    """
    metrics = record.as_metrics()
    suffix = "" if index is None else f"/optimizer{index}"
    # One copy from the device for all of them.
    values = torch.stack(list(metrics.values())).tolist()
    return {f"{key}{suffix}": value for key, value in zip(metrics, values, strict=True)}


def describe(config: ClipConfig) -> str:
    """The policies in one line: `norm(max_norm=1.0), zclip(decay=0.9)`."""
    text: list[str] = []
    for policy in config.policies:
        fields = policy.model_dump(exclude_defaults=True, exclude={"type"})
        text.append(f"{policy.type}({', '.join(f'{k}={v!r}' for k, v in fields.items())})")
    return ", ".join(text) + (" and groups" if config.groups else "")


def is_same_rule(config: ClipConfig, max_norm: float, norm_type: float) -> bool:
    """Whether a configuration does what these arguments of `clip_grad_norm_` say."""
    if config.groups or len(config.policies) > 1:
        return False
    asked = ClipByNorm.model_construct(max_norm=float(max_norm), norm_type=float(norm_type))
    return config.policies[0] == asked
