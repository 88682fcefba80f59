"""Micro-batches: what each backward adds is clipped before it joins what the others gave."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.core import Core
from gradclip.devices import moved
from gradclip.drivers.accumulation import Accumulated, add_up, is_borrowed
from gradclip.drivers.closures import refuse_closures
from gradclip.drivers.losses import Losses
from gradclip.drivers.scaler import LossScale
from gradclip.errors import ConfigError, NonFiniteError
from gradclip.layouts import is_flattened
from gradclip.measure import measure_recorded
from gradclip.norms import combine
from gradclip.records.record import ClipRecord, Facts
from gradclip.stops import nonfinite_names, shown
from gradclip.types import Given, Step

__all__ = ["MicroBatches"]

_logger = logging.getLogger("gradclip")


class MicroBatches:
    """Keeps the sum of clipped micro-batches in `.grad`, and describes a step by its worst one.

    Args:
        core: Of the clipper.
        losses: Where policies look for the loss; None if none does.
        scaler: The scaler that makes the steps, if the clipper knows one.
        in_engine: A DeepSpeed engine makes them.

    Raises:
        ConfigError: If a DeepSpeed engine makes the steps.
    """

    def __init__(
        self, core: Core, losses: Losses | None, scaler: LossScale | None, *, in_engine: bool
    ) -> None:
        if in_engine:
            msg = (
                "stage is 'after_backward' with a DeepSpeed engine, which reduces and adds up "
                "gradients inside backward; allowed: stage 'step'. Set stage to 'step', or train "
                "with DDP or FSDP2."
            )
            raise ConfigError(msg)
        self._core = core
        self._losses = losses
        self._scaler = scaler
        self._window: Accumulated | None = None
        self._is_open = False

    @contextmanager
    def one(self, given: Given) -> Iterator[None]:
        """Around one backward; see `GradientClipper.micro_batch`.

        Args:
            given: What is known of its gradients; `share` is what its loss is multiplied by.
        """
        if self._is_open:
            msg = (
                "micro_batch: one is open already; allowed: one backward in each, one after the "
                "other. Close the first before the second."
            )
            raise ConfigError(msg)
        parameters = list(self._core.machinery.plan.parameters.values())
        sums = self._set_aside(parameters)
        self._is_open = True
        try:
            yield
            with torch.no_grad():
                self._join(sums, given)
        except BaseException:
            for p in parameters:
                p.grad = sums.get(p)
            raise
        finally:
            self._is_open = False

    def end_step(
        self,
        given: Given,
        grad_scale: Tensor | None,
        loss: object,
        *,
        repeat: bool,
    ) -> ClipRecord:
        """Count the step of the micro-batches since the last one; withhold it if none is left.

        Args:
            given: What is known of the step.
            grad_scale: What the caller of `clip` gave; refused.
            loss: The same.
            repeat: One more evaluation of a closure; refused.

        Raises:
            ConfigError: If a backward ran outside of a micro-batch, or the call says what each
                micro-batch has to say.
        """
        self._refuse_call(grad_scale, loss, repeat=repeat)
        core, window = self._core, self._window
        if window is None:  # a step without a backward
            record = core.commit(core.look(self._with_loss(given)))
            core.withhold(None, given)
            return record
        self._window = None
        on = core.current()
        skipped = window.kept.logical_not()
        if given.scaler_steps:
            assert self._scaler is not None
            self._scaler.settle(leave=False)
            skipped = skipped | window.facts.nonfinite
        grads = on.layout.collect(on.plan.slots)
        total = combine(measure_recorded(on.plan, grads, on.layout, on.kernel), on.plan.recorded)
        facts = replace(
            window.facts,
            clipped_norm=total,
            skip=skipped,
            sound=window.sound,
            dropped=window.dropped,
            batch=given.batch,
        )
        record = core.recorder.count(facts, lambda: window.slots, lambda: window.each)
        core.last_record = record
        skips = given.on_nonfinite == "skip" or any(r.policy.withholds for r in on.plan.rules)
        core.withhold(skipped if skips else None, given)
        if window.names:
            _logger.warning(
                "gradclip: %d of %d micro-batches of a step were left out: %s.",
                len(window.names),
                window.count,
                "; ".join(window.names),
            )
        return record

    def _refuse_call(self, grad_scale: Tensor | None, loss: object, *, repeat: bool) -> None:
        if repeat:
            refuse_closures()
        for name, value, way_out in (
            ("grad_scale", grad_scale, "GradientClipper(..., scaler=scaler)"),
            ("loss", loss, "micro_batch(loss=loss)"),
        ):
            if value is not None:
                msg = (
                    f"clip: {name} is given and stage is 'after_backward', whose micro-batches are "
                    f"clipped by then; allowed: {way_out}."
                )
                raise ConfigError(msg)
        if self._is_open:
            msg = "clip: a micro_batch is open; allowed: clip() after it. Call it outside."
            raise ConfigError(msg)
        parameters = self._core.machinery.plan.parameters.values()
        if self._window is None and any(p.grad is not None for p in parameters):
            msg = (
                "clip: stage is 'after_backward', and gradients were made outside of micro_batch; "
                "allowed: every backward in one, as in `with clipper.micro_batch(): "
                "loss.backward()` (an adapter does it where the framework's own backward is "
                "called). Or set stage to 'step'."
            )
            raise ConfigError(msg)

    def _set_aside(self, parameters: list[Parameter]) -> dict[Parameter, Tensor]:
        """Take the sum so far out of `.grad`, where the next backward would add to it."""
        if self._window is None:
            self._core.refuse_stale()
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
        # DDP writes the next gradients into its buckets, so what lies there has to be copied.
        for p, grad in sums.items():
            sums[p] = grad.clone() if is_borrowed(grad) else grad
            p.grad = None
        return sums

    def _join(self, sums: Mapping[Parameter, Tensor], given: Given) -> None:
        """Clip what the backward gave, and add it to the sum."""
        core, window = self._core, self._window
        number = 1 if window is None else window.count + 1
        given = replace(self._with_loss(given), grad_scale=self._factor(given), share=1.0)
        try:
            step = core.look(given)
        except NonFiniteError as error:
            msg = f"micro-batch {number} since the last step: {error}"
            raise NonFiniteError(msg) from None
        core.adopt(step)
        verdict, drop = step.verdict, step.verdict.skip
        if drop is not None and given.scaler_steps:
            # A scaler has to see an overflow, and then leaves the whole step out.
            drop = drop & verdict.finite
        one = self._described(step, drop)
        # The host knows of a withheld micro-batch where reading it is free; a device never tells.
        left_out = verdict.withheld and bool(drop)
        if left_out:
            one.names = [f"number {number} ({self._why(step)})"]
        elif not verdict.withheld:
            core.write(step)
            if core.machinery.kernel.reads_block and drop is not None:
                # The host doesn't know whether it is dropped: then zeros join the sum.
                for slot in step.grads.all:
                    for grad in slot:
                        grad.masked_fill_(drop.to(grad.device), 0)
        if window is None:
            self._window = window = one
        else:
            window.add(one)
        window.any_sum = add_up(core.machinery.plan.parameters, sums, left_out=left_out)

    def _with_loss(self, given: Given) -> Given:
        if self._losses is None:
            return given
        return replace(given, loss=self._losses.mean(self._core.machinery.device))

    def _factor(self, given: Given) -> Tensor | None:
        """What these gradients are multiplied by: a loss scale, and the micro-batch's share."""
        factor = self._scaler.factor if given.scaler_steps and self._scaler is not None else None
        if given.share == 1:
            return factor
        device = self._core.machinery.device
        share = torch.full((), given.share, dtype=torch.float64, device=device)
        return share if factor is None else moved(factor, device) * share

    def _described(self, step: Step, drop: Tensor | None) -> Accumulated:
        """The window of one micro-batch, with whether it joins the sum; not counted yet."""
        recorder, plan = self._core.recorder, self._core.machinery.plan
        record, slots = recorder.described(step), plan.by_slot(step.norms)
        each = step.measure_each() if recorder.keeps_worst and plan.each else slots
        finite, none = step.verdict.finite, torch.zeros_like(record.grad_norm)
        kept = torch.ones_like(finite)
        facts = Facts(
            grad_norm=record.grad_norm,
            limit=record.limit,
            coef=record.coef,
            changed=record.clipped,
            finite=record.finite,
            has_gradient=record.has_gradient,
            loss=step.given.loss,
        )
        one = Accumulated(facts, slots, each, kept, finite, none)
        if drop is not None:
            one.kept, one.sound = drop.logical_not(), finite | drop
            one.dropped = drop.double()
        return one

    def _why(self, step: Step) -> str:
        if bool(step.verdict.finite):
            return "a policy withholds it"
        on = self._core.machinery
        names = nonfinite_names(on.plan.parameters, on.layout, on.kernel)
        return f"NaN or infinite {f'in {shown(names)}' if names else 'on another rank'}"
