"""One prepared optimizer: clipped once per step, whoever asks first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from accelerate_clip.engine import ClippedEngine
from accelerate_clip.private import hold_schedule, is_fsdp2
from accelerate_clip.refuse import refuse_closure, refuse_unreduced
from gradclip import ClipConfig, ClipRecord, GradientClipper, clip_grad_norm_, get_total_norm
from gradclip.adapters import (
    GradientSnapshot,
    OncePerStep,
    Patches,
    follow_steps,
    weak,
    weakly,
    window_share,
)

__all__ = ["Clipped", "ClippedOptimizer", "accumulated_norm", "micro_batch_contexts", "unwrapped"]


class ClippedOptimizer:
    """A prepared optimizer and its clipper.

    The script may ask to clip (`accelerator.clip_grad_norm_`); the optimizer's own hook asks right
    before it steps, so that a script that never does is clipped as well.

    Args:
        config: What to do.
        named: Names for the optimizer's parameters.
        prepared: The optimizer that `accelerator.prepare` returned.
        in_step: Called with this for each step; the step is made within the result.
        after_step: Called with this after each step, also one that is withheld or overflows.

    Attributes:
        clipper: What clips it.

    Raises:
        ConfigError: If the configuration isn't valid for these parameters.
        LayoutError: If the parameters are laid out in a way that isn't supported.
    """

    def __init__(
        self,
        config: ClipConfig,
        named: Sequence[tuple[str, Parameter]],
        prepared: AcceleratedOptimizer,
        in_step: Callable[[ClippedOptimizer], AbstractContextManager[None]],
        after_step: Callable[[ClippedOptimizer], object],
    ) -> None:
        raw = unwrapped(prepared)
        self.clipper = GradientClipper(config, named, raw, scaler=prepared.scaler)
        # Both keep this.
        self._raw, self._prepared = weak(raw), weak(prepared)
        self._in_step = in_step
        self._after_step = after_step
        self._batches = 0
        self._window = _Window(prepared.gradient_state)
        self._withheld: Tensor | bool | None = None
        self._patches = Patches()
        # First, to see what a fused step was told before that is taken back.
        follow_steps(raw, self._patches, after=self._see_withheld)
        self._once = OncePerStep(
            self.clipper, raw, share=self._window.share, after_step=weakly(self._end_step)
        )
        self._patches.callback(self._once.remove)
        self._patches.wrap(prepared, "step", self._clip_and_step)

    @property
    def prepared(self) -> AcceleratedOptimizer | None:
        """The optimizer; None once it is gone."""
        return self._prepared()

    @property
    def steps(self) -> int:
        """Steps that the optimizer has made, withheld ones too."""
        return self._once.steps

    @property
    def parameters(self) -> list[Parameter]:
        """The optimizer's parameters as they are now; those that were clipped once it is gone."""
        raw = self._raw()
        if raw is None:
            return self.clipper.parameters
        return [p for group in raw.param_groups for p in group["params"]]

    @property
    def awaits_step(self) -> bool:
        """Whether gradients have been clipped that the optimizer is yet to step with."""
        return self._once.is_done

    def clip(self) -> ClipRecord:
        """Clip, unless this step's gradients have been clipped already; the step's record."""
        return self._once.clip()

    def expect_new(self) -> None:
        """Say that other gradients are in place, or will be, than those that were clipped."""
        self._once.expect_new()

    def resume(self, steps: int) -> None:
        """Go on after this many steps, of another run."""
        self._once.steps = steps
        self._once.expect_new()

    @contextmanager
    def backward(self, loss: Tensor | None) -> Iterator[None]:
        """Around one `accelerator.backward`: count it, observe its loss, and see what it wrote."""
        self.clipper.batch, self._batches = self._batches, self._batches + 1
        if self.clipper.watches_loss and loss is not None:
            # The script may have zeroed gradients without a step; their losses are still waiting.
            is_first = all(p.grad is None for p in self.parameters)
            self.clipper.observe_loss(loss, first=is_first)
        before = GradientSnapshot(self.parameters) if self.awaits_step else None
        yield
        self._window.backwards += 1
        if before is not None and before.is_changed:
            self.expect_new()

    def detach(self) -> None:
        """Stop clipping before steps."""
        self._patches.undo()

    def _clip_and_step(self, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """What the prepared optimizer's step is now."""
        prepared = self.prepared
        assert prepared is not None
        if not prepared.gradient_state.sync_gradients:
            step(*args, **kwargs)
            return
        refuse_closure(prepared, *args, **kwargs)
        self._withheld = None
        try:
            with self._in_step(self), self._once.in_step():
                step(*args, **kwargs)
        except BaseException:
            self._window.backwards = 0  # as after a step that was made
            raise
        if self._withheld is not None:
            hold_schedule(prepared, self._withheld)

    @torch.no_grad()
    def _see_withheld(self, raw: Optimizer, *_: object) -> None:
        """Find out whether the step just made was withheld, for the schedule."""
        record = self.clipper.last_record
        if self.clipper.config.schedule_on_skip == "advance" or record is None:
            return
        # Only a withheld step leaves no gradient at all, or is told so on the device: no other
        # has its record read on the host, and that one when the schedule asks.
        told = getattr(raw, "found_inf", None) is not None
        may_be = told or all(p.grad is None for p in self.parameters)
        self._withheld = record.skipped if may_be else False

    def _end_step(self) -> None:
        self._window.backwards = 0
        self._after_step(self)


class _Window:
    """What Accelerate accumulates for one step.

    Args:
        state: Accelerate's, of accumulation.

    Attributes:
        backwards: Since the last step.
    """

    def __init__(self, state: GradientState) -> None:
        self.backwards = 0
        self._state = state

    def share(self) -> float:
        """Batches since the last step, as a share of those Accelerate divides losses by."""
        window = self._state.num_steps
        return window_share(self.backwards or window, window)


Clipped = ClippedOptimizer | ClippedEngine
"""What has a clipper: a prepared optimizer, or a DeepSpeed engine."""


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that was given to `accelerator.prepare`."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def micro_batch_contexts(
    accelerator: Accelerator, clipped: Sequence[Clipped], divided_by: int
) -> Iterator[None]:
    """Around one backward, which is clipped by itself if `stage` is "after_backward".

    Args:
        accelerator: Whose backward it is.
        clipped: Its optimizers.
        divided_by: By how many batches the loss was divided before Accelerate divides it.

    Raises:
        ConfigError: If this backward's gradients aren't reduced over processes.
    """
    with ExitStack() as stack:
        for one in clipped:
            if one.clipper.config.stage == "after_backward":
                refuse_unreduced(accelerator)
                share = 1 / (accelerator.gradient_accumulation_steps * divided_by)
                stack.enter_context(one.clipper.micro_batch(share=share))
        yield


def accumulated_norm(accelerator: Accelerator, clipped: Sequence[Clipped]) -> Tensor:
    """The norm of gradients that aren't complete yet.

    Args:
        accelerator: While its `sync_gradients` is false.
        clipped: Of which optimizers.

    Returns:
        0-d, of this process's gradients; of all ranks' where each batch is reduced
        (`sync_each_batch`); else NaN under FSDP2, which shows none before it reduces them.
        Always NaN under DeepSpeed, which shows none at all.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return torch.tensor(math.nan, dtype=torch.float32, device=accelerator.device)
    norm_type = clipped[0].clipper.norm_type
    parameters = [p for one in clipped for p in one.parameters]
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        norm = clip_grad_norm_(parameters, math.inf, norm_type)
    elif is_fsdp2(accelerator):
        norm = torch.tensor(math.nan, dtype=torch.float32, device=accelerator.device)
    else:
        # FSDP1 holds whole gradients now, whatever its parameters are: no sum over ranks.
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
    return norm if accelerator.scaler is None else norm / accelerator.scaler.get_scale()
