"""Clipping inside `optimizer.step()`, by hooks of the optimizer and of a `GradScaler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradclip.changes import GradientSnapshot
from gradclip.core import Core
from gradclip.drivers.closures import look_and_write, refuse_closures
from gradclip.drivers.losses import Losses
from gradclip.drivers.scaler import LossScale
from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import is_engine
from gradclip.patches import Patches
from gradclip.plan.parameters import refuse_differentiable
from gradclip.steps import claim_steps, closure_place, follow_steps
from gradclip.types import Given, Step

__all__ = ["Attached"]


class Attached:
    """Clips before each step of an optimizer; with a closure, each time its backward is done.

    Gradients that are there before a closure is evaluated are clipped first: SAM climbs by them,
    and some optimizers take a closure and don't evaluate it. Those that the step before left
    behind are not: they are clipped already.

    A `GradScaler` leaves the unscaling to a fused optimizer and tells it the scale, which is
    passed on, so that limits mean the same with and without one. What a closure returns is shown
    to policies that watch the loss, unless one was observed.

    Args:
        core: Of the clipper.
        optimizer: Before whose steps.
        clip: Called with `grad_scale` and `repeat`.
        given: Gives what is known of the gradients that are in place, but for the loss.
        losses: Where policies look for the loss; None if none does.
        scaler: The scaler that makes the steps, if the clipper knows one.
        once: `clip` itself sees to it that a step that was clipped by hand isn't clipped again.

    Attributes:
        is_stepping: The step is under way.

    Raises:
        ConfigError: If the optimizer has no parameter that the clipper holds, is differentiable,
            runs no hooks, has a clipper attached already, or is a DeepSpeed engine that the clipper
            was built without.
    """

    def __init__(
        self,
        core: Core,
        optimizer: Optimizer,
        clip: Callable[..., object],
        given: Callable[[], Given],
        *,
        losses: Losses | None,
        scaler: LossScale | None,
        once: bool,
    ) -> None:
        _refuse_optimizer(core, optimizer)
        self.is_stepping = False
        self._core = core
        self._clip_gradients = clip
        self._given = given
        self._losses = losses
        self._once = once
        self._clipped_by_scaler = False
        self._known = core.last_record
        self._evaluations = 0  # of this step's closure
        self._found: Step | None = None  # in place before the closure was evaluated
        self._left: GradientSnapshot | None = None  # by the last step with a closure
        self._patches = Patches()
        try:
            claim_steps(optimizer, self._patches, "a GradientClipper that is attached")
            core.machinery.effect.make_ready(self._patches)
            family = follow_steps(
                optimizer, self._patches, before=self._before_step, after=self._after_step
            )
        except Exception:
            self._patches.undo()
            raise
        core.watch.begin(family, core.machinery.plan.parameters)
        self._patches.callback(core.watch.end)
        core.sources.let_go()
        self._patches.callback(core.sources.hold)
        if scaler is not None:
            scaler.around_step(self._patches, self._around_scaler_step)

    @property
    def is_on(self) -> bool:
        """Whether it still clips."""
        return self._patches.is_on

    def remove(self) -> None:
        """Clip no more."""
        self._patches.undo()

    @contextmanager
    def _around_scaler_step(self) -> Iterator[None]:
        self._core.watch.check(in_clip=True)
        self._clip()
        self._clipped_by_scaler = True
        try:
            yield
        finally:
            self._clipped_by_scaler = False

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and found_inf.ndim:
            # FSDP's scaler of torch 2.13 gives shape (1,), which fused steps refuse.
            vars(optimizer)["found_inf"] = found_inf.reshape(())
        self._core.watch.begin_step()
        if self._clipped_by_scaler:  # around the scaler's step, which looks for overflows first
            return None
        place = closure_place(type(optimizer).step, args, kwargs)
        if place is None:
            found = getattr(optimizer, "grad_scale", None)
            self._clip(self._core.machinery.effect.scalers_own(found))
            return None
        if self._core.config.stage == "after_backward":
            refuse_closures()
        self._evaluations, self._found = 0, None
        if self._has_new_gradients():
            self._clip_what_is_there()
        # The optimizer evaluates the closure when and as often as it likes: clip after each.
        if isinstance(place, str):
            return args, kwargs | {place: self._then_clip(kwargs[place])}
        return (*args[:place], self._then_clip(args[place]), *args[place + 1 :]), kwargs

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._core.watch.end_step()
        if closure_place(type(optimizer).step, args, kwargs) is None:
            self._left = None
            return
        if self._found is not None:
            with torch.no_grad():
                if self._evaluations:
                    self._core.amend(self._found)
                else:
                    self._core.commit(self._found)
            self._found = None
        elif not self._evaluations and self._has_new_gradients() and not self._is_by_hand:
            msg = (
                f"{type(optimizer).__name__} stepped without evaluating its closure, and a policy "
                "watches the loss that the closure returns, so this step went unclipped; allowed: "
                "step() without a closure. Leave it out, or set watch to 'norm'."
            )
            raise ConfigError(msg)
        self._known = self._core.last_record
        self._left = GradientSnapshot(self._core.machinery.plan.parameters.values())

    @property
    def _is_by_hand(self) -> bool:
        """Whether `clip()` was called since the last step."""
        return self._core.last_record is not self._known

    def _has_new_gradients(self) -> bool:
        """Whether there are gradients, other ones than the last step left behind."""
        if self._left is not None and not self._left.is_changed:
            return False
        return any(p.grad is not None for p in self._core.machinery.plan.parameters.values())

    def _clip_what_is_there(self) -> None:
        """Clip gradients that the optimizer may use before it evaluates the closure, or instead."""
        if self._losses is not None or self._is_by_hand:
            return  # of which no loss is known
        self.is_stepping = True
        try:
            with torch.no_grad():
                self._found = look_and_write(self._core, self._given(), self._core.begin())
        finally:
            self.is_stepping = False

    def _then_clip(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_clip() -> Any:
            with torch.enable_grad():
                loss = closure()
            is_loss = isinstance(loss, Tensor | float | int)
            if is_loss and self._losses is not None and not self._losses.any:
                self._losses.observe(loss)
            self._clip(repeat=self._evaluations > 0)
            self._evaluations += 1
            return loss

        return closure_then_clip

    def _clip(self, grad_scale: Tensor | None = None, *, repeat: bool = False) -> None:
        if self._is_by_hand and not self._once:
            msg = (
                "clip() was called since the last step and the clipper is attached, so this step "
                "would be clipped and counted twice; allowed: one of the two. Leave clip() out, "
                "or call remove() of the handle that attach returned."
            )
            raise ConfigError(msg)
        self.is_stepping = True
        try:
            self._clip_gradients(grad_scale=grad_scale, repeat=repeat)
        finally:
            self.is_stepping = False
            self._known = self._core.last_record


def _refuse_optimizer(core: Core, optimizer: Optimizer) -> None:
    if is_engine(optimizer):
        msg = (
            "attach got a DeepSpeed engine, and this clipper was built without it; build it "
            "with the engine, as in GradientClipper(policy, optimizer=engine).attach(engine)."
        )
        raise ConfigError(msg)
    refuse_differentiable(optimizer)
    held = set(core.machinery.plan.parameters.values())
    if not any(p in held for group in optimizer.param_groups for p in group["params"]):
        msg = (
            f"attach got a {type(optimizer).__name__} that shares no parameter with this "
            "clipper; attach the optimizer whose parameters the clipper was built with."
        )
        raise ConfigError(msg)
