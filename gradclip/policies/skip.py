"""Withholding a step: because it isn't finite, or is a spike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gradclip.policies.arithmetic import arithmetic
from gradclip.policies.base import (
    COUNT,
    FLAG,
    NORM,
    REAL,
    NormPolicy,
    Policy,
    coefficient,
    refuse_endless_warmup,
)
from gradclip.policies.history import mean_and_std, median_and_mad, pushed
from gradclip.saved import Range
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["SkipNonfinite", "SkipPolicy", "SkipSpike"]

Count = Annotated[int, Field(ge=1)]


class Withholding(Policy):
    """A policy that withholds steps, and counts how many of them came in a row.

    A row ends with the next step that is taken. Steps that another policy withholds neither end nor
    lengthen it: two policies whose rows begin apart would otherwise never let the same step pass.
    Nor do steps whose norm is 0: where every other one is, a new level would never be accepted.
    """

    withholds: ClassVar[bool] = True
    counters: ClassVar[frozenset[str]] = frozenset({"withheld"})
    ranges: ClassVar[Mapping[str, Range]] = {"withheld": COUNT, "before": COUNT}

    def init(self, slots: int, device: torch.device) -> State:
        """No step withheld yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {"withheld": zeros, "before": zeros.clone()}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """More withheld before the last step than in all."""
        return {"before is above withheld": state["before"] > state["withheld"]}

    def _counted(self, stats: Stats, state: State, skip: Tensor) -> State:
        """The counts after a step. The engine keeps the old `before` if the step isn't taken."""
        withheld = state["withheld"] + skip
        return {
            "withheld": withheld,
            "before": arithmetic(withheld).where(stats.norms > 0, withheld, state["before"]),
        }


class SkipNonfinite(Withholding):
    """Withhold the optimizer step if any gradient element, on any rank, is NaN or infinite.

    The same as `on_nonfinite: skip`, as a policy that can be listed and bounded. Under a dynamic
    loss scale its overflows count too: leave room for those that find the first scale.

    State: `withheld`, such steps, and `before`, those of them before the last step that was taken,
    both of shape (1,). All restored.

    Departures: optax's apply_if_finite applies the bad update once its bound is exceeded; here the
    run stops with an error.

    References: optax.apply_if_finite.
    """

    takes_numbers: ClassVar[bool] = True

    type: Literal["skip_nonfinite"] = "skip_nonfinite"
    """Selects this policy in YAML."""
    max_consecutive: Count | None = None
    """Such steps in a row to withhold before stopping with an error; null never stops."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """None of its own: any norm that is measured shows whether gradients are finite."""
        return "global", None

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Withhold a step that isn't finite."""
        norms, xp = stats.norms, arithmetic(stats.norms)
        bad = xp.logical_not(stats.finite)
        stop = None
        if self.max_consecutive is not None:
            row = state["withheld"] - state["before"]
            stop = xp.any(bad & (row >= self.max_consecutive))
        coef, limit = xp.full_like(norms, 1.0), xp.full_like(norms, math.inf)
        decision = Decision(coef, limit, skip=bad, stop=stop)
        return decision, self._counted(stats, state, bad)


