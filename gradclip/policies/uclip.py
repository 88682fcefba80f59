"""U-Clip: what clipping takes away is given back later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gradclip.policies.base import FLAG, REAL, NormType, coefficient, filled
from gradclip.policies.elements import ElementPolicy
from gradclip.policies.schedule import Limit
from gradclip.saved import Range
from gradclip.types import Decision, Memory, Scope, State, Stats

__all__ = ["UClip"]


class UClip(ElementPolicy):
    """Clip the gradient plus the remainder of earlier steps; carry over what is cut off.

    u = clip(g + d), d' = g + d - u, with d = 0 at first. clip holds every element to [-limit,
    limit] ("value"), or the p-norm of all elements to limit ("norm"). The optimizer gets u, and
    the sum of all u is the sum of all g less the last d: clipping delays and doesn't bias, as
    long as d stays small.

    d grows without bound where gradients exceed the limit on average (g = 2 with a limit of 1: d
    is t - 1 after t steps), so it is held to `max_carry` times the limit, element-wise or in norm
    as the gradient is, and may fade by `carry_decay` at each step.

    State: `carrying` (1 while d may be other than 0), of shape (1,) and float64, and `carry` (d),
    one float32 for each element that is clipped. All of it is restored, bitwise; with `save:
    false` it starts anew from d = 0. d belongs to the parameters as they are: start with fresh
    state when some are initialised anew.

    Ranks: decided from the reduced norm of g + d (`clip/grad_norm` is that of g); d is
    sharded over ranks as the gradient is.

    Departures: the cap on d. A step that isn't finite leaves g and d as they are; a gradient of
    zeros alone is no step.

    References: Elesedy, Hutter, "U-Clip: On-Average Unbiased Stochastic Gradient Clipping",
    https://arxiv.org/abs/2302.02971 (2023).
    """

    memory: ClassVar[tuple[str, ...]] = ("carry",)
    probes: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"carrying": FLAG, "carry": REAL}

    type: Literal["uclip"] = "uclip"
    """Selects this policy in YAML."""
    limit: Limit
    """Largest magnitude of an element, or norm of all, above 0. A number or a schedule."""
    kind: Literal["value", "norm"] = "value"
    """What is held to `limit`: every element, or the norm of all of them."""
    norm_type: NormType = 2.0
    """p of the p-norm for kind "norm", above 0; inf is the largest magnitude."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Added to the norm when dividing by it, as torch does."""
    max_carry: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    """Most that is carried, as a multiple of `limit`; null for no bound."""
    carry_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the remainder that is carried; below 1 it fades, and clipping biases again."""
    save: bool = True
    """Whether the remainder, as large as the model, is part of saved state."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The norm of gradient plus remainder over all parameters."""
        return "global", math.inf if self.kind == "value" else self.norm_type

    @property
    def saves(self) -> bool:
        """Whether the remainder is part of saved state."""
        return self.save

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing carried yet."""
        return {"carrying": torch.zeros(slots, dtype=torch.float64, device=device)}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Find what is to be cut off, and how much of it may be carried."""
        norms = stats.norms
        limit = filled(norms, self.limit, stats.step)
        exceeds = norms > limit
        most = limit * (math.inf if self.max_carry is None else self.max_carry)
        changes = (exceeds | (state["carrying"] > 0)) & stats.finite
        if self.kind == "value":
            elements = (limit, most)
        else:
            coef = coefficient(norms, limit, self.eps)
            rest = self.carry_decay * norms * (1 - coef)
            elements = (coef, torch.where(rest > most, most / rest, 1.0))
        decision = Decision(torch.ones_like(limit), limit, changes=changes, elements=elements)
        return decision, {"carrying": exceeds.double()}

    def probe(self, grad: Tensor, memory: Memory) -> Tensor:
        """Gradient plus remainder."""
        return grad + memory["carry"]

    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """Cut off, and carry what was."""
        whole = grad + memory["carry"]
        if self.kind == "value":
            limit, most = values
            used = whole.clamp(-limit, limit)
            rest = ((whole - used) * self.carry_decay).clamp(-most, most)
        else:
            coef, share = values
            used = whole * coef
            rest = (whole - used) * self.carry_decay * share
        return used, {"carry": rest}
