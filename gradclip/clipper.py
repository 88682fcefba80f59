"""`GradientClipper`: the public face of a clipping step."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial, wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig, PolicyLike, as_config
from gradclip.core import Core, Sources
from gradclip.debug import CheckedCore
from gradclip.drivers.attached import Attached
from gradclip.drivers.closures import clip_again
from gradclip.drivers.deepspeed import clip_inside_step
from gradclip.drivers.losses import Losses
from gradclip.drivers.micro_batches import MicroBatches
from gradclip.drivers.scaler import LossScale
from gradclip.errors import ConfigError
from gradclip.kernels import KernelName
from gradclip.layouts import Groups
from gradclip.layouts.deepspeed import DeepSpeedLayout
from gradclip.plan.parameters import Named, as_pairs, in_place, told_apart
from gradclip.plot import plot_steps
from gradclip.records.alarm import Spike
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Recorder
from gradclip.state import pack, unpack
from gradclip.types import Given, Handle, Layout

__all__ = ["DEBUG_VARIABLE", "GradientClipper"]

DEBUG_VARIABLE = "GRADCLIP_DEBUG"
"""An environment variable: `debug: true` for every clipper that can be checked so."""

_logger = logging.getLogger("gradclip")
P = ParamSpec("P")
T = TypeVar("T")


def _outside_inference(method: Callable[P, T]) -> Callable[P, T]:
    """Leave `torch.inference_mode` for a call.

    Validation runs in it, and a checkpoint or a log entry may be due there: what is kept from one
    step to the next must not become a tensor that no later step may write to.
    """

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(mode=False):
            return method(*args, **kwargs)

    return call


class GradientClipper:
    """Clips the gradients of one optimizer, once per optimizer step.

    Args:
        policy: A policy, a list of them (applied in order), the name of a preset ("zclip"), the
            path of a YAML file, a mapping, or a `ClipConfig`; `Auto()` if left out:
            `GradientClipper(model, optimizer)`.
        named_parameters: The model, or names for the parameters as from
            `model.named_parameters()`, where wrappers (DDP, FSDP1, `torch.compile`) leave no
            trace; without an optimizer, also which parameters to clip. The optimizer may stand
            here if there is no model.
        optimizer: Whose parameters to clip, and whose parameter groups scope "group" means. A
            DeepSpeed engine stands for its optimizer; it then has to be attached.
        process_group: One more group of ranks to reduce over, which hold other parameters of the
            same model (pipeline stages), or a mapping from patterns of parameter names to such
            groups, first match first (`{"*.experts.*": expert_group}`); None in it, as for
            what no pattern matches, says that every rank holds a copy, and the first of each
            group one to count. For scopes other than "global" one name on several ranks means
            one parameter, sharded over them.
        layout: How parameters are laid out over ranks; found out from them if not given.
        kernel: "cpu", "accelerator", "single" or "reference"; by the device if not given.
        scaler: The `GradScaler` that scales the loss, if any. `clip` then sees to it that gradients
            are unscaled, once, and an overflow, which is how the scaler finds its scale, is a
            step that isn't finite but no error. Needs the optimizer.

    Attributes:
        config: The validated configuration.
        batch: Index of the last batch whose gradients the next `clip` gets, for the flight
            record; None if unknown. Set it before.

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

    @_outside_inference
    def __init__(
        self,
        policy: PolicyLike | Named | Optimizer | None = None,
        named_parameters: Named | None = None,
        optimizer: Optimizer | Any | None = None,
        *,
        process_group: Groups | None = None,
        layout: Layout | None = None,
        kernel: KernelName | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        chosen, named_parameters, optimizer = in_place(policy, named_parameters, optimizer)
        self.config: ClipConfig = as_config(chosen)
        self._engine_layout = DeepSpeedLayout.of(optimizer, layout)
        in_engine = self._engine_layout is not None
        if self._engine_layout is not None:
            layout, optimizer = self._engine_layout, self._engine_layout.groups
            named_parameters = named_parameters or self._engine_layout.engine.module
        named_parameters, optimizer = told_apart(named_parameters, optimizer)
        if not isinstance(named_parameters, Module | None):
            named_parameters = as_pairs(named_parameters)
        sources = Sources(named_parameters, optimizer, process_group, layout, kernel)
        self._scaler = None
        if scaler is not None:
            self._scaler = LossScale(scaler, optimizer, in_engine=in_engine)
        if self.config.debug or (DEBUG_VARIABLE in os.environ and not in_engine):
            self._core: Core = CheckedCore(self.config, sources, in_engine=in_engine)
        else:
            self._core = Core(self.config, sources)
        rules = self._core.machinery.plan.rules
        self._losses = Losses() if any(rule.policy.watches_loss for rule in rules) else None
        self._micro_batches: MicroBatches | None = None
        if self.config.stage == "after_backward":
            self._micro_batches = MicroBatches(
                self._core, self._losses, self._scaler, in_engine=in_engine
            )
        self._attached: weakref.ref[Attached] | None = None  # its optimizer keeps it alive
        self._beginning = self._core.begin()
        self.batch: int | None = None

    def __repr__(self) -> str:
        """What clips what."""
        return f"GradientClipper({self.summary})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is built anew, with this one's adaptive state and counts; it isn't attached."""
        attached = None if self._attached is None else self._attached()
        sources = self._core.sources
        if sources.is_gone:
            msg = (
                "A clipper was copied or pickled whose optimizer is gone, and a copy is built with "
                "that; allowed: a clipper whose optimizer is alive. Keep the optimizer, or save "
                "clipper.state_dict() instead."
            )
            raise ConfigError(msg)
        how = {
            "named_parameters": sources.named_parameters,
            "optimizer": sources.optimizer,
            "process_group": sources.process_group,
            "layout": sources.layout,
            "kernel": sources.kernel,
            "scaler": None if self._scaler is None else self._scaler.scaler,
        }
        is_attached = attached is not None and attached.is_on
        return _copied, (type(self), self.config, how, self.state_dict(), is_attached)

    @_outside_inference
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
        optimizer's next step clips; until then gradients are unchanged.

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
                from; the step's record is returned, which says whether one was withheld or not
                finite.

        Returns:
            What was measured and done; tensors on the device, equal on every rank.

        Raises:
            NonFiniteError: If `on_nonfinite` is "raise" and a gradient on any rank is not
                finite. Gradients and state are then as they were.
            SkipLimitError: If a policy's bound on withheld steps in a row is reached, and it is to
                stop then; up to `log.every_n_steps` steps later, all withheld, where the device
                withholds. Gradients and state are as they were.
            AlarmError: If an alarm ends the run; of steps before this one, which is as it was.
            ConfigError: If `share` is out of range; a hook stepped an optimizer in backward; or a
                policy watches the loss and no rank has one.
        """
        given = self._given("clip", share)
        if not given.in_step:
            self._core.watch.check(in_clip=True)
        if self._micro_batches is not None:  # stage: after_backward
            return self._micro_batches.end_step(given, grad_scale, loss, repeat=repeat)
        is_again = repeat and self.last_record is not None
        if not is_again:  # first of all, as an alarm may end the run there
            self._beginning = self._core.begin()  # for evaluations of a closure that may follow
        given = self._completed(given, grad_scale, loss)
        if is_again:
            return clip_again(self._core, given, self._beginning)
        step = self._core.look(given, self._beginning)
        record = self._core.commit(step)
        self._core.write(step)
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
        if self._micro_batches is None:
            msg = (
                "micro_batch: stage is 'step', which clips once a step; allowed: stage "
                "'after_backward'. Set stage, or leave micro_batch out."
            )
            raise ConfigError(msg)
        given = self._given("micro_batch", share)
        if loss is not None:
            self.observe_loss(loss)
        return self._micro_batches.one(given)

    def _given(self, call: str, share: float) -> Given:
        """What is known before a look: all but the loss, and the scale that gradients carry."""
        if not 0 < share <= 1:
            msg = f"{call}: share is {share}; allowed: above 0, and 1 for a full window."
            raise ConfigError(msg)
        attached = None if self._attached is None else self._attached()
        scaled = self._scaler is not None and self._scaler.is_live
        return Given(
            share=share,
            batch=self.batch,
            # An overflow is how a scaler finds its scale, and the scaler skips the step.
            on_nonfinite="skip" if scaled else self.config.on_nonfinite,
            in_step=attached is not None and attached.is_stepping,
            scaler_steps=scaled,
        )

    def _completed(
        self, given: Given, grad_scale: Tensor | None, loss: Tensor | float | None
    ) -> Given:
        """The same with the loss, and the scale unless a scaler's could be taken off."""
        if loss is not None:
            self.observe_loss(loss)
        if grad_scale is None and given.scaler_steps and self._scaler is not None:
            leave = self._core.machinery.effect.unscales(in_step=given.in_step)
            grad_scale = self._scaler.settle(leave=leave)
        if grad_scale is None and self._losses is None:
            return given
        mean = None
        if self._losses is not None:
            mean = self._losses.mean(self._core.machinery.device)
        return replace(given, grad_scale=grad_scale, loss=mean)

    @_outside_inference
    def flush(self) -> dict[str, float]:
        """What to log of the steps since the last call, in one copy to the host.

        Returns:
            `clip/grad_norm`, `clip/limit`, `clip/coef`, `clip/clipped_norm`: means over the steps
            that were finite; `clip/grad_norm_max`; `clip/clipped`, `clip/skipped`,
            `clip/nonfinite`, `clip/dropped`: how many; `clip/clip_rate` of all steps so far and
            `clip/clip_rate_window` of these; `clip/grad_norms/<parameter>`,
            `clip/grad_norms/group/<name>` and `clip/update_norm`: means, where configured;
            `clip/update_ratio`: the latter over the mean norm of the parameters. Empty without a
            step.
        """
        self._core.watch.check(in_clip=False)
        return self.recorder.flush()

    def close(self) -> None:
        """End training: write the flight record, and expect no clip before a step any more.

        The next `clip` begins anew.
        """
        self._core.watch.end()
        self.recorder.close()

    def on_spike(self, call: Callable[[Spike], object]) -> None:
        """Call this at every alarm, in place of a warning; needs `alarm:` in the configuration.

        It is called inside `clip`, before the step's gradients are looked at; on every rank, at the
        same step. What it raises ends the step.

        Args:
            call: Gets a `Spike`, at most `log.every_n_steps` (10) steps after it was to be seen.

        Raises:
            ConfigError: If there is no such section.
        """
        if self.config.alarm is None:
            msg = (
                "on_spike: the configuration has no section alarm, so nothing would ever be told; "
                "allowed: with it. Add `alarm: {}`."
            )
            raise ConfigError(msg)
        self._core.listeners.append(call)

    def saved_to(self, path: str | PathLike[str]) -> None:
        """Say that a checkpoint of the steps so far was saved, or was loaded, here.

        Alarms name the last one from before the trouble. Adapters call this by themselves.

        Args:
            path: A file or folder, or an address such as `s3://...`. One that is named again was
                written over; one that is gone when an alarm is told isn't named.
        """
        self.recorder.saved_to(str(path))

    @property
    def summary(self) -> str:
        """Policies, parameters and layout: `auto on 4 parameters of AdamW, not sharded`."""
        count, stepper = len(self._core.machinery.plan.shapes), self._core.sources.stepper
        if self._engine_layout is not None:
            stepped, lies = " of a DeepSpeed engine", self._engine_layout.kind
        else:
            stepped = f" of {stepper}" if stepper else ""
            lies = "sharded over ranks" if self._core.machinery.layout.reduces else "not sharded"
        parameters = f"{count:,} parameter{'s' * (count != 1)}{stepped}"
        return f"{self.config.summary} on {parameters}, {lies}"

    def plot(self, axes: Any | None = None) -> Any:
        """Draw the norms and limits of the last steps, as in a notebook; reads them on the host.

        Args:
            axes: Of matplotlib, to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            ConfigError: If no step was made yet, or matplotlib isn't installed.
        """
        return plot_steps(self.recorder.steps(), axes)

    @property
    def parameters(self) -> list[Parameter]:
        """What this rank holds of what is clipped, in a fixed order."""
        return list(self._core.current().plan.parameters.values())

    @property
    def recorder(self) -> Recorder:
        """The last steps: `recorder.steps()` as rows, `recorder.write()` as a file."""
        return self._core.recorder

    @property
    def last_record(self) -> ClipRecord | None:
        """What the last `clip` returned, also one made by `attach`; None before it."""
        return self._core.last_record

    @property
    def norm_type(self) -> float:
        """The p of the norm that records hold: that of the first policy on norms, else 2."""
        return self._core.machinery.plan.recorded

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

    def attach(
        self, optimizer: Optimizer | Any, *, clip: Callable[..., object] | None = None
    ) -> Handle:
        """Clip by itself before every `optimizer.step()`, also with a closure or a GradScaler.

        A closure's gradients are clipped each time it is evaluated (LBFGS), and the step is counted
        once. An ordinary optimizer isn't stepped on an overflow, which is seen and counted only
        if the clipper was built with the `scaler`.

        Args:
            optimizer: The one this clipper was built with: an optimizer, or a DeepSpeed engine,
                which then clips inside `engine.step()` with this clipper alone.
            clip: For adapters: called in place of this clipper's `clip`, with its `grad_scale` and
                `repeat`. It sees to it that a step that was clipped by hand isn't clipped again.

        Returns:
            A handle; `handle.remove()` stops it.

        Raises:
            ConfigError: If the clipper is attached already or was built with another optimizer, or
                a DeepSpeed engine's threshold disagrees; in a step, if `clip` was called for it.
        """
        if self._engine_layout is not None:
            return clip_inside_step(self._core, self._engine_layout, optimizer, self._of_engine)
        attached = None if self._attached is None else self._attached()
        if attached is not None and attached.is_on:
            msg = (
                "attach: this clipper is attached already, so each step would be clipped and "
                "counted twice; allowed: one attachment. Leave the second out, or call remove() of "
                "the handle that the first returned."
            )
            raise ConfigError(msg)
        attached = Attached(
            self._core,
            optimizer,
            clip or self.clip,
            partial(self._given, "clip", 1.0),
            losses=self._losses,
            scaler=self._scaler,
            once=clip is not None,
        )
        self._attached = weakref.ref(attached)
        return attached

    def _of_engine(self, grad_scale: Tensor | None) -> Given:
        """What is known of the gradients inside a DeepSpeed engine's step."""
        return self._completed(self._given("clip", 1.0), grad_scale, None)

    def go_on_from(
        self, before: Iterable[GradientClipper], *, same_run: bool = True
    ) -> GradientClipper | None:
        """Take the place of other clippers, as where an optimizer is made anew while training.

        What they remember of the parameters that are now in this one is taken over by name:
        adaptive state, memory of elements, counts and records. Parameters that are new to it, and
        policies that are others, start fresh.

        Args:
            before: Those that are done with, of the same model. Of several, the one that shares
                most parameters gives what isn't kept by parameter, and the counts.
            same_run: Their flight record goes on too; False begins a new file.

        Returns:
            Which of them gave the counts; None if none shares a parameter.
        """
        cores = {clipper._core: clipper for clipper in before}
        last = self._core.go_on_from(list(cores), same_run=same_run)
        self._beginning = self._core.begin()
        return None if last is None else cores[last]

    @_outside_inference
    def state_dict(self) -> dict[str, Any]:
        """Adaptive state and counts: plain tensors, numbers, strings, lists and dicts.

        Every rank must call it where a policy remembers single elements (`spam`, `uclip`).
        """
        on, core = self._core.current(), self._core
        return pack(on.plan.rules, core.states, on.memory, core.recorder.tally)

    @_outside_inference
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, saved at any world size. Every rank must call it.

        Raises:
            ConfigError: If policies or parameters are others, or it holds what no steps lead to,
                or ranks that share a model load different states; nothing is changed then.
        """
        self.checked(state)()

    @torch.no_grad()
    def checked(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a `state_dict` and change nothing, as where one of several may be refused.

        Every rank must call it.

        Returns:
            What continues from it.

        Raises:
            ConfigError: As `load_state_dict`.
        """
        on, core = self._core.current(), self._core
        try:
            found = unpack(state, on.plan.rules, core.states, on.memory, on.device)
        except Exception:
            core.compare_loaded(None)  # other ranks wait for this one
            raise
        core.compare_loaded((found.states, found.counts), found.step)

        def take_in() -> None:
            core.recorder.restart(found.step, found.counts)
            core.states = found.states
            if on.memory is not None:
                on.memory.replace(found.elements)

        return take_in


def _copied(
    cls: type[GradientClipper],
    config: ClipConfig,
    how: dict[str, Any],
    state: dict[str, Any],
    was_attached: bool,
) -> GradientClipper:
    """What copies and unpickles a clipper: hooks stay with the optimizer that they are on."""
    clipper = cls(config, **how)
    clipper.load_state_dict(state)
    if was_attached:
        _logger.warning(
            "gradclip: a clipper that is attached was copied, and its copy isn't attached, so "
            "steps of the copied optimizer aren't clipped. Call attach() of the copy."
        )
    return clipper
