"""AdaGC: hold each parameter to a multiple of its own running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.norms import combine
from gradclip.policies.base import COUNT, NORM, RUN, AdaptivePolicy, coefficient, fixed
from gradclip.policies.history import run
from gradclip.policies.schedule import Limit
from gradclip.saved import Range
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["AdaGC"]


class AdaGC(AdaptivePolicy):
    """Hold each parameter's norm to `factor` times the running mean of its clipped norms.

    With n_i the norm of slot i, N the norm of all slots of this policy, and g_i the running mean
    of slot i (the paper's gamma):

    - Warm-up, the first `warmup_steps` - 1 norms of a slot (at least one):
      c_i = min(1, warmup_norm / (N + eps)); g_i is the mean ("mean") or smallest ("min") of the
      clipped norms c_i * n_i so far.
    - Then limit_i = factor * max(g_i, mean_floor * median of all g, eps), c_i = 1 if
      n_i <= limit_i, else limit_i / n_i, and
      g_i' = decay * g_i + (1 - decay) * min(n_i, limit_i).

    How fast it follows: by at most decay + (1 - decay) * factor a step (1.001 with the defaults:
    1100 steps for a factor of 3). With `factor` near 1 most steps are clipped, by design: with
    norms that vary by 10, 30 and 50 % it clips 42, 70 and 78 % of them. A run of clipped norms is
    therefore nothing unusual, and `escape_after` is 50: one false escape in some 10^6 norms that
    vary by 50 %, none in 8 * 10^6 at 30 %; with 25 it would be 37 in 10^6 there. After so many in a
    row above factor * g_i, or below g_i / factor, g_i is their geometric mean, which takes one
    number a slot instead of a history.

    State: `mean` (g), `seen` (norms taken in), `streak` (norms in a row above the limit, negative
    for below) and `level` (mean of the logarithms of those), all of shape (slots,) and float64. All
    of it is restored, warm-up included.

    Ranks: decided from reduced norms, so equal everywhere without a broadcast.

    Departures: `warmup: min`, `mean_floor: 0` and `escape_after: null` are the reference. In it a
    smallest norm of 0 during warm-up clips the parameter to nothing for some 18 000 steps; here a
    norm of exactly 0 is no observation, with either `warmup`, and warm-up is counted in each slot's
    own norms, so that a parameter that starts late has one. The mean learns from norms before
    `max_norm` and `min_norm`, so that a ceiling doesn't move it. State is in float64.

    References: Wang, Li, Chen, Zeng, Yang, Yu, Ma, Shen, "AdaGC: Enhancing LLM Pretraining
    Stability via Adaptive Gradient Clipping", https://arxiv.org/abs/2502.11034 (2025); code:
    pytorch_optimizer.AdaGC 4.1.0.
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        "mean": NORM,
        "seen": COUNT,
        "streak": RUN,
        "level": Range(math.log(5e-324), math.log(NORM.high)),
    }

    type: Literal["adagc"] = "adagc"
    """Selects this policy in YAML."""
    scope: Scope = "parameter"
    """What has a mean and a limit of its own: a parameter, a unit, an optimizer's group, or all."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.05
    """The limit as a multiple of the running mean, at least 1 (the paper's relative lambda)."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Weight of the past in the running mean (the paper's beta)."""
    warmup_norm: Limit | None = 1.0
    """Largest norm of all slots together during warm-up (the paper's absolute lambda); null for
    none. Set it to at least the usual norm: the first means are those of the clipped norms."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """The first step with a limit of its own, counted from 1 in norms of the slot."""
    warmup: Literal["mean", "min"] = "mean"
    """Whether a slot's mean starts as the mean or the smallest of its norms during warm-up."""
    mean_floor: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """Smallest running mean, as a share of the median over all slots."""
    escape_after: Annotated[int, Field(ge=2)] | None = 50
    """Norms in a row above factor * mean, or below mean / factor, that count as a new level; null
    never escapes, as the reference."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Added to the norm of all slots during warm-up, and the smallest running mean afterwards."""

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {name: zeros.clone() for name in ("mean", "seen", "streak", "level")}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """A mean or a streak that doesn't fit the number seen."""
        seen = state["seen"]
        return {
            "mean is 0 though norms were seen": (seen > 0) & (state["mean"] == 0),
            "streak is longer than seen": state["streak"].abs() > seen,
        }

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each slot to its multiple, and take its clipped norm in."""
        norms, seen = stats.norms, state["seen"]
        ready = seen >= max(1, self.warmup_steps - 1)
        found = self.factor * self._floored(state["mean"], seen > 0)
        found = torch.where(ready, found, self._warmup_limit(stats))
        limit = self.bounded(found, stats)
        decision = Decision(coefficient(norms, limit, 0.0), limit)
        return decision, self._update(norms, found, ready, state)

    def _floored(self, mean: Tensor, started: Tensor) -> Tensor:
        """Running means, raised to a share of their median, so that none is stuck near 0."""
        if self.mean_floor:
            # NaN before any slot has started: `fmax` then keeps the mean. `nanmedian` would take
            # the lower of two middles, and wait for the device.
            middle = torch.where(started, mean, torch.nan).nanquantile(0.5)
            mean = torch.fmax(mean, self.mean_floor * middle)
        return mean.clamp(min=self.eps)

    def _warmup_limit(self, stats: Stats) -> Tensor:
        """During warm-up, the limit of each slot that holds the norm of all to `warmup_norm`."""
        norms = stats.norms
        if self.warmup_norm is None:
            return torch.full_like(norms, math.inf)
        whole = combine(norms, self.norm_type)
        most = fixed(whole, self.warmup_norm, stats)
        coef = coefficient(whole, most, self.eps)
        return torch.where((coef < 1) & (norms > 0), coef * norms, most)

    def _update(self, norms: Tensor, limit: Tensor, ready: Tensor, state: State) -> State:
        """The state after these norms, held to the limit before floor and ceiling."""
        observed = norms > 0
        above = ready & (norms > limit)
        # The limit is factor * mean, so this is norms < mean / factor.
        below = ready & (norms * self.factor**2 < limit)
        taken = torch.minimum(norms, limit)
        mean, seen = state["mean"], state["seen"] + observed

        if self.warmup == "mean":
            first = mean + (taken - mean) / seen.clamp(min=1.0)
        else:
            first = torch.where(state["seen"] > 0, torch.minimum(mean, taken), taken)
        later = self.decay * mean + (1 - self.decay) * taken
        moved = torch.where(ready, later, first)

        streak = run(state["streak"], above, below)
        level = state["level"] + (norms.log() - state["level"]) / streak.abs().clamp(min=1.0)
        if self.escape_after is not None:
            escaped = streak.abs() >= self.escape_after
            moved = torch.where(escaped, level.exp(), moved)
            streak = torch.where(escaped, 0.0, streak)
        new = {"mean": moved, "seen": seen, "streak": streak, "level": level}
        return {name: torch.where(observed, value, state[name]) for name, value in new.items()}
