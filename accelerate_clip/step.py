"""One prepared optimizer: clipped once per step, whoever asks first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from accelerate_clip.engine import EngineClipper
from accelerate_clip.private import (
    Versions,
    hold_schedule,
    keep_unscaled,
    unscale,
    unscaled,
    versions,
)
from accelerate_clip.refuse import refuse_closure, refuse_unreduced
from gradclip import ClipConfig, ClipRecord, GradientClipper, clip_grad_norm_, get_total_norm

__all__ = ["StepClipper", "accumulated_norm", "apart", "unwrapped"]


class StepClipper(GradientClipper):
    """A `GradientClipper` that clips a step's gradients only the first time it is asked to.

    The script may ask (`accelerator.clip_grad_norm_`); the optimizer's own hook asks right before
    it steps, so that a script that never does is clipped as well.

    Args:
        config: What to do.
        named: Names for the optimizer's parameters.
        prepared: The optimizer that `accelerator.prepare` returned.
        on_step: Called after each step of the underlying optimizer.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters.
        LayoutError: If the parameters are laid out in a way that isn't supported.
    """

    def __init__(
        self,
        config: ClipConfig,
        named: Sequence[tuple[str, Parameter]],
        prepared: AcceleratedOptimizer,
        on_step: Callable[[StepClipper], None],
    ) -> None:
        raw = unwrapped(prepared)
        scaler = prepared.scaler
        super().__init__(config, named_parameters=named, optimizer=raw, scaler=scaler)
        self.prepared = prepared
        self.steps = 0
        self._on_step = on_step
        self._done = False
        self._backwards = self._batches = 0
        self._clipped_in_step: bool | None = None
        self._held: Tensor | bool | None = None
        self._unscaled: Any = None
        # First, to see what the step was told before that is taken back.
        self._handles = [raw.register_step_post_hook(self._after_step), self.attach(raw)]
        self._own_step = prepared.step
        # A method of the optimizer's: schedulers bind the function they find to it anew.
        prepared.step = MethodType(lambda _, *args, **kwargs: self._step(*args, **kwargs), prepared)

    @property
    def parameters(self) -> list[Parameter]:
        """The optimizer's parameters as they are now."""
        return [p for group in self.prepared.param_groups for p in group["params"]]

    def clip(
        self,
        *,
        grad_scale: Tensor | None = None,
        loss: Tensor | float | None = None,
        share: float = 1.0,
        repeat: bool = False,
    ) -> ClipRecord:
        """Clip, unless this step's gradients have been clipped already.

        Args:
            grad_scale: 0-d factor that the gradients still carry (a loss scale).
            loss: 0-d, this step's, for policies that watch it.
            share: Batches that were accumulated, as a share of a full window's; also found out
                from the calls of `accelerator.backward`.
            repeat: One more evaluation of a closure in a step that was clipped.

        Returns:
            This step's record.
        """
        if self.last_record is None or not self._done or repeat:
            # A closure that calls `clip_grad_norm_` itself does so at every evaluation.
            repeat = repeat or self._clipped_in_step is True
            share = min(share, self._share)
            super().clip(grad_scale=grad_scale, loss=loss, share=share, repeat=repeat)
            self._clipped_in_step = None if self._clipped_in_step is None else True
            self._unscaled = unscaled(self.prepared)
            self._done = True
        else:
            keep_unscaled(self.prepared, self._unscaled)
        assert self.last_record is not None
        return self.last_record

    def unscale(self) -> None:
        """Take the loss scale off now: it may change in another optimizer's step before this."""
        if not self._done:
            unscale(self.prepared)

    def expect_new(self) -> None:
        """The gradients to come, or now in place, are not those that were clipped."""
        self._done = False

    def before_backward(self, loss: Tensor | None) -> Versions | None:
        """Observe the loss. What `after_backward` needs; None while nothing is clipped yet."""
        self.batch, self._batches = self._batches, self._batches + 1
        if self.watches_loss and loss is not None:
            # A scaler may have left a step out, whose losses are still waiting.
            self.observe_loss(loss, first=all(p.grad is None for p in self.parameters))
        return versions(self.parameters) if self._done else None

    def after_backward(self, before: Versions | None) -> None:
        """Count it, and expect new gradients if it wrote any of this optimizer's."""
        self._backwards += 1
        if before is None:
            return
        now = versions(self.parameters)
        pairs = zip(before, now, strict=False)
        if len(now) != len(before) or any(a is not b or m != n for (a, m), (b, n) in pairs):
            self._done = False

    def detach(self) -> None:
        """Stop clipping before steps."""
        for handle in self._handles:
            handle.remove()
        self.prepared.step = self._own_step

    @property
    def _share(self) -> float:
        """Batches since the last step, as a share of those Accelerate divides losses by."""
        window = self.prepared.gradient_state.num_steps
        return min(1.0, self._backwards / window) if self._backwards else 1.0

    def _step(self, *args: Any, **kwargs: Any) -> None:
        """What the prepared optimizer's step is now."""
        refuse_closure(self.prepared, *args, **kwargs)
        self._clipped_in_step = False
        try:
            self._own_step(*args, **kwargs)
        finally:
            self._clipped_in_step = None
        if self._done and self.prepared.gradient_state.sync_gradients:
            self._end_step()  # an overflow, for which the scaler left the step out
        elif self._held is not None:
            hold_schedule(self.prepared, self._held)
        self._held = None

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self.config.schedule_on_skip != "advance":
            # Only a withheld step leaves no gradient at all, or is told so on the device: no other
            # has its record read on the host, and that one when the schedule asks.
            told = getattr(unwrapped(self.prepared), "found_inf", None) is not None
            may_be = told or all(p.grad is None for p in self.parameters)
            record = self.last_record
            self._held = record.skipped if may_be and record is not None else False
        self._end_step()

    def _end_step(self) -> None:
        self.steps += 1
        self._backwards = 0
        self._done = False
        self._on_step(self)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that was given to `accelerator.prepare`."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def apart(
    accelerator: Accelerator, clippers: Sequence[StepClipper | EngineClipper], divided_by: int
) -> Iterator[None]:
    """Around one backward, which is clipped by itself if `stage` says so.

    Args:
        accelerator: Whose backward it is.
        clippers: Of its optimizers.
        divided_by: By how many batches the loss was divided before Accelerate does so.

    Raises:
        ConfigError: If this backward's gradients aren't reduced over processes.
    """
    with ExitStack() as stack:
        for clipper in clippers:
            if clipper.config.stage == "after_backward":
                refuse_unreduced(accelerator)
                share = 1 / (accelerator.gradient_accumulation_steps * divided_by)
                stack.enter_context(clipper.micro_batch(share=share))
        yield


def accumulated_norm(
    accelerator: Accelerator, clippers: Sequence[StepClipper | EngineClipper], norm_type: float
) -> Tensor:
    """The norm of gradients that aren't complete yet.

    Args:
        accelerator: While its `sync_gradients` is false.
        clippers: Of which optimizers.
        norm_type: p of the p-norm.

    Returns:
        0-d, of this process's gradients; of all ranks' where each batch is reduced
        (`sync_each_batch`); else NaN under FSDP2, which shows none before it reduces them.
        Always NaN under DeepSpeed, which shows none at all.
    """
    parameters = [p for clipper in clippers for p in clipper.parameters]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return torch.tensor(math.nan)
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        norm = clip_grad_norm_(parameters, math.inf, norm_type)
    elif accelerator.is_fsdp2:
        norm = torch.tensor(math.nan)
    else:
        # FSDP1 holds whole gradients now, whatever its parameters are: no sum over ranks.
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
    return norm if accelerator.scaler is None else norm / accelerator.scaler.get_scale()
