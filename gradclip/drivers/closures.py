"""Closures that are evaluated several times a step (LBFGS): clipped each time, counted once."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradclip.core import Core
from gradclip.errors import ConfigError
from gradclip.records.record import ClipRecord
from gradclip.types import Beginning, Given, Step

__all__ = ["clip_again", "look_and_write", "refuse_closures"]


def clip_again(core: Core, given: Given, since: Beginning) -> ClipRecord:
    """Clip the gradients of one more evaluation as the step's first were.

    What was withheld or not finite joins the record of the step.

    Args:
        core: Of the clipper, which has committed the step.
        given: What is known of these gradients.
        since: What the step began with.

    Returns:
        The record of the step.
    """
    return core.amend(look_and_write(core, given, since))


def look_and_write(core: Core, given: Given, since: Beginning) -> Step:
    """Clip gradients without counting them: policies look back to the step's beginning.

    Args:
        core: Of the clipper.
        given: What is known of these gradients.
        since: What the step began with.

    Returns:
        What was found, to be committed, or to amend what was committed.
    """
    step = core.look(given, since)
    edits = [replace(e, learns=torch.zeros_like(e.learns)) for e in step.verdict.edits]
    core.write(replace(step, verdict=replace(step.verdict, edits=tuple(edits))))
    return step


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
