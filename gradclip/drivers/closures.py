"""Closures that are evaluated several times a step (LBFGS): clipped each time, counted once."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradclip.core import Core
from gradclip.errors import ConfigError
from gradclip.records.record import ClipRecord
from gradclip.types import Beginning, Given

__all__ = ["clip_again", "refuse_closures"]


def clip_again(core: Core, given: Given, since: Beginning) -> ClipRecord:
    """Clip the gradients of one more evaluation as the step's first were.

    Policies look back to the step's beginning, so that they neither count nor learn twice. What
    was withheld or not finite joins the record of the step.

    Args:
        core: Of the clipper, which has committed the step.
        given: What is known of these gradients.
        since: What the step began with.

    Returns:
        The record of the step.
    """
    step = core.look(given, since)
    record = core.amend(step)
    edits = [replace(e, learns=torch.zeros_like(e.learns)) for e in step.verdict.edits]
    core.write(replace(step, verdict=replace(step.verdict, edits=tuple(edits))))
    return record


def refuse_closures() -> None:
    """Raise where a closure makes the gradients of a step.

    Raises:
        ConfigError: Always.
    """
    msg = (
        "stage is 'after_backward' and the optimizer evaluates a closure, perhaps several times a "
        "step; allowed: steps without a closure. Set stage to 'step'."
    )
    raise ConfigError(msg)
