"""ZClip: clip what is statistically unusual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.base import COUNT, NORM, RUN, SQUARE, AdaptivePolicy, coefficient
from gradclip.policies.history import lacks, level, median, pushed, run
from gradclip.policies.schedule import Limit
from gradclip.saved import Range
from gradclip.types import Decision, State, Stats

__all__ = ["ZClip"]


class ZClip(AdaptivePolicy):
    """Clip norms whose z-score over a running mean and variance exceeds `z_threshold`.

    With n the norm, m and V the running mean and variance, s = sqrt(V) and z = (n - m) / (s + eps):

    - mode "zscore": a spike is z > z_threshold; it is held to
      a = (m + z_threshold^2 * s / z) * clip_factor ("adaptive_scaling": the larger the spike, the
      closer to the mean) or a = m ("mean").
    - mode "percentile": a spike is n > a with a = m + z_threshold * s, and it is held to a.
    - c = min(a, max_norm) / (n + eps) where n exceeds that limit, else 1.
    - Update with u = a for a spike, u = n otherwise (before `max_norm`):
      m' = decay * m + (1 - decay) * u, and V' = decay * V + (1 - decay) * (u - m')^2
      ("reference") or V' = decay * (V + (1 - decay) * (u - m)^2) ("exact", the exponentially
      weighted variance; the reference is low by the factor decay on each increment).

    For the first `warmup_steps` norms gradients are held to `max_norm` alone; then m and V are
    the mean and population variance of those norms, or with `warmup: median` their median and
    the variance that 1.4826 times the median absolute deviation stands for, which a spike among
    them does not inflate.

    State: `mean`, `var`, `seen` (norms taken in), `streak` (spikes in a row, negative for norms
    below half the mean), all of shape (slots,) and float64, and `recent`, the last norms, of shape
    (history, slots). All of it is restored, warm-up included.

    Ranks: decided from reduced norms, so equal everywhere without a broadcast.

    Departures: the reference locks for ever after a lasting change of level by a factor of 2 or
    more, since a spike feeds back only its clipped value. After `escape_after` spikes in a row,
    or as many norms below m / 2, m and V are taken anew from those norms: their median, and the
    variance about their mean. `escape_after: null` is the reference. A norm of exactly 0 is no
    observation. State is in float64. `sigma_floor` keeps s above a share of m.

    References: Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive Spike Mitigation for LLM
    Pre-Training", https://arxiv.org/abs/2504.02507 (2025); code: bluorion-com/ZClip 1.0.0.
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        "mean": NORM,
        "var": SQUARE,
        "seen": COUNT,
        "streak": RUN,
        "recent": NORM,
    }

    takes_numbers: ClassVar[bool] = True

    type: Literal["zclip"] = "zclip"
    """Selects this policy in YAML."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.97
    """Weight of the past in the running mean and variance (the paper's alpha)."""
    z_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.5
    """A norm this many standard deviations above the mean is a spike."""
    max_norm: Limit | None = 1.0
    """A fixed ceiling, the only limit during warm-up; null for none."""
    warmup_steps: Annotated[int, Field(ge=2)] = 25
    """Norms collected before the first adaptive limit."""
    mode: Literal["zscore", "percentile"] = "zscore"
    """How a spike is recognised and what it is held to (see above)."""
    clip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling"
    """What mode "zscore" holds a spike to."""
    clip_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Multiplies the whole "adaptive_scaling" limit, as the reference's code does."""
    skip_update_on_spike: bool = False
    """Leave mean and variance alone on a spike."""
    variance: Literal["reference", "exact"] = "reference"
    """Which recursion the variance follows (see above)."""
    sigma_floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smallest standard deviation as a share of the mean; 0.02 suits very smooth norms."""
    warmup: Literal["mean", "median"] = "mean"
    """How mean and variance start (see above)."""
    escape_after: Annotated[int, Field(ge=2)] | None = 25
    """Spikes in a row, or norms below half the mean, that count as a new level; null never escapes,
    as the reference."""

    @property
    def _history(self) -> int:
        return max(self.warmup_steps, self.escape_after or 0)

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        state = {name: zeros.clone() for name in ("mean", "var", "seen", "streak")}
        return {**state, "recent": zeros.repeat(self._history, 1)}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """A mean, norms or a streak that don't fit the number seen."""
        seen = state["seen"]
        return {
            "mean is 0 after the warm-up": (seen >= self.warmup_steps) & (state["mean"] == 0),
            "recent holds fewer norms than seen says": lacks(state["recent"], seen),
            "streak is longer than seen": state["streak"].abs() > seen,
        }

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Tell a spike, hold it to its limit, and take the norm in."""
        norms, xp = stats.norms, arithmetic(stats.norms)
        mean, var = state["mean"], state["var"]
        ready = state["seen"] >= self.warmup_steps
        sigma = xp.sqrt(var)
        if self.sigma_floor:
            sigma = xp.maximum(sigma, self.sigma_floor * mean)
        spike, target, boundary = self._judge(norms, mean, sigma)
        spike = spike & ready
        taken = xp.where(spike, target, norms)

        limit = xp.where(ready, xp.where(spike, target, boundary), math.inf)
        limit = self.bounded(limit, stats)
        decision = Decision(coefficient(norms, limit, self.eps), limit)
        return decision, self._update(norms, taken, spike, ready, state)

    def _judge(self, norms: Tensor, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which norms are spikes, what each would be held to, and where spikes begin."""
        if self.mode == "percentile":
            boundary = mean + self.z_threshold * sigma
            return norms > boundary, boundary, boundary
        width = sigma + self.eps
        boundary = mean + self.z_threshold * width
        z = (norms - mean) / width
        spike = z > self.z_threshold
        if self.clip_option == "mean":
            return spike, mean, boundary
        pulled = mean + self.z_threshold**2 * sigma / arithmetic(z).where(spike, z, 1.0)
        return spike, pulled * self.clip_factor, boundary

    def _update(
        self, norms: Tensor, taken: Tensor, spike: Tensor, ready: Tensor, state: State
    ) -> State:
        xp = arithmetic(norms)
        observed = norms > 0
        recent = pushed(state["recent"], norms, observed)
        seen = state["seen"] + observed
        low = ready & (norms < state["mean"] / 2)
        streak = xp.where(observed, run(state["streak"], spike, low), state["streak"])

        step = 1 - self.decay
        mean = self.decay * state["mean"] + step * taken
        spread = taken - (mean if self.variance == "reference" else state["mean"])
        weight = step if self.variance == "reference" else step * self.decay
        var = self.decay * state["var"] + weight * (spread * spread)

        moves = ready & observed
        if self.skip_update_on_spike:
            moves = moves & xp.logical_not(spike)
        mean = xp.where(moves, mean, state["mean"])
        var = xp.where(moves, var, state["var"])

        started = (seen >= self.warmup_steps) & (state["seen"] < self.warmup_steps)
        if xp.may(started):
            center, square = level(recent, self.warmup_steps, self.warmup)
            mean = xp.where(started, center, mean)
            var = xp.where(started, square, var)
        if self.escape_after is not None:
            escaped = abs(streak) >= self.escape_after
            if xp.may(escaped):
                first = self._history - self.escape_after
                last = xp.between(recent, first, self._history)
                mean = xp.where(escaped, median(last), mean)
                var = xp.where(escaped, xp.var(last), var)
                streak = xp.where(escaped, 0.0, streak)
        return {"mean": mean, "var": var, "seen": seen, "streak": streak, "recent": recent}
