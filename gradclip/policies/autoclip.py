"""AutoClip: a percentile of the norms seen so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gradclip.policies.base import (
    COUNT,
    NORM,
    AdaptivePolicy,
    coefficient,
    refuse_endless_warmup,
)
from gradclip.policies.history import lacks, percentile_of_last, pushed
from gradclip.policies.sketch import BINS, quantile, taken_in
from gradclip.saved import Range
from gradclip.types import Decision, State, Stats

__all__ = ["AutoClip"]


class AutoClip(AdaptivePolicy):
    """Hold norms to a percentile of those before: the highest 100 - percentile of 100 are clipped.

    limit = percentile of H, linear between ranks as in numpy; c = 1 if n <= limit, else
    limit / (n + eps). H holds the norms before clipping of the last `window` steps, or with
    `history: all` of the whole run, by a sketch within 0.5 % of the exact percentile in 44 KiB
    for each slot. Before `warmup_steps` norms are in H, `max_norm` is the only limit.

    On norms from one distribution `percentile: 95` clips one step in 20, the paper's usual 10 nine
    in ten. With `history: all` a limit that norms have grown out of goes stale: over a run whose
    norms fall tenfold, 90 clips none of the last steps. A window follows.

    State: `seen` (norms taken in) of shape (slots,), and `recent`, the last norms, of shape
    (window, slots), or `counts`, the sketch, of shape (bins, slots). All float64; all restored.

    Ranks: decided from reduced norms, so equal everywhere without a broadcast.

    Departures: the paper's own code lets a norm vote on its own limit (`inclusive: true`), keeps
    every norm in a list that it sorts each step, and turns all later gradients into NaN after one
    NaN. A norm of exactly 0 is no observation.

    References: Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for
    Source Separation Networks", https://arxiv.org/abs/2007.14469 (2020); with a window:
    autoclip 0.2.1 (PyPI), microsoft/TRELLIS; the sketch: Masson, Rim, Lee, "DDSketch" (2019).
    """

    ranges: ClassVar[Mapping[str, Range]] = {"seen": COUNT, "recent": NORM, "counts": COUNT}

    type: Literal["autoclip"] = "autoclip"
    """Selects this policy in YAML."""
    scope: Literal["global", "group", "parameter"] = "global"
    """What one coefficient covers. A history for each unit of a weight would outgrow the model."""
    percentile: Annotated[float, Field(ge=0, le=100)] = 95.0
    """The percentile of past norms that is the limit, 0 to 100."""
    history: Literal["window", "all"] = "window"
    """Which norms count: the last `window`, or all of the run."""
    window: Annotated[int, Field(ge=1)] = 1000
    """How many norms `history: window` looks back."""
    warmup_steps: Annotated[int, Field(ge=1)] = 100
    """Norms to take in before the first limit of its own."""
    inclusive: bool = False
    """Let the current norm vote on its own limit, as the paper does."""

    @model_validator(mode="after")
    def _warms_up_within_the_window(self) -> Self:
        if self.history == "window":
            refuse_endless_warmup(self.warmup_steps, self.window)
        return self

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        if self.history == "all":
            return {"seen": zeros, "counts": zeros.repeat(BINS, 1)}
        return {"seen": zeros, "recent": zeros.repeat(self.window, 1)}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """Norms that are fewer than those seen."""
        seen = state["seen"]
        if self.history == "all":
            return {"counts don't add up to seen": state["counts"].sum(0) != seen}
        return {"recent holds fewer norms than seen says": lacks(state["recent"], seen)}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold norms to the percentile of those before, and take them in."""
        after = self._observe(stats.norms, state)
        known = after if self.inclusive else state
        found = self._percentile(known)
        limit = torch.where(known["seen"] >= self.warmup_steps, found, torch.inf)
        limit = self.bounded(limit, stats)
        return Decision(coefficient(stats.norms, limit, self.eps), limit), after

    def _observe(self, norms: Tensor, state: State) -> State:
        observed = norms > 0
        seen = state["seen"] + observed
        if self.history == "all":
            return {"seen": seen, "counts": taken_in(state["counts"], norms)}
        return {"seen": seen, "recent": pushed(state["recent"], norms, observed)}

    def _percentile(self, state: State) -> Tensor:
        if self.history == "all":
            return quantile(state["counts"], self.percentile / 100)
        return percentile_of_last(state["recent"], state["seen"], self.percentile / 100)