class SkipPolicy(Withholding, NormPolicy):
    """Withhold steps beyond a bound, but never more than a few in a row.

    The last norms that were withheld are kept, so that the policy can start anew from them when
    its bound on steps in a row says that they are the new level.
    """

    counters: ClassVar[frozenset[str]] = frozenset({"withheld", "held_norms"})
    ranges: ClassVar[Mapping[str, Range]] = {**Withholding.ranges, "held_norms": NORM}

    scope: Literal["global"] = "global"
    """All that is watched together: a step is withheld as a whole."""
    window: Annotated[int, Field(ge=2)] = 128
    """How many values to look back."""
    max_consecutive: Count | None = 10
    """Steps in a row to withhold before falling back; null withholds without end."""
    fallback: Literal["accept", "clip", "raise"] = "accept"
    """What then happens to the next: take it as it is, take it scaled down to the bound, or stop
    with an error. Taken steps become the new level."""

    @property
    def _holds(self) -> int:
        """Withheld values to remember; with the one then taken they fit into the window."""
        return min(self.max_consecutive or 1, self.window - 1)

    def init(self, slots: int, device: torch.device) -> State:
        """No step withheld yet."""
        state = super().init(slots, device)
        return {**state, "held_norms": state["withheld"].repeat(self._holds, 1)}

    def _bounded(
        self, stats: Stats, state: State, beyond: Tensor, bound: Tensor
    ) -> tuple[Decision, Tensor, State]:
        """Withhold a step that is beyond the bound, unless too many were in a row.

        Args:
            stats: This step's norm.
            state: With the counts and `held_norms`.
            beyond: Bool of shape (1,).
            bound: The norm above which a step is withheld, shape (1,); inf for none.

        Returns:
            The decision, whether the bound on steps in a row was reached, and the new counts.
        """
        xp = arithmetic(stats.norms)
        beyond = beyond & stats.finite
        most = math.inf if self.max_consecutive is None else self.max_consecutive
        over = beyond & (state["withheld"] - state["before"] >= most)
        skip = beyond & xp.logical_not(over)
        counts = {
            **self._counted(stats, state, skip),
            "held_norms": pushed(state["held_norms"], stats.norms, skip),
        }
        limit = bound if self.fallback != "accept" else xp.where(over, math.inf, bound)
        coef = xp.full_like(stats.norms, 1.0)
        if self.fallback == "clip":
            coef = xp.where(over, coefficient(stats.norms, bound, self.eps), 1.0)
        stop = None
        if self.fallback == "raise":
            stop = xp.any(over)
            skip = skip | over
        return Decision(coef, limit, skip=xp.any(skip), stop=stop), over, counts


