"""A configuration that decides step after step on norms alone, as a clipper would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradclip.config import ClipConfig
from gradclip.decide import decide_all, take_numbers
from gradclip.errors import ConfigError, NonFiniteError, SkipLimitError
from gradclip.plan.plan import Rule
from gradclip.policies import ElementPolicy, Policy
from gradclip.policies.arithmetic import numbers_of, quiet
from gradclip.stops import refuse_stop
from gradclip.tools.curves import Bools, Floats, Steps
from gradclip.tools.trace import TraceHeader

__all__ = ["Decisions", "Player", "refuse_unplayable"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decisions:
    """What one configuration decided on n steps in a row.

    Attributes:
        limit: Float64 of shape (n,), the smallest limit; inf for none.
        coef: Float64 of shape (n, slots), what gradients are multiplied by; 1 where the step is
            withheld.
        skipped: Bool of shape (n,), whether the step is withheld.
        stopped: The error that would have ended training at the step after these; None for none.
    """

    limit: Floats
    coef: Floats
    skipped: Bools
    stopped: str | None


class Player:
    """A configuration with its adaptive states, deciding step after step as in training.

    Args:
        config: Without groups, and of policies that need one norm only (`refuse_unplayable`).
        norm_type: p of the norms.
        slots: The number of slots, which all get the same norms; each has its own state.
    """

    def __init__(self, config: ClipConfig, norm_type: float, slots: int = 1) -> None:
        names = tuple(str(slot) for slot in range(slots))
        owner = torch.arange(slots, dtype=torch.int64, device="cpu")
        self._rules = [
            Rule((0, i), p, names, tuple(range(slots)), None, owner, same_slots=True)
            for i, p in enumerate(config.policies)
        ]
        self._states = [policy.init(slots, _CPU) for policy in config.policies]
        # Numbers of the host, as a clipper uses them on a CPU: the same bits, many times faster.
        self._in_numbers = slots == 1 and take_numbers(self._rules)
        if self._in_numbers:
            self._states = [numbers_of(state) for state in self._states]
        self._on_nonfinite = config.on_nonfinite
        self._watches_loss = any(policy.watches_loss for policy in config.policies)
        self._norm_type, self._slots = norm_type, slots
        self._not_taken = 0

    def decide(self, step: Steps, norms: Floats, loss: Floats) -> Decisions:
        """Decide on the next steps.

        Args:
            step: Shape (n,), their numbers, for schedules.
            norms: Shape (n,), before clipping; NaN where not finite.
            loss: Shape (n,), for policies that watch the loss.
        """
        limits, coefs, skips = [], [], []
        stopped: str | None = None
        raises = self._on_nonfinite == "raise"
        with torch.inference_mode(), quiet():
            for at, norm, one_loss in zip(*map(self._each, (step, norms, loss)), strict=True):
                where = partial("step {:.0f}: a gradient is NaN or infinite.".format, at)
                verdict, states = decide_all(
                    self._rules,
                    {self._norm_type: norm if self._in_numbers else norm.expand(self._slots)},
                    self._states,
                    step=at - self._not_taken,
                    loss=one_loss if self._watches_loss else None,
                    skip_nonfinite=self._on_nonfinite == "skip",
                )
                skipped = verdict.skip is not None and bool(verdict.skip)
                try:
                    if skipped or raises:
                        refuse_stop(verdict, self._rules, where, raises=raises)
                except (NonFiniteError, SkipLimitError) as error:
                    stopped = str(error)
                    break
                self._states = states
                self._not_taken += skipped or not bool(verdict.finite)
                limits.append(verdict.limit)
                coefs.append(verdict.coef)
                skips.append(skipped)
        skipped_at = np.array(skips, dtype=np.bool_)
        coef = _joined(coefs).reshape(-1, self._slots)
        coef = np.where(skipped_at[:, None], 1.0, coef)
        return Decisions(limit=_joined(limits), coef=coef, skipped=skipped_at, stopped=stopped)

    def _each(self, values: NDArray[Any]) -> Iterable[Any]:
        """Values one by one: numbers, or 0-d tensors."""
        wide = values.astype(np.float64)
        return wide if self._in_numbers else torch.from_numpy(wide).unbind()


def refuse_unplayable(config: ClipConfig, header: TraceHeader, name: str) -> None:
    """Refuse a configuration that needs more than one norm a step.

    Raises:
        ConfigError: Names the policy, and says what to do.
    """
    if config.groups:
        msg = (
            f"{name}: groups can't be replayed; a trace holds one norm a step, that of all "
            "parameters together. Remove groups to replay the main list of policies."
        )
        raise ConfigError(msg)
    for index, policy in enumerate(config.policies):
        if (lacks := _lacks(policy, header)) is not None:
            msg = f"{name}: policies[{index}], {policy.type!r}, can't be replayed: {lacks}"
            raise ConfigError(msg)


def _joined(values: list[Any]) -> Floats:
    """Values of one step each in one array: numbers, or tensors of one shape."""
    if values and isinstance(values[0], torch.Tensor):
        return torch.stack(values).numpy()
    return np.array(values, dtype=np.float64)


def _lacks(policy: Policy, header: TraceHeader) -> str | None:
    """What a policy needs that a trace doesn't hold, and what to do; None if nothing."""
    scope, norm_type = policy.measured
    if isinstance(policy, ElementPolicy):
        return "it changes elements one by one, and a trace holds none. Leave it out."
    if policy.uses_weights:
        return "it needs the norms of the parameters themselves. Leave it out."
    if scope != "global":
        return (
            f"its scope is {scope!r}, and a trace holds one norm a step, that of all parameters "
            "together; allowed: scope 'global'. Set that, or leave the policy out."
        )
    if policy.uses_sizes:
        return "it needs the number of elements, which a trace hasn't. Leave it out."
    if norm_type not in (None, header.norm_type):
        return (
            f"its norm_type is {norm_type:g}, and the norms of the trace are of p = "
            f"{header.norm_type:g}; allowed: that. Set norm_type to it, or take another trace."
        )
    return None
