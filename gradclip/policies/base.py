"""What every policy is: a frozen, validated model that is its own configuration."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gradclip.models import Model
from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.schedule import Limit, Schedule
from gradclip.saved import LARGEST_COUNT, Range
from gradclip.types import Decision, Scope, State, Stats

__all__ = [
    "COUNT",
    "FLAG",
    "NORM",
    "REAL",
    "RUN",
    "SHARE",
    "SQUARE",
    "AdaptivePolicy",
    "NormPolicy",
    "NormType",
    "Policy",
    "after",
    "coefficient",
    "filled",
    "fixed",
    "refuse_endless_warmup",
]

COUNT = Range(0, LARGEST_COUNT, whole=True)
"""How many."""
RUN = Range(-LARGEST_COUNT, LARGEST_COUNT, whole=True)
"""How many in a row: above, or, negative, below."""
FLAG = Range(0, 1, whole=True)
"""0 or 1."""
SHARE = Range(0, 1)
"""A weight."""
NORM = Range(0, 1e100)
"""A norm, or a mean of some; sums of the squares of larger ones would not be finite."""
SQUARE = Range(0, 1e200)
"""A square of norms."""
REAL = Range(-1e100, 1e100)
"""Anything."""


def _read(norm_type: Any) -> Any:
    """The number that a word such as "inf" stands for, which torch takes too."""
    word = norm_type.lower().lstrip("+.") if isinstance(norm_type, str) else None
    return math.inf if word in ("inf", "infinity") else norm_type


NormType = Annotated[float, Field(gt=0), BeforeValidator(_read)]
"""The p of a p-norm."""


class Policy(Model):
    """Pure mathematics: reduced statistics and state in, decision and state out.

    A field has the same name in Python and in YAML. The engine measures, reduces and applies, and
    it drops the new state of a step that is withheld or not finite, so a policy needs to know
    neither about ranks nor about NaN.
    """

    counters: ClassVar[frozenset[str]] = frozenset()
    """State that also moves on a step that is withheld or not finite: counts of such steps."""
    withholds: ClassVar[bool] = False
    """Whether it can withhold a step. It then sees the norm of the watched parameters alone."""
    uses_weights: ClassVar[bool] = False
    """Whether it needs the norms of the parameters themselves."""
    uses_sizes: ClassVar[bool] = False
    """Whether it needs the number of elements of each slot."""
    uses_rate: ClassVar[bool] = False
    """Whether it needs the optimizer's rate, and the norms of the parameters where there is one."""
    takes_numbers: ClassVar[bool] = False
    """Whether `decide` works on numbers of the host, too (`gradclip.policies.arithmetic`)."""
    watches_loss: ClassVar[bool] = False
    """Whether it needs the loss, which `clip(loss=...)` is given."""

    ranges: ClassVar[Mapping[str, Range]] = {}
    """What each entry of its state, and of its memory of elements, may hold when it is loaded."""

    type: str
    """Selects this policy in YAML."""
    after: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps to wait: until then the policy neither clips nor learns."""

    @property
    @abstractmethod
    def measured(self) -> tuple[Scope, float | None]:
        """The scope and the p of the p-norm this policy decides on; None if it needs no norm."""

    @property
    def excluded(self) -> Sequence[str]:
        """Patterns of parameter names that this policy leaves alone."""
        return ()

    def unit_dims(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The dims whose indices distinguish the units of a parameter.

        Units are slices along dim 0; a vector or a scalar is one unit.

        Returns:
            The first such dim, and the one after the last; (0, 0) if there is one unit.
        """
        del name
        return (0, 1) if len(shape) > 1 else (0, 0)

    def init(self, slots: int, device: torch.device) -> State:
        """The state before the first step, for a number of slots; empty for a fixed rule."""
        del slots, device
        return {}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """What no steps lead to, in a state whose entries are within `ranges`.

        Returns:
            By what is wrong, the slots for which it is: bool of shape (slots,).
        """
        del state
        return {}

    @abstractmethod
    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Decide on one step; changes nothing in place.

        Args:
            stats: What was measured, for each of the policy's slots.
            state: From `init`, or the state after the step before.

        Returns:
            The decision and the state after this step.
        """


class NormPolicy(Policy):
    """A policy that holds the norm of each slot to a limit."""

    scope: Scope = "global"
    """What one coefficient covers: all parameters, an optimizer's group, one parameter, or one unit
    (a row of a matrix, a filter of a convolution, a whole vector)."""
    norm_type: NormType = 2.0
    """p of the p-norm, above 0; inf is the largest magnitude."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Added to the norm when dividing by it, as torch does."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The scope and the p of this policy's norms."""
        return self.scope, self.norm_type


class AdaptivePolicy(NormPolicy):
    """A policy that adapts its limit, between a floor and a ceiling that the user may give."""

    max_norm: Limit | None = None
    """The limit never exceeds this. During warm-up it is the only limit; null for none."""
    min_norm: Limit | None = None
    """Norms at or below this are never clipped, whatever the policy finds; null for none."""

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> Self:
        low, high = self.min_norm, self.max_norm
        if isinstance(low, float) and isinstance(high, float) and low > high:
            msg = f"has min_norm {low} above max_norm {high}; allowed: at most max_norm. Lower it."
            raise ValueError(msg)
        return self

    def bounded(self, limit: Tensor, stats: Stats) -> Tensor:
        """A limit of shape (slots,), held between floor and ceiling; the ceiling wins."""
        xp = arithmetic(limit)
        if self.min_norm is not None:
            limit = xp.maximum(limit, fixed(limit, self.min_norm, stats))
        if self.max_norm is not None:
            limit = xp.minimum(limit, fixed(limit, self.max_norm, stats))
        return limit


def refuse_endless_warmup(warmup_steps: int, window: int) -> None:
    """Refuse a warm-up that a window of past values could never end.

    Raises:
        ValueError: If `warmup_steps` is above `window`, both in values.
    """
    if warmup_steps > window:
        msg = (
            f"has warmup_steps {warmup_steps} above window {window}, which never holds so many "
            "values; allowed: at most window. Lower it or widen the window."
        )
        raise ValueError(msg)


def after(step: int, policy: Policy) -> Policy:
    """The same policy, which neither clips nor learns before that many optimizer steps.

    Raises:
        ConfigError: If `step` isn't an integer of at least 0.
    """
    return type(policy)(**{**dict(policy), "after": step})


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
    exceeds = (norms > limit) & (norms < math.inf)
    return arithmetic(norms).where(exceeds, limit / (norms + eps), 1.0)


def filled(like: Tensor, value: float | Schedule, step: Tensor) -> Tensor:
    """A limit at a step, in the shape, dtype and device of another tensor."""
    if not isinstance(value, Schedule):
        return arithmetic(like).full_like(like, value)
    limit = value.at(step)
    return limit.expand_as(like) if isinstance(like, Tensor) else limit


def fixed(like: Tensor, norm: float | Schedule, stats: Stats) -> Tensor:
    """A norm that the user gave, of gradients as they are, in the units of `stats.norms`."""
    limit = filled(like, norm, stats.step)
    return limit if stats.share == 1 else limit / stats.share
