"""Clipping inside `optimizer.step()`, by hooks of the optimizer and of a `GradScaler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradclip.core import Core
from gradclip.drivers.closures import refuse_closures
from gradclip.drivers.losses import Losses
from gradclip.drivers.scaler import LossScale
from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import is_engine
from gradclip.patches import Patches
from gradclip.plan.parameters import refuse_differentiable

__all__ = ["Attached"]


class Attached:
    """Clips before each step of an optimizer; with a closure, each time its backward is done.

    A `GradScaler` leaves the unscaling to a fused optimizer and tells it the scale, which is
    passed on, so that limits mean the same with and without one. What a closure returns is shown
    to policies that watch the loss, unless one was observed.

    Args:
        core: Of the clipper.
        optimizer: Before whose steps.
        clip: Called with `grad_scale` and `repeat`.
        losses: Where policies look for the loss; None if none does.
        scaler: The scaler that makes the steps, if the clipper knows one.
        once: `clip` itself sees to it that a step that was clipped by hand isn't clipped again.

    Attributes:
        is_stepping: The step is under way.

    Raises:
        ConfigError: If the optimizer has no parameter that the clipper holds, is differentiable,
            or is a DeepSpeed engine that the clipper was built without.
    """

    def __init__(
        self,
        core: Core,
        optimizer: Optimizer,
        clip: Callable[..., object],
        *,
        losses: Losses | None,
        scaler: LossScale | None,
        once: bool,
    ) -> None:
        _refuse_optimizer(core, optimizer)
        self.is_stepping = False
        self._core = core
        self._optimizer = optimizer
        self._clip_gradients = clip
        self._losses = losses
        self._once = once
        self._clipped_by_scaler = False
        self._known = core.last_record
        self._patches = Patches()
        core.machinery.effect.make_ready()
        # Where the step is compiled, this stays outside of the graph.
        hook = torch.compiler.disable(self._before_step)
        self._patches.callback(optimizer.register_step_pre_hook(hook).remove)
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
        self._clip()
        self._clipped_by_scaler = True
        try:
            yield
        finally:
            self._clipped_by_scaler = False

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found_inf = getattr(self._optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and found_inf.ndim:
            # FSDP's scaler of torch 2.13 gives shape (1,), which fused steps refuse.
            vars(self._optimizer)["found_inf"] = found_inf.reshape(())
        if self._clipped_by_scaler:  # around the scaler's step, which looks for overflows first
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            found = getattr(self._optimizer, "grad_scale", None)
            self._clip(self._core.machinery.effect.scalers_own(found))
            return None
        if self._core.config.stage == "after_backward":
            refuse_closures()
        # The optimizer evaluates the closure when and as often as it likes: clip after each.
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], self._then_clip(closure), *args[2:]), rest

    def _then_clip(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        repeat = False

        def closure_then_clip() -> Any:
            nonlocal repeat
            with torch.enable_grad():
                loss = closure()
            if loss is not None and self._losses is not None and not self._losses.any:
                self._losses.observe(loss)
            self._clip(repeat=repeat)
            repeat = True
            return loss

        return closure_then_clip

    def _clip(self, grad_scale: Tensor | None = None, *, repeat: bool = False) -> None:
        if self._core.last_record is not self._known and not self._once:
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
