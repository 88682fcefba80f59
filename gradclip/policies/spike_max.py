"""SpikeMax: the largest element of every parameter against its own running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.policies.base import NORM, SHARE
from gradclip.policies.elements import ElementPolicy
from gradclip.saved import Range
from gradclip.types import Decision, Memory, Scope, State, Stats

__all__ = ["SpikeMax"]


class SpikeMax(ElementPolicy):
    """Scale elements above the running mean of their parameter's largest magnitude (AdaClip).

    For each parameter, with x = max |g| of this step: M' = decay * M + (1 - decay) * x, and
    m = M' / (1 - decay^t), which takes x in; every element with |g| > m becomes (m / x) * g. The
    largest comes to m, others above m to below it.

    State: `mean` (m) and `weight` (decay^t, a running product), of shape (parameters,) and
    float64. All of it is restored.

    Ranks: x is reduced, so m is the same everywhere.

    Departures: the reference starts the count of its bias correction anew at every reset of the
    momentum and keeps M, which turns the clipping off for hundreds of steps; here the count is
    never reset. A parameter without a gradient (x = 0) is no observation. The other half of
    Stable-SPAM, AdaGN, scales every gradient to a norm of about 1: a normaliser, not a clipper,
    and left out.

    References: Huang, Hu, Zhang, Jin, Li, Shen, Chen, Liu, Wen, Wang, Liu, "Stable-SPAM: How to
    Train in 4-Bit More Stably than 16-Bit Adam", https://arxiv.org/abs/2502.17055 (2025); code:
    TianjinYellow/StableSPAM 6a66da1.
    """

    ranges: ClassVar[Mapping[str, Range]] = {"mean": NORM, "weight": SHARE}

    type: Literal["spike_max"] = "spike_max"
    """Selects this policy in YAML."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Weight of the past in the running mean of the largest magnitude."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The largest magnitude of each parameter."""
        return "parameter", math.inf

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {"mean": zeros, "weight": torch.ones_like(zeros)}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """A mean of nothing that has weight."""
        return {"mean is 0 though weight is below 1": (state["weight"] < 1) & (state["mean"] == 0)}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Take the largest magnitudes in, and hold to their mean what exceeds it."""
        largest = stats.norms
        seen = largest > 0
        weight = torch.where(seen, state["weight"] * self.decay, state["weight"])
        rate = torch.where(seen, (1 - self.decay) / (1 - weight), 0.0)
        mean = state["mean"] + rate * (largest - state["mean"])
        changes = largest > mean
        ratio = torch.where(changes, mean / largest, 1.0)
        limit = torch.where(seen, mean, math.inf)
        decision = Decision(torch.ones_like(mean), limit, changes=changes, elements=(mean, ratio))
        return decision, {"mean": mean, "weight": weight}

    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """Scale what exceeds the mean."""
        mean, ratio = values
        return torch.where(grad.abs() > mean, grad * ratio, grad), memory