class SkipSpike(SkipPolicy):
    """Withhold the step when the norm, or the loss, is far above its recent values.

    With m and s the mean and (unbiased) standard deviation of the last `window` values without
    the current one, or with `statistic: median` their median and 1.4826 times the median distance
    to it: withhold if x - m > z_threshold * s. Before `warmup_steps` values are in, nothing is
    withheld. A loss that isn't finite withholds the step, warm-up or not.

    After `max_consecutive` steps in a row the next is taken (`fallback`), and the window starts
    anew from the values that were withheld.

    State: `norms` and `losses`, the last values, of shape (window, 1); `held_norms` and
    `held_losses`, the last withheld, of shape (at most window - 1, 1); `seen`, `ready`, `withheld`
    and `before` of shape (1,). All float64; all restored, warm-up included.

    Departures: the reference keeps withheld values in its window (`include_skipped: true`), where
    one that isn't finite withholds every step until it leaves; it scales gradients by 0 instead of
    withholding, so that NaN still reaches the moments; its state isn't saved; and with windows of
    up to 5 it always withholds step 2, whose spread is that of one value.

    References: OLMo-core, skip_step_optimizer.py; Team OLMo, "2 OLMo 2 Furious",
    https://arxiv.org/abs/2501.00656 (2025).
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        **SkipPolicy.ranges,
        "norms": NORM,
        "losses": REAL,
        "held_losses": REAL,
        "seen": COUNT,
        "ready": FLAG,
    }

    takes_numbers: ClassVar[bool] = True

    type: Literal["skip_spike"] = "skip_spike"
    """Selects this policy in YAML."""
    z_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6.0
    """Standard deviations above the mean beyond which a step is withheld."""
    statistic: Literal["mean", "median"] = "mean"
    """What values are compared with: mean and deviation, or median and median distance."""
    watch: Literal["norm", "loss", "both"] = "norm"
    """What is looked at. The loss is what `clip(loss=...)` is given."""
    include_skipped: bool = False
    """Let withheld values into the window, as the reference does."""
    warmup_steps: Annotated[int, Field(ge=2)] | None = None
    """Values to take in before a step is withheld; null is half of the window, at least 8."""
    sigma_floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """Smallest standard deviation as a share of the mean, so that rounding is no spike."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        refuse_endless_warmup(self.warmup_steps or 2, self.window)
        if self.watch == "loss" and self.fallback == "clip":
            msg = (
                "has fallback 'clip' and watches the loss alone, which gives no norm to clip to; "
                "set watch to 'both', or fallback to 'accept' or 'raise'."
            )
            raise ValueError(msg)
        return self

    @property
    def counters(self) -> frozenset[str]:  # type: ignore[override]
        """What moves on withheld steps."""
        always = SkipPolicy.counters | {"held_losses"}
        return always | {"norms", "losses", "seen", "ready"} if self.include_skipped else always

    @property
    def watches_loss(self) -> bool:  # type: ignore[override]
        """Whether it needs the loss."""
        return self.watch != "norm"

    @property
    def _warmup(self) -> int:
        return self.warmup_steps or min(self.window, max(8, self.window // 2))

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        state = super().init(slots, device)
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        rows = zeros.repeat(self.window, 1)
        held = state["held_norms"].clone()
        values = {"norms": rows, "losses": rows.clone(), "held_losses": held}
        return {**state, **values, "seen": zeros.clone(), "ready": zeros.clone()}

    def contradictions(self, state: State) -> Mapping[str, Tensor]:
        """Also a warm-up that is over before there is any spread."""
        unready = (state["ready"] > 0) & (state["seen"] < 2)
        return {**super().contradictions(state), "ready is 1 with seen below 2": unready}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Tell a spike, withhold it, or take its values in."""
        norm, xp = stats.norms, arithmetic(stats.norms)
        loss = xp.full_like(norm, 0.0)
        if stats.loss is not None:
            loss = loss + stats.loss
        usable = xp.isfinite(loss)
        bound = xp.full_like(norm, math.inf)
        if self.watch != "loss":
            bound = self._bound(state, "norms")
        beyond = norm > bound
        if self.watches_loss:
            beyond = usable & (beyond | (loss > self._bound(state, "losses")))
        decision, over, counts = self._bounded(stats, state, beyond, bound)
        skipped = counts["withheld"] > state["withheld"]
        counts["held_losses"] = pushed(state["held_losses"], loss, skipped)
        if self.watches_loss:
            assert decision.skip is not None
            decision = replace(decision, skip=decision.skip | xp.any(xp.logical_not(usable)))
        took = stats.finite & usable & (norm > 0)
        if not self.include_skipped:
            took = took & xp.logical_not(skipped)
        seen = state["seen"] + took
        new = {
            "norms": pushed(state["norms"], norm, took),
            "losses": pushed(state["losses"], loss, took),
            "seen": seen,
            "ready": xp.where(seen >= self._warmup, 1.0, state["ready"]),
        }
        if not self.include_skipped:
            new = self._started_anew(new, counts, over)
        return decision, {**new, **counts}

    def _bound(self, state: State, name: str) -> Tensor:
        """Beyond which of the values of this name a step is withheld; inf during warm-up."""
        summary = mean_and_std if self.statistic == "mean" else median_and_mad
        center, spread = summary(state[name], state["seen"])
        xp = arithmetic(center)
        spread = xp.maximum(spread, self.sigma_floor * abs(center))
        return xp.where(state["ready"] > 0, center + self.z_threshold * spread, math.inf)

    def _started_anew(self, new: State, counts: State, over: Tensor) -> State:
        """Where the bound on steps in a row was reached, what was withheld is the new level."""
        xp = arithmetic(over)
        if not xp.may(over):
            return new
        level = dict(new)
        for name, held in (("norms", "held_norms"), ("losses", "held_losses")):
            rows = new[name]
            filler = xp.between(rows, 0, self.window - 1 - self._holds)
            newest = xp.between(rows, self.window - 1, self.window)
            level[name] = xp.joined([filler, counts[held], newest])
        level["seen"] = xp.full_like(new["seen"], self._holds + 1.0)
        return {name: xp.where(over, level[name], value) for name, value in new.items()}
