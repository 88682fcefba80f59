"""Auto: the limit that needs no number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.base import NORM, AdaptivePolicy, coefficient
from gradclip.saved import Range
from gradclip.types import Decision, State, Stats

__all__ = ["Auto"]

# Found on the tuning half of benchmarks/outcome, then frozen; the reporting half has its results.
_FACTOR = 1.2  # the limit beside the running mean
_DECAY = 0.98  # weight of the past in the running mean
_START = 0.1  # the first mean beside the first norm, where steps don't grow with the gradient
_REACH = 0.07  # how far a gradient at the limit may move parameters in all, beside their norm
_LEAST_RMS = 0.01  # parameters are taken to be at least as large, so that zeros can be trained


class Auto(AdaptivePolicy):
    """Hold the norm to 1.2 times the running mean of the norms after clipping. Nothing to set.

    With n the norm and m the running mean:

    - limit = 1.2 * m, c = 1 if n <= limit, else limit / (n + eps).
    - m' = 0.98 * m + 0.02 * min(n, limit): a spike counts as no more than the limit, so the limit
      grows by at most 0.4 % a step. Downwards it follows within some 50 steps.

    The start, and a ceiling, follow from the optimizer (`Stats.rate`):

    - Adam, Lion, Muon and all others whose step doesn't grow with the gradient: m starts at 0.1 of
      the first norm. A small limit costs them nothing, and the first steps are held to one length.
    - SGD and its kind: m starts at the first norm. With r the largest rate so far and W the norm
      of the parameters, limit <= 0.07 * W / r: no gradient moves the parameters by more than 7 % of
      their norm, momentum included. So a loss that grows, which is a rate that grows, is held.

    No step needs a warm-up: the first one has its limit already.

    State: `mean` (m) and `rate` (r), both of shape (slots,) and float64. A norm of exactly 0 is no
    observation.

    Ranks: decided from reduced norms, so equal everywhere without a broadcast. Norms of parameters
    travel in the same message.

    Source: this is AdaGC's mean (https://arxiv.org/abs/2502.11034) on one norm for all parameters,
    with a start and a ceiling in place of its warm-up. Where the constants come from, and what they
    are worth: benchmarks/outcome.
    """

    uses_rate: ClassVar[bool] = True
    takes_numbers: ClassVar[bool] = True

    ranges: ClassVar[Mapping[str, Range]] = {"mean": NORM, "rate": NORM}

    type: Literal["auto"] = "auto"
    """Selects this policy in YAML."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Added to the norm when dividing by it; with 0 nothing depends on the scale of the loss."""

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {"mean": zeros, "rate": zeros.clone()}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each slot to its multiple, and take its clipped norm in."""
        norms, mean, rate = stats.norms, state["mean"], state["rate"]
        xp = arithmetic(norms)
        grows = stats.rate is not None
        mean = xp.where(mean > 0, mean, norms if grows else _START * norms)
        found = _FACTOR * mean
        if stats.rate is not None:
            rate = xp.maximum(rate, stats.rate)
            found = xp.minimum(found, self._reach(stats, rate))
        taken = _DECAY * mean + (1 - _DECAY) * xp.minimum(norms, found)
        # A slot that never had a gradient has no limit, rather than one of 0.
        limit = self.bounded(xp.where(mean > 0, found, math.inf), stats)
        new = {"mean": xp.where(norms > 0, taken, state["mean"]), "rate": rate}
        return Decision(coefficient(norms, limit, self.eps), limit), new

    def _reach(self, stats: Stats, rate: Tensor) -> Tensor:
        """The norm of gradients that move parameters by `_REACH` of their own norm."""
        assert stats.weights is not None
        assert stats.sizes is not None
        xp = arithmetic(stats.norms)
        size = xp.maximum(stats.weights, _LEAST_RMS * xp.sqrt(stats.sizes))
        return _REACH * size / (rate * stats.share)
