"""One clipping step: gradients -> measure -> reduce -> decide -> apply -> record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig, PolicyLike, RecorderConfig, as_config
from gradclip.core import LaidOut
from gradclip.debug import Checks
from gradclip.drivers.attached import clip_before_step
from gradclip.drivers.deepspeed import Halves, clip_inside_step
from gradclip.drivers.micro_batches import MicroBatches
from gradclip.drivers.scaler import LossScale
from gradclip.effect.effect import apply
from gradclip.errors import ClipError, ConfigError
from gradclip.kernels import KernelName
from gradclip.layouts import Groups
from gradclip.layouts.deepspeed import DeepSpeedLayout as ZeroLayout
from gradclip.measure import measure_each, measure_step
from gradclip.plan.in_backward import refuse_lost_gradients
from gradclip.policies import decide_all
from gradclip.records.record import ClipRecord, Tally
from gradclip.records.recorder import Recorder, Seen
from gradclip.state import carry_over, pack, unpack
from gradclip.stops import DeferredStop, Losses, is_withheld, where_not_finite
from gradclip.types import Collected, Handle, Layout, Verdict

__all__ = ["GradientClipper"]


class GradientClipper:
    """Clips the gradients of one optimizer, once per optimizer step.

    Args:
        policy: A policy, a list of them (applied in order), a `ClipConfig`, a mapping, or the
            path of a YAML file.
        named_parameters: Names for the parameters, as from `model.named_parameters()`, where
            wrappers (DDP, FSDP1, `torch.compile`) leave no trace; without an optimizer, also
            which parameters to clip.
        optimizer: Whose parameters to clip, and whose parameter groups scope "group" means. A
            DeepSpeed engine stands for its optimizer; it then has to be attached.
        process_group: One more group of ranks to reduce over, which hold other parameters of the
            same model (pipeline stages), or a mapping from patterns of parameter names to such
            groups, first match first (`{"*.experts.*": expert_group}`); None in it, as for
            what no pattern matches, says that every rank holds a copy, and the first of each
            group one to count. For scopes other than "global" one name on several ranks means
            one parameter, cut over them.
        layout: How parameters are laid out over ranks; found out from them if not given.
        kernel: "cpu", "accelerator" or "reference"; by the device if not given.
        scaler: The `GradScaler` that scales the loss, if any. `clip` then sees to it that gradients
            are unscaled, once, and an overflow, which is how the scaler finds its scale, is a
            step that isn't finite but no error. Needs the optimizer.

    Attributes:
        config: The validated configuration.
        recorder: The last steps; `recorder.write()` makes a file of them at any time.
        batch: Index of the last batch whose gradients the next `clip` gets, for the flight
            record; None if unknown. Set it before.
        last_record: What the last `clip` returned, also one made by `attach`; None before it.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters.
        LayoutError: If the parameters are laid out in a way that isn't supported.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipper = GradientClipper(ClipByNorm(max_norm=1.0), optimizer=optimizer)
        >>> model(torch.full((1, 2), 30.0)).sum().backward()
        >>> record = clipper.clip()
        >>> bool(record.clipped), round(float(record.clipped_norm), 4)
        (True, 1.0)
    """

    _is_attached = False

    def __init__(
        self,
        policy: PolicyLike,
        named_parameters: Iterable[tuple[str, Parameter]] | None = None,
        optimizer: Optimizer | Any | None = None,
        *,
        process_group: Groups | None = None,
        layout: Layout | None = None,
        kernel: KernelName | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        self.config: ClipConfig = as_config(policy)
        self._zero = ZeroLayout.of(optimizer, layout)
        if self._zero is not None:
            layout, optimizer = self._zero, self._zero.groups
            named_parameters = named_parameters or self._zero.engine.module.named_parameters()
        named = None if named_parameters is None else list(named_parameters)
        self._micro_batches = MicroBatches(self)
        self._checks = Checks(self, optimizer)
        self._loss_scale = LossScale(scaler, optimizer, in_engine=self._zero is not None)
        self._on = LaidOut(self.config, named, optimizer, process_group, layout, kernel)
        self._finds_hooks = layout is None
        rules, device = self._on.plan.rules, self._on.device
        self._states = [rule.policy.init(len(rule.names), device) for rule in rules]
        self._tally = Tally(device, (self.config.recorder or RecorderConfig()).steps)
        self.recorder = Recorder(self.config, self._tally, owner=self)
        self.recorder.lay(self._on.plan, device, reads_block=self._on.kernel.reads_block)
        self.batch: int | None = None
        self._losses = Losses() if any(rule.policy.watches_loss for rule in rules) else None
        self._latch = DeferredStop(self.config.log.every_n_steps or 10)
        self._before = (self._states, self._tally.taken)
        self.last_record: ClipRecord | None = None

    @torch.no_grad()
    def clip(
        self,
        *,
        grad_scale: Tensor | None = None,
        loss: Tensor | float | None = None,
        share: float = 1.0,
        repeat: bool = False,
    ) -> ClipRecord:
        """Clip this step's gradients. Call after backward, before the optimizer's step.

        Every rank must call it for every step, whatever gradients it has. With `apply: fold` the
        step that follows does the clipping, and gradients are as they were until then.

        Args:
            grad_scale: 0-d factor that the gradients still carry (a loss scale). Norms and
                limits are those of the gradients without it.
            loss: 0-d, this step's on this rank, for policies that watch it; those average it
                over ranks. Losses given to `observe_loss` before count too.
            share: Batches that were accumulated, as a share of those the loss was divided by:
                below 1 in a short last window, whose gradients are small. Policies that remember
                see norms divided by it and their limits are multiplied by it; limits that are
                fixed, and what is recorded, are of the gradients as they are.
            repeat: These are gradients of one more evaluation of the closure of a step that was
                clipped (LBFGS). They are clipped as that step was, but neither counted nor learnt
                from; the step's record is returned.

        Returns:
            What was measured and done; tensors on the device, equal on every rank.

        Raises:
            NonFiniteError: If `on_nonfinite` is "raise" and a gradient on any rank is not
                finite. Gradients and state are then as they were.
            SkipLimitError: If a policy's bound on withheld steps in a row is reached, and it is to
                stop then; up to `log.every_n_steps` steps later, all withheld, where the device
                withholds. Gradients and state are as they were.
            ConfigError: If `share` is out of range; no rank ever had a gradient, and a hook may
                have taken them; or a policy watches the loss and no rank has one.
        """
        if not 0 < share <= 1:
            msg = f"clip: share is {share}; allowed: above 0, and 1 for a full window."
            raise ConfigError(msg)
        if self._micro_batches.at_step(grad_scale, loss, repeat=repeat):
            return self._micro_batches.end_step()
        if loss is not None:
            self.observe_loss(loss)
        rule, scaled = self.config.on_nonfinite, self._loss_scale.is_live
        if scaled:
            rule = "skip"  # an overflow is how the scaler finds its scale, and it skips the step
            if grad_scale is None:
                grad_scale = self._loss_scale.settle(leave=self._on.effect.unscales)
        self._checks.before(grad_scale, told=grad_scale is not None)
        grads, verdict, record = self._decide(grad_scale, rule, share=share, repeat=repeat)
        how = (self._on.plan, self._on.kernel, self._on.memory, grad_scale)
        self._on.effect.carry_out(verdict, grads.all, *how, scaler_follows=scaled)
        self._checks.after(verdict)
        return record

    def micro_batch(
        self, *, loss: Tensor | float | None = None, share: float = 1.0
    ) -> AbstractContextManager[None]:
        """Around one backward, for `stage: after_backward`: clip it before it joins the others.

        Every rank enters it for every backward. After it `.grad` holds the sum of what was
        clipped so far, without what isn't finite or a policy withholds; `clip` ends the step.

        Args:
            loss: 0-d, as for `clip`, of this micro-batch.
            share: What the loss was multiplied by, 1/4 where four micro-batches make a step;
                norms and limits are of the gradient without it.

        Raises:
            ConfigError: If `stage` is "step", or `share` is out of range.
            NonFiniteError: As `clip`; `.grad` then holds the sum of those before.
        """
        return self._micro_batches.one(loss, share)

    def _decide(
        self,
        grad_scale: Tensor | None,
        on_nonfinite: str,
        *,
        share: float = 1.0,
        repeat: bool = False,
        micro: bool = False,
    ) -> tuple[Collected, Verdict, ClipRecord]:
        """Everything but the writing, for which DeepSpeed has a moment of its own."""
        on = self._now()
        plan = on.plan
        if not repeat:
            self._before = (self._states, self._tally.taken)
        before, taken = self._before
        grads = on.layout.collect(plan.slots)
        probes = on.memory.probes(grads.counted, grad_scale)
        loss = self._losses.mean(on.device) if self._losses is not None else None
        norms, probed, weights = measure_step(plan, grads, probes, on.layout, on.kernel)
        if self._finds_hooks and not any(grads.all):
            refuse_lost_gradients(plan.parameters, norms[plan.recorded], self._tally.counts[0])
        if grad_scale is not None:
            norms = {p: norm / grad_scale for p, norm in norms.items()}
        verdict, states = decide_all(
            plan.rules,
            norms,
            before,
            step=taken,
            probed=probed,
            weights=weights,
            loss=loss,
            watched=plan.watched,
            skip_nonfinite=on_nonfinite == "skip",
            held=self._latch.reached,
            share=share,
        )
        each = partial(measure_each, plan, on.layout, on.kernel, grad_scale)
        seen = Seen(norms[plan.recorded], self.batch, loss, each)
        raises = on_nonfinite == "raise"
        on_device = on.kernel.reads_block if micro else on.effect.withholds_on_device
        if on_device and not raises:
            self._latch.look(verdict, plan.rules)
        else:
            where = partial(where_not_finite, plan.parameters, on.layout, on.kernel)
            try:
                withheld = is_withheld(verdict, plan.rules, where, raises=raises)
            except ClipError:
                self.recorder.witness(verdict, seen)
                raise
            verdict = replace(verdict, withheld=withheld)
        if repeat and self.last_record is not None:
            edits = [replace(e, learns=torch.zeros_like(e.learns)) for e in verdict.edits]
            return grads, replace(verdict, edits=tuple(edits)), self.last_record
        self._states = states
        if micro:
            return grads, verdict, self._micro_batches.record(verdict, seen)
        self.last_record = self.recorder.record(verdict, seen)
        return grads, verdict, self.last_record

    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call, in one copy to the host.

        Returns:
            `clip/grad_norm`, `clip/limit`, `clip/coef`, `clip/clipped_norm`: means over the steps
            that were finite; `clip/grad_norm_max`; `clip/clipped`, `clip/skipped`,
            `clip/nonfinite`, `clip/dropped`: how many; `clip/clip_rate` of all steps so far and
            `clip/clip_rate_window` of these; `clip/grad_norms/<parameter>` and
            `clip/grad_norms/group/<name>`: means, where configured. Empty without a step.
        """
        return self.recorder.flush()

    @property
    def norm_type(self) -> float:
        """The p of the norm that records hold: that of the first policy on norms, else 2."""
        return self._on.plan.recorded

    @property
    def watches_loss(self) -> bool:
        """Whether a policy needs the loss of every step."""
        return self._losses is not None

    @property
    def has_loss(self) -> bool:
        """Whether a loss was observed since the last step, where a policy needs one."""
        return self._losses is not None and self._losses.any

    def observe_loss(self, loss: Tensor | float, *, first: bool = False) -> None:
        """Show a loss to policies that watch it; `clip` uses the mean of those since the last one.

        Args:
            loss: One number, this rank's, of one backward; without a scaler's factor.
            first: The first since gradients were zeroed; no step came of those before.
        """
        if self._losses is not None:
            if first:
                self._losses.forget()
            self._losses.observe(loss)

    def attach(self, optimizer: Optimizer | Any) -> Handle:
        """Clip by itself before every `optimizer.step()`, also with a closure or a GradScaler.

        A closure's gradients are clipped each time it is evaluated (LBFGS), and the step is counted
        once. An ordinary optimizer isn't stepped on an overflow, which is seen and counted only
        if the clipper was built with the `scaler`.

        Args:
            optimizer: The one this clipper was built with: an optimizer, or a DeepSpeed engine,
                which then clips inside `engine.step()` with this clipper alone.

        Returns:
            A handle; `handle.remove()` stops it.

        Raises:
            ConfigError: If the clipper is attached already or was built with another optimizer, or
                a DeepSpeed engine's threshold disagrees; in a step, if `clip` was called for it.
        """
        if self._zero is not None:
            halves = Halves(self.config, self._decide, self._write)
            return clip_inside_step(halves, self._zero, optimizer)
        return clip_before_step(self, optimizer)

    def _write(self, verdict: Verdict, bucket: int, tensors: Sequence[Tensor]) -> None:
        """The other half: apply to what DeepSpeed is about to step with."""
        assert self._zero is not None
        parts = self._zero.parts(self._on.plan.slots, bucket, tensors)
        apply(verdict, parts, self._on.plan, self._on.kernel, self._on.memory)

    def state_dict(self) -> dict[str, Any]:
        """Adaptive state and counts: plain tensors, numbers, strings, lists and dicts.

        Every rank must call it where a policy remembers single elements (`spam`, `uclip`).
        """
        return pack(self._now(), self._states, self._tally)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved at any world size.

        Raises:
            ConfigError: If policies or parameters are others; nothing is changed then.
        """
        on = self._now()
        states, counts, elements = unpack(state, on, self._states)
        self.recorder.begin(int(state.get("step", counts[0])))
        self._states, self._tally.counts = states, counts
        on.memory.replace(elements)

    def _now(self) -> LaidOut:
        """How things lie; state is carried over when parameters were added or moved."""
        before, self._on = self._on, self._on.now()
        if self._on is not before:
            rules, device = self._on.plan.rules, self._on.device
            self._states = carry_over(before.plan.rules, self._states, rules, device)
            self.recorder.lay(self._on.plan, device, reads_block=self._on.kernel.reads_block)
        return self._on
