"""Withholding a step because its norm is too large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gradclip.policies.base import COUNT, NORM, SHARE, filled, fixed, refuse_endless_warmup
from gradclip.policies.history import lacks, percentile_of_last, pushed
from gradclip.policies.schedule import Limit
from gradclip.policies.skip import SkipPolicy
from gradclip.saved import Range
from gradclip.types import Decision, State, Stats

__all__ = ["SkipLarge"]


class SkipLarge(SkipPolicy):
    """Withhold the step unless its norm is below a bound.

    The bound is `limit` itself, or `limit` times the mean ("ema", bias-corrected with `decay`) or
    the `percentile` of the norms of steps that were taken, once there were `warmup_steps` of them.
    A step at the bound is withheld too. What isn't finite is `on_nonfinite`'s matter.

    After `max_consecutive` steps in a row the next is taken (`fallback`), and the mean or the
    percentile starts anew from it, or from it and those that were withheld.

    State: `withheld`, `before` and `held_norms`, as for `skip_spike`; for "ema" `mean`, `weight`,
    `seen` of shape (1,); for "percentile" `norms` of shape (window, 1) and `seen`. All float64;
    all restored.

    Departures: optax drops the micro-batch; this withholds the optimizer's step, and falls back
    after `max_consecutive` of them.

    References: optax.skip_large_updates.
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        **SkipPolicy.ranges,
        "mean": NORM,
        "weight": SHARE,
        "norms": NORM,
        "seen": COUNT,
    }

    type: Literal["skip_large"] = "skip_large"
    """Selects this policy in YAML."""
    limit: Limit
    """The bound on the norm, or the factor on what it is relative to, above 0."""
    relative_to: Literal["fixed", "ema", "percentile"] = "fixed"
    """What `limit` multiplies: 1, the running mean, or a percentile of past norms."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Weight of the past in the running mean."""
    percentile: Annotated[float, Field(ge=0, le=100)] = 95.0
    """The percentile of past norms, 0 to 100."""
    window: Annotated[int, Field(ge=2)] = 1000
    """How many norms the percentile looks back."""
    warmup_steps: Annotated[int, Field(ge=1)] = 100
    """Norms to take in before a relative bound holds."""

    @model_validator(mode="after")
    def _warms_up_within_the_window(self) -> Self:
        if self.relative_to == "percentile":
            refuse_endless_warmup(self.warmup_steps, self.window)
        return self

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        state = super().init(slots, device)
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        if self.relative_to == "ema":
            return {**state, **{name: zeros.clone() for name in ("mean", "weight", "seen")}}
        if self.relative_to == "percentile":
            return {**state, "norms": zeros.repeat(self.window, 1), "seen": zeros.clone()}
        return state

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """Also a mean, or norms, that don't fit the number seen."""
        found = dict(super().contradictions(state))
        if self.relative_to == "ema":
            seen = state["seen"] > 0
            found["mean is 0 though norms were seen"] = seen & (state["mean"] == 0)
            found["weight is 0 though norms were seen"] = seen & (state["weight"] == 0)
        elif self.relative_to == "percentile":
            found["norms holds fewer than seen says"] = lacks(state["norms"], state["seen"])
        return found

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Withhold a step at or beyond the bound, or take its norm in."""
        norm = stats.norms
        if self.relative_to == "fixed":
            bound = fixed(norm, self.limit, stats)
        else:
            bound = filled(norm, self.limit, stats.step) * self._level(state)
            bound = torch.where(state["seen"] >= self.warmup_steps, bound, torch.inf)
        beyond = (norm < bound).logical_not() & torch.isfinite(bound)
        decision, over, counts = self._bounded(stats, state, beyond, bound)
        took = (norm > 0) & (counts["withheld"] > state["withheld"]).logical_not()
        return decision, {**self._taken_in(norm, took, over, counts, state), **counts}

    def _level(self, state: State) -> Tensor:
        """What the bound is relative to; no number before the first norm."""
        if self.relative_to == "ema":
            return state["mean"] / state["weight"]
        return percentile_of_last(state["norms"], state["seen"], self.percentile / 100)

    def _taken_in(
        self, norm: Tensor, took: Tensor, over: Tensor, counts: State, state: State
    ) -> State:
        """What is remembered with this norm, or anew from it where the bound was reached."""
        if self.relative_to == "fixed":
            return {}
        seen = torch.where(over, float(self.warmup_steps), state["seen"] + took)
        if self.relative_to == "percentile":
            rows, held = pushed(state["norms"], norm, took), counts["held_norms"]
            filler = norm.expand(self.window - 1 - self._holds, -1)
            level = torch.cat([filler, held, norm.unsqueeze(0)])
            return {"norms": torch.where(over, level, rows), "seen": seen}
        step = took.double() * (1 - self.decay)
        mean = state["mean"] + step * (norm - state["mean"])
        weight = state["weight"] + step * (1 - state["weight"])
        return {
            "mean": torch.where(over, norm, mean),
            "weight": torch.where(over, 1.0, weight),
            "seen": seen,
        }
