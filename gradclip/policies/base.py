"""What every policy is: a frozen, validated model that is its own configuration."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gradclip.types import Decision, Scope, State, Stats

__all__ = ["STRICT", "MaxNorm", "NormPolicy", "Policy", "coefficient"]

MaxNorm = Annotated[float, Field(gt=0)]
"""A limit on a norm. Above 0, so that it can neither freeze nor flip; inf only measures."""


STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    use_attribute_docstrings=True,
    ser_json_inf_nan="constants",
)
"""How every configuration model behaves: nothing is guessed, nothing unknown is let through."""


class Policy(BaseModel):
    """Pure mathematics: reduced statistics and state in, decision and state out.

    A field is the configuration: one field is one YAML key and one keyword. The engine measures,
    reduces and applies, and it drops the new state of a step that is withheld or not finite, so
    a policy needs to know neither about ranks nor about NaN.
    """

    model_config = STRICT

    @property
    @abstractmethod
    def measured(self) -> tuple[Scope, float | None]:
        """The scope and the p of the p-norm this policy decides on; None if it needs no norm."""

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step, for so many slots; empty for a fixed rule."""
        del slots, device
        return {}

    @abstractmethod
    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """This step's decision and the state after it; changes nothing in place."""


class NormPolicy(Policy):
    """A policy that holds the norm of each slot to a limit."""

    scope: Scope = "global"
    """What one coefficient covers: all parameters, an optimizer's group, or one parameter."""
    norm_type: Annotated[float, Field(gt=0)] = 2.0
    """p of the p-norm, above 0; inf is the largest magnitude."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Added to the norm when dividing by it, as torch does."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The scope and the p of this policy's norms."""
        return self.scope, self.norm_type


def coefficient(norms: Tensor, limit: Tensor, eps: float) -> Tensor:
    """Exactly 1 at or below the limit, else limit / (norm + eps).

    A non-finite norm gets 1: multiplying can't repair it, and `on_nonfinite` decides.

    Args:
        norms: Shape (slots,), float64.
        limit: Broadcastable to it; inf never clips.
        eps: As in `torch.nn.utils.clip_grad_norm_`, in units of the norm.

    Returns:
        Shape (slots,), float64, in (0, 1].
    """
    exceeds = (norms > limit) & torch.isfinite(norms)
    return torch.where(exceeds, limit / (norms + eps), 1.0)
