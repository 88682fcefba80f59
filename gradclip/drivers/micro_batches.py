"""Micro-batches: what each backward adds is clipped before it joins what the others gave."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.drivers.accumulation import Accumulated, add_up, is_borrowed
from gradclip.effect.effect import apply
from gradclip.errors import ConfigError, NonFiniteError
from gradclip.layouts import is_flattened
from gradclip.measure import combine, measure
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Seen
from gradclip.stops import not_finite
from gradclip.types import Collected, Verdict

if TYPE_CHECKING:
    from gradclip.clipper import GradientClipper

__all__ = ["MicroBatches", "refuse_closures"]

_logger = logging.getLogger("gradclip")


class MicroBatches:
    """Keeps the sum of clipped micro-batches in `.grad`, and describes a step by its worst one.

    Args:
        clipper: What decides on each of them.

    Raises:
        ConfigError: If `stage` is "after_backward" and a DeepSpeed engine makes the steps.
    """

    def __init__(self, clipper: GradientClipper) -> None:
        self._clipper: GradientClipper = weakref.proxy(clipper)  # which ends with its last user
        self._window: Accumulated | None = None
        self._one: Accumulated | None = None
        self._is_open = False

        self._is_used = clipper.config.stage == "after_backward"
        if self._is_used and clipper._zero is not None:
            msg = (
                "stage is 'after_backward' with a DeepSpeed engine, which reduces and adds up "
                "gradients inside backward; allowed: stage 'step'. Set stage to 'step', or train "
                "with DDP or FSDP2."
            )
            raise ConfigError(msg)

    @contextmanager
    def one(self, loss: Tensor | float | None, share: float) -> Iterator[None]:
        """Around one backward; see `GradientClipper.micro_batch`."""
        if not self._is_used:
            msg = (
                "micro_batch: stage is 'step', which clips once a step; allowed: stage "
                "'after_backward'. Set stage, or leave micro_batch out."
            )
            raise ConfigError(msg)
        if not 0 < share <= 1:
            msg = f"micro_batch: share is {share}; allowed: above 0, and 1 for a loss as it is."
            raise ConfigError(msg)
        if self._is_open:
            msg = (
                "micro_batch: one is open already; allowed: one backward in each, one after the "
                "other. Close the first before the second."
            )
            raise ConfigError(msg)
        if loss is not None:
            self._clipper.observe_loss(loss)
        parameters = list(self._clipper._on.plan.parameters.values())
        sums = self._set_aside(parameters)
        self._is_open = True
        try:
            yield
            with torch.no_grad():
                self._join(sums, share)
        except BaseException:
            for p in parameters:
                p.grad = sums.get(p)
            raise
        finally:
            self._is_open = False

    def at_step(self, grad_scale: Tensor | None, loss: object, *, repeat: bool) -> bool:
        """Whether micro-batches were clipped since the last step; False if there was no backward.

        Raises:
            ConfigError: If a backward ran outside of a micro-batch, or the call says what each
                micro-batch has to say.
        """
        if not self._is_used:
            return False
        if repeat:
            refuse_closures()
        for name, given, way_out in (
            ("grad_scale", grad_scale, "GradientClipper(..., scaler=scaler)"),
            ("loss", loss, "micro_batch(loss=loss)"),
        ):
            if given is not None:
                msg = (
                    f"clip: {name} is given and stage is 'after_backward', whose micro-batches are "
                    f"clipped by then; allowed: {way_out}."
                )
                raise ConfigError(msg)
        if self._is_open:
            msg = "clip: a micro_batch is open; allowed: clip() after it. Call it outside."
            raise ConfigError(msg)
        if self._window is not None:
            return True
        if any(p.grad is not None for p in self._clipper._on.plan.parameters.values()):
            msg = (
                "clip: stage is 'after_backward', and gradients were made outside of micro_batch; "
                "allowed: every backward in one, as in `with clipper.micro_batch(): "
                "loss.backward()` (an adapter does it where the framework's own backward is "
                "called). Or set stage to 'step'."
            )
            raise ConfigError(msg)
        return False

    def record(self, verdict: Verdict, seen: Seen) -> ClipRecord:
        """Describe a micro-batch as `Recorder.record` does a step, to be counted with its step."""
        recorder, each = self._clipper.recorder, self._clipper._on.plan.each
        record, slots = recorder.describe(verdict, seen.norms)
        found = slots()
        parts = seen.measure() if recorder.keeps_worst and each else found
        all_kept, none = torch.ones_like(verdict.finite), torch.zeros_like(record.grad_norm)
        self._one = Accumulated(record, found, parts, seen.loss, all_kept, verdict.finite, none)
        return record

    def end_step(self) -> ClipRecord:
        """Describe and count the step, and withhold it if no micro-batch is left."""
        clipper, window = self._clipper, self._window
        assert window is not None
        self._window = None
        on, scaled, recorder = clipper._now(), clipper._loss_scale.is_live, clipper.recorder
        if scaled:
            clipper._loss_scale.settle(leave=False)
        skipped = window.kept.logical_not()
        if scaled:
            skipped = skipped | window.record.finite.logical_not()
        norm_type, grads = on.plan.recorded, on.layout.collect(on.plan.slots)
        asked = {norm_type: on.plan.norm_types[norm_type]}
        (norms,) = measure([(on.plan.as_measured(grads.counted), asked)], on.layout, on.kernel)
        total = combine(norms[norm_type], norm_type)
        record = replace(
            window.record,
            clipped_norm=torch.where(skipped, window.record.grad_norm, total),
            coef=torch.where(skipped, 1.0, window.record.coef),
            clipped=window.record.clipped & skipped.logical_not(),
            skipped=skipped,
            dropped=window.dropped,
            per_parameter=recorder.named(lambda: window.slots),
        )
        of = (lambda: window.slots, lambda: window.each, clipper.batch, window.loss)
        clipper.last_record = record = recorder.note(record, *of, window.sound)
        on.effect.withhold(skipped if self._may_withhold else None, on.plan, scaler_follows=scaled)
        clipper._checks.remember()
        if window.names:
            _logger.warning(
                "gradclip: %d of %d micro-batches of a step were left out: %s.",
                len(window.names),
                window.count,
                "; ".join(window.names),
            )
        return record

    @property
    def _may_withhold(self) -> bool:
        rules = self._clipper._on.plan.rules
        skips = self._clipper.config.on_nonfinite == "skip" or self._clipper._loss_scale.is_live
        return skips or any(rule.policy.withholds for rule in rules)

    def _set_aside(self, parameters: list[Parameter]) -> dict[Parameter, Tensor]:
        """Take the sum so far out of `.grad`, where the next backward would add to it."""
        if self._window is None:
            self._clipper._checks.refuse_stale()
        sums = {p: p.grad for p in parameters if p.grad is not None}
        window = self._window
        if window is not None and window.any_sum and not sums:  # zeroed, and no step came
            self._window = None
        if self._window is not None and any(map(is_flattened, parameters)):
            msg = (
                "micro_batch: this is the second of a step, and FSDP1 adds up gradients where they "
                "can't be told apart; allowed: one micro-batch a "
                "step. Use fully_shard (FSDP2) or DDP, or set stage to 'step'."
            )
            raise ConfigError(msg)
        for p, grad in sums.items():
            sums[p] = grad.clone() if is_borrowed(grad) else grad
            p.grad = None
        return sums

    def _join(self, sums: Mapping[Parameter, Tensor], share: float) -> None:
        clipper, scaled = self._clipper, self._clipper._loss_scale.is_live
        factor: Tensor | None = None
        if scaled:
            factor = clipper._loss_scale.factor
        if share != 1:
            shared = torch.full((), share, dtype=torch.float64, device=clipper._on.device)
            factor = shared if factor is None else factor * shared
        number = 1 if self._window is None else self._window.count + 1
        rule = "skip" if scaled else clipper.config.on_nonfinite
        clipper._checks.before(factor, told=scaled)
        try:
            grads, verdict, _ = clipper._decide(factor, rule, micro=True)
        except NonFiniteError as error:
            msg = f"micro-batch {number} since the last step: {error}"
            raise NonFiniteError(msg) from None
        # A scaler has to see an overflow, and then leaves the whole step out.
        drop = verdict.skip
        if drop is not None and scaled:
            drop = drop & verdict.finite
        one = self._taken(verdict, drop)
        left_out = verdict.withheld and bool(drop)
        if left_out:
            one.names = [f"number {number} ({self._why(verdict)})"]
        elif not verdict.withheld:
            self._clip(verdict, drop, grads, factor)
        clipper._checks.after(verdict)
        if self._window is None:
            self._window = one
        else:
            self._window.add(one)
        self._window.any_sum = add_up(clipper._on.plan.parameters, sums, left_out=left_out)

    def _taken(self, verdict: Verdict, drop: Tensor | None) -> Accumulated:
        """The window of one micro-batch that `record` made, with whether it joins the sum."""
        one, self._one = self._one, None
        assert one is not None
        if drop is not None:
            one.kept, one.sound = drop.logical_not(), verdict.finite | drop
            one.dropped = drop.double()
        return one

    def _clip(
        self, verdict: Verdict, drop: Tensor | None, grads: Collected, factor: Tensor | None
    ) -> None:
        """Carry out the verdict on one contribution; it is all zero if a device drops it."""
        on = self._clipper._on
        on_device = on.kernel.reads_block and drop is not None
        if on_device and verdict.skip is not None:
            verdict = replace(verdict, coef=torch.where(verdict.skip, 1.0, verdict.coef))
        apply(verdict, grads.all, on.plan, on.kernel, on.memory, factor)
        if on_device and drop is not None:
            for slot in grads.all:
                for grad in slot:
                    grad.masked_fill_(drop.to(grad.device), 0)

    def _why(self, verdict: Verdict) -> str:
        if bool(verdict.finite):
            return "a policy withholds it"
        on = self._clipper._on
        bad = not_finite(on.plan.parameters, on.layout, on.kernel)
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        where = f"in {', '.join(bad[:5])}{more}" if bad else "on another rank"
        return f"NaN or infinite {where}"


def refuse_closures() -> None:
    """Raise where a closure makes the gradients of a step.

    Raises:
        ConfigError: Always.
    """
    msg = (
        "stage is 'after_backward' and the optimizer evaluates a closure, perhaps several times a "
        "step; allowed: steps without a closure. Set stage to 'step'."
    )
    raise ConfigError(msg)
