"""SPAM: clip elements that are unusual beside their own past."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gradclip.policies.base import COUNT, SHARE, SQUARE
from gradclip.policies.elements import ElementPolicy
from gradclip.saved import Range
from gradclip.types import Decision, Memory, Scope, State, Stats

__all__ = ["Spam"]

_LARGEST = torch.finfo(torch.float32).max


class Spam(ElementPolicy):
    """Hold every element to sqrt(theta) times the root of its own running mean square.

    With v the running mean of the squares of an element's gradients before this step,
    bias-corrected: where g^2 > theta * v, g becomes sign(g) * sqrt(theta * v). Then v takes in
    the clipped g: v' = decay * v + (1 - decay) * g^2, divided by 1 - decay^t for the correction.

    v is the optimizer's own second moment where it has one (`exp_avg_sq` with `step` and `betas`:
    Adam, AdamW, NAdam, RAdam), so that nothing is remembered twice; `decay` is then the
    optimizer's second beta. Otherwise it is kept here. Under DeepSpeed it always is: its
    partitions have no moment for each parameter.

    AdamWClip (elements above k running RMS) is `theta: k * k`.

    State: `seen` (steps taken in) and `weight` (decay^seen, a running product), of shape (slots,)
    and float64; where v is kept here, `square`, one float32 for each element. All of it is
    restored; with `save: false` it starts anew, warm-up included.

    Ranks: whether any element is clipped is decided from one reduced maximum; v is sharded over
    ranks as the gradient is.

    Departures: an element that never had a gradient (v = 0: the row of an embedding not seen so
    far) is left alone, where the reference clips it to 0, for ever if the optimizer's v is all it
    goes by; AdamWClip clips its first gradient to 1e-10. v is bias-corrected, so that theta means
    the same from the start (`bias_correction: false` is the reference). Moments are reset only
    with `reset_every`, and only where v is kept here: resetting an optimizer is no concern of a
    clipper. With A = `warmup_steps` the reference clips first in its A-th step, and waits A steps
    after each reset; here A steps go by both times, so the first clip may come one step later. A
    step that isn't finite leaves v alone. A gradient of zeros alone is no step.

    References: Huang, Zhu, Jin, Liu, Wang, Liu, "SPAM: Spike-Aware Adam with Momentum Reset for
    Stable LLM Training", https://arxiv.org/abs/2501.06842 (2025); code: TianjinYellow/
    SPAM-Optimizer e8185fb; AdamWClip 0.1.4.
    """

    memory: ClassVar[tuple[str, ...]] = ("square",)
    probes: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"seen": COUNT, "weight": SHARE, "square": SQUARE}

    type: Literal["spam"] = "spam"
    """Selects this policy in YAML."""
    theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5000.0
    """An element whose square exceeds this many times its running mean square is clipped; 5000 is
    71 times its root mean square."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Weight of the past in the running mean square, where it is kept here."""
    warmup_steps: Annotated[int, Field(ge=1)] = 20
    """Steps before the first element is clipped."""
    moment: Literal["optimizer", "own"] = "optimizer"
    """Where the running mean square comes from: the optimizer, for the parameters that it has one
    for, or always kept here."""
    bias_correction: bool = True
    """Divide the running mean square by 1 - decay^t, as Adam does; false is the reference."""
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-15
    """A root mean square at or below this is no history: such elements are left alone."""
    reset_every: Annotated[int, Field(ge=1)] | None = None
    """Every so many optimizer steps the running mean square starts anew, warm-up included; null
    never. Only with `moment: own`."""
    save: bool = True
    """Whether a mean square kept here is part of saved state."""

    @model_validator(mode="after")
    def _resets_what_is_its_own(self) -> Self:
        if self.reset_every is not None and self.moment == "optimizer":
            msg = (
                "has reset_every with moment 'optimizer', whose moment isn't this policy's to "
                "reset; set moment to 'own', or remove reset_every."
            )
            raise ValueError(msg)
        return self

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The largest ratio of an element to its running root mean square, of all parameters."""
        return "global", math.inf

    @property
    def borrows(self) -> str | None:
        """The optimizer's running mean square."""
        return "exp_avg_sq" if self.moment == "optimizer" else None

    @property
    def saves(self) -> bool:
        """Whether a mean square kept here is part of saved state."""
        return self.save

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {"seen": zeros, "weight": torch.ones_like(zeros)}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Clip if some element exceeds its bound; say how the running mean square moves."""
        seen, before = state["seen"], state["weight"]
        if self.reset_every is not None:
            anew = torch.remainder(stats.step + 1, self.reset_every) == 0
            seen, before = torch.where(anew, 0.0, seen), torch.where(anew, 1.0, before)
        weight = before * self.decay
        if self.bias_correction:
            rate = (1 - self.decay) / (1 - weight)
            keep = 1 - rate
        else:
            rate = torch.full_like(weight, 1 - self.decay)
            keep = torch.where(seen == 0, 0.0, torch.full_like(seen, self.decay))
        root = math.sqrt(self.theta)
        changes = (seen >= self.warmup_steps) & (stats.norms > root)
        none = torch.full_like(weight, math.inf)
        decision = Decision(
            torch.ones_like(weight),
            none,
            changes=changes,
            elements=(torch.where(changes, root, none), keep, rate),
        )
        return decision, {"seen": seen + 1, "weight": weight}

    def probe(self, grad: Tensor, memory: Memory) -> Tensor:
        """|g| / sqrt(v); 0 without a history."""
        square = memory["square"]
        return grad.abs() * torch.where(self._known(square), square.rsqrt(), 0.0)

    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """Hold elements with a history to their bound, and take their squares in."""
        root, keep, rate = values
        square = memory["square"]
        bound = root * square.sqrt()
        clipped = torch.where(self._known(square), grad.clamp(-bound, bound), grad)
        taken = clipped.square().clamp(max=_LARGEST)
        return clipped, {"square": keep * square + rate * taken}

    def _known(self, square: Tensor) -> Tensor:
        return square > self.floor**2
