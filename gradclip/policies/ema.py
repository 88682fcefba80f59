"""EmaClip: a multiple of a running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.base import COUNT, NORM, RUN, SHARE, AdaptivePolicy, coefficient
from gradclip.policies.history import lacks, median, pushed, run
from gradclip.saved import Range
from gradclip.types import Decision, State, Stats

__all__ = ["EmaClip"]


class EmaClip(AdaptivePolicy):
    """Hold norms to `factor` times a running mean of those before.

    With n the norm, m and w the exponentially weighted sums of norms and of ones, both from 0:

    - mean = m / w, which is m / (1 - decay^s) after s updates: no bias towards the start.
    - limit = factor * mean after `warmup_steps` norms, `max_norm` alone before.
    - c = 1 if n <= limit, else limit / (n + eps).
    - m' = decay * m + (1 - decay) * u, and w' = decay * w + (1 - decay). With `update: clipped`
      u = min(n, factor * mean), with "raw" u = n, and with "skip" a norm above factor * mean
      changes nothing. During warm-up u = n.

    How fast it follows, once w is near 1: with "clipped" the mean grows by at most
    decay + (1 - decay) * factor a step (1.01 with the defaults: 110 steps for a factor of 3), which
    holds off spikes and holds up a lasting change; with "raw" one spike of size S lifts the limit
    by factor * (1 - decay) * S; with "skip" a change above `factor` is never followed.
    `escape_after` norms in a row above factor * mean, or below mean / factor, are a new level: the
    mean is then their median.

    State: `mean` (m), `weight` (w), `seen` (norms taken in), `streak` (norms in a row above the
    limit, negative for below), all of shape (slots,) and float64, and `recent`, the last norms, of
    shape (escape_after, slots). All of it is restored, warm-up included.

    Ranks: decided from reduced norms, so equal everywhere without a broadcast.

    Departures: there is no reference; AdaGC of scope "global" is the nearest published rule. The
    mean learns from norms before `max_norm` and `min_norm`, so that a ceiling doesn't move it. A
    norm of exactly 0 is no observation.

    References: the update follows Wang et al., "AdaGC", https://arxiv.org/abs/2502.11034 (2025);
    the bias correction Kingma, Ba, "Adam", https://arxiv.org/abs/1412.6980 (2014).
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        "mean": NORM,
        "weight": SHARE,
        "seen": COUNT,
        "streak": RUN,
        "recent": NORM,
    }

    takes_numbers: ClassVar[bool] = True

    type: Literal["ema"] = "ema"
    """Selects this policy in YAML."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """The limit as a multiple of the running mean, at least 1."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Weight of the past in the running mean; it looks back some 1 / (1 - decay) steps."""
    warmup_steps: Annotated[int, Field(ge=1)] = 100
    """Norms taken in before the first limit of its own."""
    update: Literal["clipped", "raw", "skip"] = "clipped"
    """What a norm above the limit adds to the mean: the limit, itself, or nothing."""
    escape_after: Annotated[int, Field(ge=2)] | None = 25
    """Norms in a row above factor * mean, or below mean / factor, that count as a new level; null
    never escapes."""

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        state = {name: zeros.clone() for name in ("mean", "weight", "seen", "streak")}
        if self.escape_after is not None:
            state["recent"] = zeros.repeat(self.escape_after, 1)
        return state

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """A mean, norms or a streak that don't fit the number seen."""
        seen = state["seen"]
        found = {
            "mean is 0 though norms were seen": (seen > 0) & (state["mean"] == 0),
            "weight is 0 though norms were seen": (seen > 0) & (state["weight"] == 0),
            "streak is longer than seen": state["streak"].abs() > seen,
        }
        if self.escape_after is not None:
            found["recent holds fewer norms than seen says"] = lacks(state["recent"], seen)
        return found

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each norm to its multiple of the mean, and take it in."""
        norms, xp = stats.norms, arithmetic(stats.norms)
        ready = state["seen"] >= self.warmup_steps
        mean = state["mean"] / xp.where(ready, state["weight"], 1.0)
        found = xp.where(ready, self.factor * mean, math.inf)
        limit = self.bounded(found, stats)
        new = self._update(norms, found, ready & (norms < mean / self.factor), state)
        return Decision(coefficient(norms, limit, self.eps), limit), new

    def _update(self, norms: Tensor, limit: Tensor, below: Tensor, state: State) -> State:
        """The state after these norms, held to the limit before floor and ceiling."""
        xp = arithmetic(norms)
        observed = norms > 0
        above = norms > limit
        taken = norms if self.update == "raw" else xp.minimum(norms, limit)
        moves = observed & xp.logical_not(above) if self.update == "skip" else observed

        mean = self.decay * state["mean"] + (1 - self.decay) * taken
        weight = self.decay * state["weight"] + (1 - self.decay)
        streak = xp.where(observed, run(state["streak"], above, below), state["streak"])
        new = {
            "mean": xp.where(moves, mean, state["mean"]),
            "weight": xp.where(moves, weight, state["weight"]),
            "seen": state["seen"] + observed,
            "streak": streak,
        }
        if self.escape_after is None:
            return new
        new["recent"] = pushed(state["recent"], norms, observed)
        escaped = abs(streak) >= self.escape_after
        if xp.may(escaped):
            new["mean"] = xp.where(escaped, median(new["recent"]), new["mean"])
            new["weight"] = xp.where(escaped, 1.0, new["weight"])
            new["streak"] = xp.where(escaped, 0.0, streak)
        return new
