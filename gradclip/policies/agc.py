"""AGC: bound the gradient of each unit by the size of its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from gradclip.errors import ConfigError
from gradclip.policies.base import AdaptivePolicy, filled
from gradclip.policies.schedule import Limit
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["AGC"]


class AGC(AdaptivePolicy):
    """Adaptive gradient clipping: a unit's gradient is held to a share of the norm of its weights.

    With w_u and g_u the weights and gradient of a unit u:
    W = max(|w_u|, eps), limit = clip_factor * W, c = 1 if |g_u| <= limit, else
    limit / max(|g_u|, grad_floor).

    Units: a weight's slices along dim 0 (the rows of a Linear, the filters of a Conv2d); a vector
    or a scalar is one unit. `unit_dim` names another dim for some (1 for transposed convolutions
    and GPT-2's Conv1D, or for the columns of an embedding), `axes: optax` takes the rule of the
    JAX layout. Scope "parameter" takes whole tensors instead.

    State: none. Ranks: norms of weights and gradients travel in one message, so a unit may be
    spread over ranks.

    Departures: none from timm. With `eps: 0` a unit whose weights are 0 can never be trained, as
    in composer; the default keeps it alive.

    References: Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", https://arxiv.org/abs/2102.06171 (2021); timm.utils.agc; for `axes: optax`
    optax.adaptive_grad_clip.
    """

    uses_weights: ClassVar[bool] = True

    type: Literal["agc"] = "agc"
    """Selects this policy in YAML."""
    clip_factor: Limit = 0.01
    """Largest norm of a unit's gradient as a share of the norm of its weights, above 0."""
    scope: Scope = "unit"
    """What one coefficient covers: a unit, or a whole parameter, group, or all parameters."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """Smallest norm that a unit's weights are taken to have, so that zeros can be trained."""
    grad_floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Smallest norm that a clipped gradient is divided by."""
    unit_dim: dict[str, int] = Field(default={})
    """Pattern of parameter names: the dim whose indices are its units; the first match counts."""
    axes: Literal["torch", "optax"] = "torch"
    """Where units are: dim 0, or as optax takes them (the last dim; for 3 dims all but dim 0)."""
    exclude: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Patterns of parameter names to leave alone; the paper leaves out the last linear layer."""

    @property
    def excluded(self) -> Sequence[str]:
        """Patterns of parameter names to leave alone."""
        return self.exclude

    def unit_dims(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The dims that distinguish the units of a parameter.

        Raises:
            ConfigError: If `unit_dim` names a dim that it doesn't have, or optax has no rule.
        """
        named = [d for match, d in self.unit_dim.items() if fnmatch.fnmatchcase(name, match)]
        if named:
            dim = named[0] + len(shape) if named[0] < 0 else named[0]
            if not 0 <= dim < len(shape):
                msg = (
                    f"unit_dim of 'agc' is {named[0]} for {name!r} of shape {shape}; allowed: "
                    f"{-len(shape)} to {len(shape) - 1}. Correct it."
                )
                raise ConfigError(msg)
            return dim, dim + 1
        if self.axes == "torch":
            return super().unit_dims(name, shape)
        if sum(n > 1 for n in shape) <= 1:
            return 0, 0
        if len(shape) > 5:
            msg = (
                f"axes of 'agc' is 'optax', which has no rule for the {len(shape)} dims of "
                f"{name!r}; allowed: up to 5. Name its unit_dim."
            )
            raise ConfigError(msg)
        return (1, len(shape)) if len(shape) < 4 else (len(shape) - 1, len(shape))

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each unit to its share."""
        assert stats.weights is not None
        factor = filled(stats.norms, self.clip_factor, stats.step)
        limit = self.bounded(factor * stats.weights.clamp(min=self.eps), stats)
        exceeds = (stats.norms > limit) & torch.isfinite(stats.norms)
        coef = torch.where(exceeds, limit / stats.norms.clamp(min=self.grad_floor), 1.0)
        return Decision(coef, limit), state
