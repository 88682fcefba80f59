"""Effect: scale in place or inside the optimizer's step, change elements, or withhold the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradclip.devices import has_float64
from gradclip.effect.elements import ElementMemory
from gradclip.effect.fused import FusedStep, has_own_step, takes_factors
from gradclip.errors import ConfigError
from gradclip.patches import Patches
from gradclip.plan.plan import Plan
from gradclip.private import takes_scale
from gradclip.types import Given, Grads, Kernel, Verdict
from gradclip.weak import weak

__all__ = ["Effect", "apply"]


def apply(
    verdict: Verdict,
    grads: Grads,
    plan: Plan,
    kernel: Kernel,
    memory: ElementMemory | None,
    grad_scale: Tensor | None = None,
) -> None:
    """Carry out a verdict on this rank's gradients.

    A step is withheld by dropping the gradients (`.grad = None`): every torch optimizer then
    leaves parameters and state, weight decay included, as they are.

    Args:
        verdict: The decision, equal on every rank.
        grads: All local gradients, one list per slot of the plan.
        plan: Whose gradients to drop, and which of them each coefficient is for.
        kernel: What writes this rank's gradients.
        memory: What changes elements and remembers them, for a verdict with edits.
        grad_scale: 0-d factor that the gradients still carry.
    """
    if verdict.withheld:
        _drop(plan)
        return
    kernel.scale_(grads if plan.unit_map is None else plan.unit_map.units(grads), verdict.coef)
    for edit in verdict.edits:
        assert memory is not None
        memory.edit_(edit, grads, kernel, grad_scale)


class Effect:
    """Which ways a clipper has to carry out a verdict, and the one it takes.

    Args:
        mode: `apply` of the configuration.
        plan: The parameters and their slots.
        optimizer: Whose step follows, if one was given.
        reads_block: Reading a value on the host waits for a device, as the kernel says.
        one_by_one: Each backward's gradients are clipped before they join the others.
        before: The effect that this one replaces, of the same optimizer.

    Attributes:
        withholds_on_device: What is withheld is withheld without the host: a step by a flag that
            the optimizer's kernel reads, a micro-batch by zeros in the place of its gradients.

    Raises:
        ConfigError: If the mode is "fold" and one factor in the optimizer's step can't do it.
    """

    def __init__(
        self,
        mode: Literal["auto", "in_place", "fold"],
        plan: Plan,
        optimizer: Any | None,
        *,
        reads_block: bool,
        one_by_one: bool = False,
        before: Effect | None = None,
    ) -> None:
        no_flag = _why_no_flag(plan, optimizer)
        why_not = no_flag
        if plan.split_by is not None:
            why_not = f"policy {plan.split_by!r} asks for more than one coefficient"
        if one_by_one:
            why_not = "stage is 'after_backward', which clips before the step"
        if mode == "fold" and why_not is not None:
            msg = (
                f"apply is 'fold', and {why_not}; allowed: a fused Adam, AdamW, SGD or Adagrad of "
                "torch, all of whose parameters are held to one coefficient at stage 'step'. Set "
                "apply to 'auto' or 'in_place'."
            )
            raise ConfigError(msg)
        self._mode = mode
        self._plan = plan
        self._folds_by_itself = why_not is None and not has_own_step(optimizer)
        self._optimizer = weak(optimizer)
        self._reads_block = reads_block
        self._one_by_one = one_by_one
        self._takes_flag = mode != "in_place" and no_flag is None
        self._flags_step = mode == "fold" or (self._takes_flag and reads_block)
        # Micro-batches need no optimizer that takes a flag: one that is withheld adds zeros.
        self.withholds_on_device = reads_block if one_by_one else self._flags_step
        self._step: FusedStep | None = None if before is None else before._step

    def folds(self, *, in_step: bool) -> bool:
        """Whether the coefficient goes into the optimizer's step.

        Args:
            in_step: The step is under way. With `apply: auto` it only folds then, as nobody can
                look at gradients in between that aren't clipped yet.
        """
        return self._mode == "fold" or (self._mode == "auto" and self._folds_by_itself and in_step)

    def unscales(self, *, in_step: bool) -> bool:
        """Whether gradients may keep a scaler's factor until the step: nobody drops them."""
        return self.folds(in_step=in_step) and self._flags_step

    def scalers_own(self, scale: Tensor | None) -> Tensor | None:
        """The factor found on the optimizer if a scaler set it, None if it was asked for here.

        That stays there where the step it was asked of raised.
        """
        ours = self._step is not None and self._step.asked(scale)
        return None if ours else scale

    def make_ready(self, patches: Patches) -> None:
        """Register hooks with the optimizer, which can't be done while it runs others.

        Args:
            patches: Whose `undo` takes them off.
        """
        if self._takes_flag:
            patches.callback(self._fused().remove)

    def write(
        self,
        verdict: Verdict,
        grads: Grads,
        kernel: Kernel,
        memory: ElementMemory | None,
        given: Given,
    ) -> None:
        """Do what was decided, or ask the optimizer's step to; see `apply` and `FusedStep.ask`."""
        folds = self.folds(in_step=given.in_step) and not verdict.withheld
        # A micro-batch says nothing of the step: other ones may still join the sum.
        if not self._one_by_one:
            divisor = self._divisor(verdict) if folds else None
            self._ask(divisor, verdict.skip, given)
        if folds:
            return
        if self.withholds_on_device and verdict.skip is not None:
            # Gradients of a step that won't be taken stay as they are.
            verdict = replace(verdict, coef=torch.where(verdict.skip, 1.0, verdict.coef))
        apply(verdict, grads, self._plan, kernel, memory, given.grad_scale)

    def withhold(self, skip: Tensor | None, given: Given) -> None:
        """Withhold the step if `skip`, 0-d bool, says so, and do nothing to gradients else."""
        self._ask(None, skip, given)
        if not self._flags_step and skip is not None and bool(skip):
            _drop(self._plan)

    def _divisor(self, verdict: Verdict) -> Tensor | None:
        """What the step divides gradients by, 0-d float64; None for 1, where the host knows."""
        divisor = verdict.coef.min().reciprocal()
        return divisor if self._reads_block or bool(divisor != 1) else None

    def _ask(self, divisor: Tensor | None, skip: Tensor | None, given: Given) -> None:
        flag = skip if self._flags_step else None
        # Also to take back what was asked for gradients that no step followed.
        asks = divisor is not None or flag is not None or self._step is not None
        if asks and self._optimizer() is not None:  # once it is gone, no step follows
            self._fused().ask(divisor, flag, scaler_steps=given.scaler_steps)

    def _fused(self) -> FusedStep:
        if self._step is None or not self._step.is_on:
            optimizer = self._optimizer()
            assert optimizer is not None
            self._step = FusedStep(optimizer)
        return self._step


def _drop(plan: Plan) -> None:
    for parameter in plan.parameters.values():
        parameter.grad = None


def _why_no_flag(plan: Plan, optimizer: Any | None) -> str | None:
    """What keeps the optimizer's own step from being withheld for all that is clipped."""
    if optimizer is None:
        return "the clipper has no optimizer of torch's (none, a layout, or a DeepSpeed engine)"
    if all(group.get("fused") for group in optimizer.param_groups) and not takes_scale(optimizer):
        return f"this torch's fused {type(optimizer).__name__} reads no factor"
    if not takes_factors(optimizer):
        return f"{type(optimizer).__name__} wasn't built with fused=True, or can't be"
    held = set(plan.parameters.values())
    lacking = [p.device.type for p in held if not has_float64(p.device)]
    if lacking:
        # mps has fused kernels, which leave both factors unread (torch 2.13,
        # aten/src/ATen/native/mps/operations/FusedOptimizerOps.h).
        return f"parameters are on {lacking[0]}, whose fused kernels read no factor"
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.requires_grad and p not in held for p in stepped):
        return "the optimizer steps parameters that this clipper doesn't hold"
    return None
