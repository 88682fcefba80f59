"""Limits that never move: a norm, a magnitude, and not stepping on NaN."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gradclip.policies.base import NormPolicy, Policy, coefficient, filled
from gradclip.policies.schedule import Limit
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["ClipByNorm", "ClipByValue", "SkipNonfinite"]


class ClipByNorm(NormPolicy):
    """Scale gradients whose p-norm exceeds `max_norm` down to it.

    n = (sum |g|^p)^(1/p); c = 1 if n <= max_norm, else max_norm / (n + eps).

    Departures: torch also scales by up to 1e-6 / max_norm when n lies within 1e-6 below the
    limit; here a gradient at or below the limit keeps its bits.

    References: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
    networks", https://arxiv.org/abs/1211.5063 (2012).
    """

    type: Literal["norm"] = "norm"
    """Selects this policy in YAML."""
    max_norm: Limit
    """Largest norm of a slot, above 0; `.inf` only measures. A number or a schedule."""

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each slot to `max_norm`."""
        limit = filled(stats.norms, self.max_norm, stats.step)
        return Decision(coefficient(stats.norms, limit, self.eps), limit), state


class ClipByValue(Policy):
    """Clamp every element to [-clip_value, clip_value]. Changes the direction; stands last.

    Whether anything exceeded the value is measured (an inf-norm) before anything is written.
    NaN stays NaN.
    """

    type: Literal["value"] = "value"
    """Selects this policy in YAML."""
    clip_value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Largest magnitude of an element, above 0, in units of the gradient."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The largest magnitude over all parameters."""
        return "global", math.inf

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Clamp; the coefficient stays 1."""
        limit = torch.full_like(stats.norms, self.clip_value)
        return Decision(torch.ones_like(limit), limit, clamp=self.clip_value), state


class SkipNonfinite(Policy):
    """Withhold the optimizer step if any gradient element, on any rank, is NaN or infinite.

    The same as `on_nonfinite: skip`, as a policy that can be listed.
    """

    withholds: ClassVar[bool] = True

    type: Literal["skip_nonfinite"] = "skip_nonfinite"
    """Selects this policy in YAML."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """Whatever norm is measured anyway tells whether gradients are finite."""
        return "global", None

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Withhold a step that isn't finite."""
        ones = torch.ones_like(stats.norms)
        return Decision(
            ones, torch.full_like(ones, math.inf), skip=stats.finite.logical_not()
        ), state
