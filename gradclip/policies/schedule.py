"""Limits that follow the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from gradclip.models import Model
from gradclip.policies.arithmetic import arithmetic

__all__ = ["Limit", "Schedule"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Schedule(Model):
    """A limit as a function of t, the optimizer steps taken so far (withheld ones don't count).

    With u = clip((t - begin) / steps, 0, 1):

    - "linear": start + (end - start) * u.
    - "cosine": end + (start - end) * (1 + cos(pi * u)) / 2.
    - "warmup_cosine": start to `peak` linearly over `warmup_steps`, then a cosine to `end` over
      the rest of `steps`.

    Before `begin` it is `start`, after the last step `end`.

    References: optax.linear_schedule, cosine_decay_schedule, warmup_cosine_decay_schedule.
    """

    schedule: Literal["linear", "cosine", "warmup_cosine"]
    """The curve (see above)."""
    start: Positive
    """The limit at step `begin` and before, above 0."""
    end: Positive
    """The limit after the last step, above 0."""
    steps: Annotated[int, Field(ge=0)]
    """Optimizer steps from `start` to `end`; 0 is `end` at once."""
    begin: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps before it starts to move."""
    peak: Positive | None = None
    """The limit between warm-up and cosine, for "warmup_cosine"."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps from `start` to `peak`, of the `steps` in all, for "warmup_cosine"."""

    @model_validator(mode="after")
    def _warms_up_or_not(self) -> Schedule:
        warms = self.schedule == "warmup_cosine"
        if warms and (self.peak is None or self.warmup_steps > self.steps):
            msg = "'warmup_cosine' needs a peak, and warmup_steps no larger than steps. Set them."
            raise ValueError(msg)
        if not warms and (self.peak is not None or self.warmup_steps):
            msg = (
                f"has peak or warmup_steps, and schedule {self.schedule!r} has neither; remove "
                "them, or choose 'warmup_cosine'."
            )
            raise ValueError(msg)
        return self

    def at(self, step: Tensor) -> Tensor:
        """The limit at a step, float64 of its shape; no host read."""
        t = arithmetic(step).double(step) - self.begin
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * _share(t, self.steps)
        if self.peak is None:
            return self._cosine(self.start, t, self.steps)
        rising = self.start + (self.peak - self.start) * _share(t, self.warmup_steps)
        falling = self._cosine(self.peak, t - self.warmup_steps, self.steps - self.warmup_steps)
        return arithmetic(t).where(t < self.warmup_steps, rising, falling)

    def _cosine(self, top: float, t: Tensor, steps: int) -> Tensor:
        return self.end + (top - self.end) * (1 + arithmetic(t).cos(math.pi * _share(t, steps))) / 2


def _share(t: Tensor, steps: int) -> Tensor:
    xp = arithmetic(t)
    return xp.clip(t / steps, 0.0, 1.0) if steps else xp.full_like(t, 1.0)


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, Schedule | Mapping) else "number"


Limit = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(_kind),
]
"""A limit, above 0 so that it can neither freeze nor flip (inf only measures), or a schedule."""
