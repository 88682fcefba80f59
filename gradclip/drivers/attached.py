"""A plain PyTorch loop: clipping inside `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradclip.drivers.micro_batches import refuse_closures
from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import is_engine
from gradclip.plan.parameters import refuse_differentiable
from gradclip.types import Handle

if TYPE_CHECKING:
    from gradclip.clipper import GradientClipper

__all__ = ["clip_before_step"]


def clip_before_step(
    clipper: GradientClipper, optimizer: Optimizer, clip: Callable[..., object] | None = None
) -> Handle:
    """Register a step pre-hook that clips; with a closure, clip whenever its backward is done.

    A `GradScaler` leaves the unscaling to a fused optimizer and tells it the scale, which is
    passed on, so that limits mean the same with and without one. What a closure returns is shown
    to policies that watch the loss, unless one was observed.

    Args:
        clipper: Whose parameters are clipped.
        optimizer: Before whose steps.
        clip: Called in place of the clipper's own `clip`, with `grad_scale` and `repeat`. It may be
            called by hand as well, so that a second call in a step is its concern.

    Raises:
        ConfigError: If the clipper is attached already; the optimizer has no parameter that it
            holds, is differentiable, or is a DeepSpeed engine that it was built without.
    """
    if clipper._is_attached:
        msg = (
            "attach: this clipper is attached already, so each step would be clipped and counted "
            "twice; allowed: one attachment. Leave the second out, or call remove() of the handle "
            "that the first returned."
        )
        raise ConfigError(msg)
    if is_engine(optimizer):
        msg = (
            "attach got a DeepSpeed engine, and this clipper was built without it; build it "
            "with the engine, as in GradientClipper(policy, optimizer=engine).attach(engine)."
        )
        raise ConfigError(msg)
    refuse_differentiable(optimizer)
    held = {id(p) for p in clipper._on.plan.parameters.values()}
    if not any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
        msg = (
            f"attach got a {type(optimizer).__name__} that shares no parameter with this "
            "clipper; attach the optimizer whose parameters the clipper was built with."
        )
        raise ConfigError(msg)
    return _Attached(clipper, optimizer, clip)


class _Attached:
    """The hooks, and whether a scaler's step has clipped already."""

    def __init__(
        self,
        clipper: GradientClipper,
        optimizer: Optimizer,
        clip: Callable[..., object] | None,
    ) -> None:
        self._clipper = clipper
        self._optimizer = optimizer
        self._clip_once = clip
        self._clipped = False
        self._known = clipper.last_record
        clipper._on.effect.make_ready()
        # Where the step is compiled, this stays outside of the graph.
        hook = torch.compiler.disable(self._before_step)
        self._undo: list[Callable[[], None]] = [optimizer.register_step_pre_hook(hook).remove]
        self._undo.append(clipper._loss_scale.around_step(self._around_scaler_step))
        clipper._is_attached = True

    def remove(self) -> None:
        """Clip no more."""
        if self._undo:
            self._clipper._is_attached = False
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def _around_scaler_step(self) -> Iterator[None]:
        self._clip()
        self._clipped = True
        try:
            yield
        finally:
            self._clipped = False

    def _before_step(
        self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found_inf = getattr(self._optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and found_inf.ndim:
            # FSDP's scaler of torch 2.13 gives shape (1,), which fused steps refuse.
            vars(self._optimizer)["found_inf"] = found_inf.reshape(())
        if self._clipped:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip(getattr(self._optimizer, "grad_scale", None))
            return None
        if self._clipper.config.stage == "after_backward":
            refuse_closures()
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], self._then_clip(closure), *args[2:]), rest

    def _then_clip(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        repeat = False

        def closure_then_clip() -> Any:
            nonlocal repeat
            with torch.enable_grad():
                loss = closure()
            clipper = self._clipper
            if loss is not None and clipper.watches_loss and not clipper.has_loss:
                clipper.observe_loss(loss)
            self._clip(repeat=repeat)
            repeat = True
            return loss

        return closure_then_clip

    def _clip(self, grad_scale: Tensor | None = None, *, repeat: bool = False) -> None:
        clipper = self._clipper
        if clipper.last_record is not self._known and self._clip_once is None:
            msg = (
                "clip() was called since the last step and the clipper is attached, so this step "
                "would be clipped and counted twice; allowed: one of the two. Leave clip() out, "
                "or call remove() of the handle that attach returned."
            )
            raise ConfigError(msg)
        clipper._on.effect.in_step = True
        try:
            clip = clipper.clip if self._clip_once is None else self._clip_once
            clip(grad_scale=grad_scale, repeat=repeat)
        finally:  # which is another one if parameters were added
            clipper._on.effect.in_step = False
            self._known = clipper.last_record
