"""Withholding a step: because it isn't finite, is a spike, or is too large."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gradclip.policies.base import Policy, coefficient, filled
from gradclip.policies.schedule import Limit
from gradclip.policies.window import mean_and_std, median_and_mad, percentile_of_last, pushed
from gradclip.types import Decision, Scope, State, Stats

__all__ = ["SkipLarge", "SkipNonfinite", "SkipSpike"]

Count = Annotated[int, Field(ge=1)]


class SkipNonfinite(Policy):
    """Withhold the optimizer step if any gradient element, on any rank, is NaN or infinite.

    The same as `on_nonfinite: skip`, as a policy that can be listed and bounded.

    State: `streak`, such steps in a row, of shape (1,).

    Departures: optax's apply_if_finite applies the bad update once its bound is exceeded; here the
    run stops with an error.
    """

    withholds: ClassVar[bool] = True
    counters: ClassVar[frozenset[str]] = frozenset({"streak"})

    type: Literal["skip_nonfinite"] = "skip_nonfinite"
    """Selects this policy in YAML."""
    max_consecutive: Count | None = None
    """Such steps in a row to withhold before stopping with an error; null never stops."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """Whatever norm is measured anyway tells whether gradients are finite."""
        return "global", None

    def init(self, slots: int, device: torch.device) -> State:
        """No such step yet."""
        return {"streak": torch.zeros(slots, dtype=torch.float64, device=device)}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Withhold a step that isn't finite."""
        bad = stats.finite.logical_not()
        streak = torch.where(bad, state["streak"] + 1, 0.0)
        ones = torch.ones_like(stats.norms)
        stop = None if self.max_consecutive is None else (streak > self.max_consecutive).any()
        decision = Decision(ones, torch.full_like(ones, torch.inf), skip=bad, stop=stop)
        return decision, {"streak": streak}


class _SkipPolicy(Policy):
    """Withhold steps beyond a bound, but never more than a few in a row.

    The last norms that were withheld are kept, so that the policy can start anew from them when
    its bound on steps in a row says that they are the new level.
    """

    withholds: ClassVar[bool] = True
    counters: ClassVar[frozenset[str]] = frozenset({"streak", "held_norms"})

    norm_type: Annotated[float, Field(gt=0)] = 2.0
    """p of the p-norm, above 0; inf is the largest magnitude."""
    max_consecutive: Count | None = 10
    """Steps in a row to withhold before falling back; null withholds without end."""
    fallback: Literal["accept", "clip", "raise"] = "accept"
    """What then happens to the next: take it as it is, take it scaled down to the bound, or stop
    with an error. Taken steps become the new level."""

    @property
    def measured(self) -> tuple[Scope, float | None]:
        """The norm of all that is watched: a step is withheld as a whole."""
        return "global", self.norm_type

    @property
    def _holds(self) -> int:
        return self.max_consecutive or 1

    def init(self, slots: int, device: torch.device) -> State:
        """No step withheld yet."""
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        return {"streak": zeros, "held_norms": zeros.repeat(self._holds, 1)}

    def _bounded(
        self, stats: Stats, state: State, beyond: Tensor, bound: Tensor
    ) -> tuple[Decision, Tensor, State]:
        """Withhold a step that is beyond the bound, unless too many were in a row.

        Args:
            stats: This step's norm.
            state: With `streak` and `held_norms`.
            beyond: Bool of shape (1,).
            bound: The norm above which a step is withheld, shape (1,); inf for none.

        Returns:
            The decision, whether the bound on steps in a row was reached, and the new counts.
        """
        beyond = beyond & stats.finite
        over = torch.zeros_like(beyond)
        if self.max_consecutive is not None:
            over = beyond & (state["streak"] >= self.max_consecutive)
        skip = beyond & over.logical_not()
        streak = torch.where(skip, state["streak"] + 1, 0.0)
        counts = {
            "streak": torch.where(stats.finite, streak, state["streak"]),
            "held_norms": pushed(state["held_norms"], stats.norms, skip),
        }
        limit = torch.where(over, torch.inf, bound)
        coef = torch.ones_like(stats.norms)
        if self.fallback == "clip":
            limit = bound
            coef = torch.where(over, coefficient(stats.norms, bound, 1e-6), 1.0)
        stop = None
        if self.fallback == "raise":
            stop = over.any()
            skip = skip | over
        return Decision(coef, limit, skip=skip.any(), stop=stop), over, counts


