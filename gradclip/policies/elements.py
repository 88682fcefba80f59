"""Rules on single elements, and the one that needs nothing else: clamping to a value."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradclip.policies.base import Policy, filled
from gradclip.policies.schedule import Limit
from gradclip.types import Decision, Memory, Scope, State, Stats

__all__ = ["ClipByValue", "ElementPolicy"]


class ElementPolicy(Policy):
    """Changes elements one by one, so it stands last in its list: norms after it are unknown.

    `decide` says which slots change (`Decision.changes`) and gives numbers for each slot
    (`Decision.elements`); `clip` then gets those of one slot, as 0-d tensors. All of it works in
    units of the gradient, whatever factor the gradients still carry, and in float32, or float64
    where the gradient is.

    What it remembers of every element is sharded over ranks as the gradient is. It stays as it was
    on a step that is withheld, isn't finite, or has no gradient at all.
    """

    memory: ClassVar[tuple[str, ...]] = ()
    """Names of what it remembers of every element: float32, zeros before the first step."""
    probes: ClassVar[bool] = False
    """Whether it decides on norms of `probe`, not of the gradient."""
    alone: ClassVar[bool] = False
    """Whether no other policy of its list may scale gradients: `probe` doesn't scale with them."""
    clamps: ClassVar[bool] = False
    """Whether `clip` is a clamp to the first of its values and no more."""

    @property
    def borrows(self) -> str | None:
        """The name of an optimizer's state that it uses in place of its first memory, if any."""
        return None

    @property
    def saves(self) -> bool:
        """Whether the memory of elements is part of the saved state."""
        return bool(self.memory)

    def probe(self, grad: Tensor, memory: Memory) -> Tensor:
        """What to measure before deciding, of the shape of the gradient; NaN where that is.

        Scaling the gradient has to scale it too, unless the policy is `alone`.
        """
        del memory
        return grad

    @abstractmethod
    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """Clip a chunk of a gradient; changes nothing in place.

        Args:
            grad: Any number of elements of one parameter.
            memory: What is remembered of them, of the same shape.
            values: What `decide` gave for their slot, 0-d each.

        Returns:
            The clipped chunk, and its memory after this step.
        """


class ClipByValue(ElementPolicy):
    """Clamp every element to [-clip_value, clip_value]. Changes the direction; stands last.

    Whether anything exceeded the value is measured (an inf-norm) before anything is written.
    NaN stays NaN.
    """

    clamps: ClassVar[bool] = True

    type: Literal["value"] = "value"
    """Selects this policy in YAML."""
    clip_value: Limit
    """Largest magnitude of an element, above 0, in units of the gradient; `.inf` only measures. A
    number or a schedule."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The largest magnitude over all parameters."""
        return "global", math.inf

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Clamp; the coefficient stays 1."""
        limit = filled(stats.norms, self.clip_value, stats.step)
        changes = stats.norms > limit
        return Decision(torch.ones_like(limit), limit, changes=changes, elements=(limit,)), state

    def clip(
        self, grad: Tensor, memory: Memory, values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Memory]:
        """Clamp."""
        return grad.clamp(-values[0], values[0]), memory
