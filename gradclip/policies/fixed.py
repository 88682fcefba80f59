"""Limits that the user gives: on a norm, or on a root mean square."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.base import NormPolicy, Policy, coefficient, filled
from gradclip.policies.schedule import Limit
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["ClipByNorm", "ClipByRMS"]


class ClipByNorm(NormPolicy):
    """Scale gradients whose p-norm exceeds `max_norm` down to it.

    n = (sum |g|^p)^(1/p); c = 1 if n <= max_norm, else max_norm / (n + eps).

    With `budget`, each of K slots has a share of max_norm: max_norm / K^(1/p) ("uniform"), or
    max_norm * (D_i / D)^(1/p) by its D_i of D elements ("size").

    Departures: torch also scales by up to 1e-6 / max_norm when n lies within 1e-6 below the
    limit; here a gradient at or below the limit keeps its bits.

    References: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural
    networks", https://arxiv.org/abs/1211.5063 (2012).
    """

    takes_numbers: ClassVar[bool] = True

    type: Literal["norm"] = "norm"
    """Selects this policy in YAML."""
    max_norm: Limit
    """Largest norm of a slot, above 0; `.inf` only measures. A number or a schedule."""
    budget: Literal["uniform", "size"] | None = None
    """Share `max_norm` among the slots, so that the norm of all stays at or below it: equally, or
    by their elements; null gives each slot all of it."""

    @model_validator(mode="after")
    def _has_something_to_share(self) -> Self:
        if self.budget is not None and self.scope == "global":
            msg = (
                f"has budget {self.budget!r} with scope 'global', one slot with nothing to share; "
                "set scope to 'parameter', 'group' or 'unit', or remove budget."
            )
            raise ValueError(msg)
        return self

    @property
    def uses_sizes(self) -> bool:  # type: ignore[override]
        """Whether the number of elements of each slot is asked for."""
        return self.budget == "size"

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each slot to `max_norm`, or to its share."""
        limit = filled(stats.norms, self.max_norm, stats.step)
        if self.budget == "uniform":
            limit = limit / arithmetic(limit).count(limit) ** (1 / self.norm_type)
        elif self.budget == "size":
            assert stats.sizes is not None
            limit = limit * (stats.sizes / stats.sizes.sum()) ** (1 / self.norm_type)
        return Decision(coefficient(stats.norms, limit, self.eps), limit), state


class ClipByRMS(Policy):
    """Scale gradients whose root mean square exceeds `max_rms` down to it.

    r = sqrt(mean g^2) over a slot; c = 1 if r <= max_rms, else max_rms / r: the norm of a slot of
    D elements is held to max_rms * sqrt(D), whatever its size.

    References: optax.clip_by_block_rms.
    """

    type: Literal["rms"] = "rms"
    """Selects this policy in YAML."""
    max_rms: Limit
    """Largest root mean square of a slot, above 0; `.inf` only measures. A number or a schedule."""
    scope: Scope = "parameter"
    """What one coefficient covers: all parameters, an optimizer's group, one parameter, or one unit
    (a row of a matrix, a filter of a convolution, a whole vector)."""

    uses_sizes: ClassVar[bool] = True

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The scope, and the 2-norm that the root mean square follows from."""
        return self.scope, 2.0

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Hold each slot to `max_rms`; the limit is given as a norm."""
        assert stats.sizes is not None
        limit = filled(stats.norms, self.max_rms, stats.step) * stats.sizes.sqrt()
        return Decision(coefficient(stats.norms, limit, 0.0), limit), state