class SkipSpike(_SkipPolicy):
    """Withhold the step when the norm, or the loss, is far above its recent values.

    With m and s the mean and (unbiased) standard deviation of the last `window` values without
    the current one, or with `statistic: median` their median and 1.4826 times the median distance
    to it: withhold if x - m > z_threshold * s. Before `warmup_steps` values are in, nothing is
    withheld. A loss that isn't finite withholds the step, warm-up or not.

    After `max_consecutive` steps in a row the next is taken (`fallback`), and the window starts
    anew from the values that were withheld.

    State: `norms` and `losses`, the last values, of shape (window, 1); `held_norms` and
    `held_losses`, the last withheld; `seen`, `ready` and `streak` of shape (1,). All restored.

    Departures: the reference keeps withheld values in its window (`include_skipped: true`), where
    one that isn't finite withholds every step until it leaves; it scales gradients by 0 instead of
    withholding, so that NaN still reaches the moments; its state isn't saved; and with windows of
    up to 5 it always withholds step 2, whose spread is that of one value.

    References: OLMo-core, skip_step_optimizer.py; Team OLMo, "2 OLMo 2 Furious",
    https://arxiv.org/abs/2501.00656 (2025).
    """

    type: Literal["skip_spike"] = "skip_spike"
    """Selects this policy in YAML."""
    window: Annotated[int, Field(ge=2)] = 128
    """How many values to look back."""
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

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if (self.warmup_steps or 2) > self.window:
            msg = (
                f"has warmup_steps {self.warmup_steps} above window {self.window}, which never "
                "holds so many values; allowed: at most window. Lower it or widen the window."
            )
            raise ValueError(msg)
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
        always = frozenset({"streak", "held_norms", "held_losses"})
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
        own = {"norms": rows, "losses": rows.clone(), "held_losses": held}
        return {**state, **own, "seen": zeros.clone(), "ready": zeros.clone()}

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Tell a spike, withhold it, or take its values in."""
        norm = stats.norms
        loss = torch.zeros_like(norm) if stats.loss is None else stats.loss.expand_as(norm)
        ready = state["ready"] > 0
        beyond = torch.zeros_like(ready)
        bound = torch.full_like(norm, torch.inf)
        if self.watch != "loss":
            bound = torch.where(ready, self._bound(state["norms"], state["seen"]), torch.inf)
            beyond = beyond | (norm > bound)
        if self.watches_loss:
            highest = torch.where(ready, self._bound(state["losses"], state["seen"]), torch.inf)
            beyond = beyond | (loss > highest) | torch.isfinite(loss).logical_not()
        decision, over, counts = self._bounded(stats, state, beyond, bound)
        skipped = counts["streak"] > state["streak"]
        held_losses = pushed(state["held_losses"], loss, skipped & torch.isfinite(loss))
        counts["held_losses"] = held_losses
        took = stats.finite & (torch.isfinite(loss) & (norm > 0))
        took = took if self.include_skipped else took & skipped.logical_not()
        seen = state["seen"] + took
        new = {
            "norms": pushed(state["norms"], norm, took),
            "losses": pushed(state["losses"], loss, took),
            "seen": seen,
            "ready": torch.maximum(state["ready"], (seen >= self._warmup).double()),
        }
        if not self.include_skipped:
            new = self._started_anew(new, counts, over)
        return decision, {**new, **counts}

    def _bound(self, rows: Tensor, seen: Tensor) -> Tensor:
        center, spread = (mean_and_std if self.statistic == "mean" else median_and_mad)(rows, seen)
        return center + self.z_threshold * spread

    def _started_anew(self, new: State, counts: State, over: Tensor) -> State:
        """Where the bound on steps in a row was reached, what was withheld is the new level."""
        last = min(self._holds, self.window - 1)
        level = dict(new)
        for name, held in (("norms", "held_norms"), ("losses", "held_losses")):
            rows = new[name]
            before = counts[held].narrow(0, self._holds - last, last)
            filler = rows.narrow(0, 0, self.window - 1 - last)
            level[name] = torch.cat([filler, before, rows.narrow(0, self.window - 1, 1)])
        level["seen"] = torch.full_like(new["seen"], float(last + 1))
        return {name: torch.where(over, level[name], value) for name, value in new.items()}


class SkipLarge(_SkipPolicy):
    """Withhold the step unless its norm is below a bound.

    The bound is `limit` itself, or `limit` times the mean ("ema", bias-corrected with `decay`) or
    the `percentile` of the norms of steps that were taken, once there were `warmup_steps` of them.
    Steps at the bound are withheld, as NaN is.

    State: `streak` and `held_norms`; for "ema" `mean`, `weight`, `seen` of shape (1,); for
    "percentile" `norms` of shape (window, 1) and `seen`. All restored.

    Departures: optax drops the micro-batch; this withholds the optimizer's step, and falls back
    after `max_consecutive` of them.

    References: optax.skip_large_updates.
    """

    type: Literal["skip_large"] = "skip_large"
    """Selects this policy in YAML."""
    limit: Limit
    """The bound on the norm, or the factor on what it is relative to, above 0."""
    relative_to: Literal["fixed", "ema", "percentile"] = "fixed"
    """What `limit` multiplies: 1, the running mean, or a percentile of past norms."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Weight of the past in the running mean."""
    percentile: Annotated[float, Field(ge=0, le=100)] = 95.0
    """The percentile of past norms, 0 to 100."""
    window: Annotated[int, Field(ge=2)] = 1000
    """How many norms the percentile looks back."""
    warmup_steps: Annotated[int, Field(ge=1)] = 100
    """Norms to take in before a relative bound holds."""

    @model_validator(mode="after")
    def _warms_up_within_the_window(self) -> Self:
        if self.relative_to == "percentile" and self.warmup_steps > self.window:
            msg = (
                f"has warmup_steps {self.warmup_steps} above window {self.window}, which never "
                "holds so many norms; allowed: at most window. Lower it or widen the window."
            )
            raise ValueError(msg)
        return self

    def init(self, slots: int, device: torch.device) -> State:
        """Nothing seen yet."""
        state = super().init(slots, device)
        zeros = torch.zeros(slots, dtype=torch.float64, device=device)
        if self.relative_to == "ema":
            return {**state, **{name: zeros.clone() for name in ("mean", "weight", "seen")}}
        if self.relative_to == "percentile":
            return {**state, "norms": zeros.repeat(self.window, 1), "seen": zeros.clone()}
        return state

    def decide(self, stats: Stats, state: State) -> tuple[Decision, State]:
        """Withhold a step at or beyond the bound, or take its norm in."""
        norm = stats.norms
        factor = filled(norm, self.limit, stats.step)
        bound = factor
        if self.relative_to == "ema":
            bound = factor * state["mean"] / state["weight"]
        elif self.relative_to == "percentile":
            bound = factor * percentile_of_last(
                state["norms"], state["seen"], self.percentile / 100
            )
        if self.relative_to != "fixed":
            bound = torch.where(state["seen"] >= self.warmup_steps, bound, torch.inf)
        beyond = (norm < bound).logical_not() & torch.isfinite(bound)
        decision, over, counts = self._bounded(stats, state, beyond, bound)
        took = (norm > 0) & (counts["streak"] > state["streak"]).logical_not()
        return decision, {**self._taken_in(norm, took, over, counts, state), **counts}

    def _taken_in(
        self, norm: Tensor, took: Tensor, over: Tensor, counts: State, state: State
    ) -> State:
        """What is remembered with this norm, or anew from it where the bound was reached."""
        if self.relative_to == "fixed":
            return {}
        seen = torch.where(over, float(self.warmup_steps), state["seen"] + took)
        if self.relative_to == "percentile":
            last = min(self._holds, self.window - 1)
            rows = pushed(state["norms"], norm, took)
            filler = counts["held_norms"].narrow(0, self._holds - 1, 1)
            filler = filler.expand(self.window - 1 - last, -1)
            held = counts["held_norms"].narrow(0, self._holds - last, last)
            level = torch.cat([filler, held, norm.unsqueeze(0)])
            return {"norms": torch.where(over, level, rows), "seen": seen}
        step = (1 - self.decay) * took
        mean = state["mean"] + step * (norm - state["mean"])
        weight = state["weight"] + step * (1 - state["weight"])
        return {
            "mean": torch.where(over, norm, mean),
            "weight": torch.where(over, 1.0, weight),
            "seen": seen,
        }
