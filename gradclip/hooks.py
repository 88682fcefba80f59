"""A plain PyTorch loop: clipping inside `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from gradclip.errors import ConfigError

if TYPE_CHECKING:
    from gradclip.engine import GradientClipper

__all__ = ["clip_before_step"]


def clip_before_step(clipper: GradientClipper, optimizer: Optimizer) -> RemovableHandle:
    """Register a step pre-hook that clips; with a closure, clip when its backward is done.

    A `GradScaler` leaves the unscaling to a fused optimizer and tells it the scale, which is
    passed on, so that limits mean the same with and without one. What a closure returns is shown
    to policies that watch the loss, unless one was observed.

    Raises:
        ConfigError: If the optimizer evaluates its closure several times a step.
    """
    if isinstance(optimizer, LBFGS):
        msg = (
            "attach got LBFGS, which evaluates its closure several times a step and would be "
            "clipped each time; call clipper.clip() in the closure yourself, or use another "
            "optimizer."
        )
        raise ConfigError(msg)

    def clip(loss: Any = None) -> None:
        if loss is not None and clipper.watches_loss and not clipper.has_loss:
            clipper.observe_loss(loss)
        clipper.clip(grad_scale=getattr(optimizer, "grad_scale", None))

    def before_step(
        _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            clip()
            return None
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], _then(closure, clip), *args[2:]), rest

    return optimizer.register_step_pre_hook(before_step)


def _then(closure: Callable[[], Any], clip: Callable[[Any], None]) -> Callable[[], Any]:
    def closure_then_clip() -> Any:
        with torch.enable_grad():
            loss = closure()
        clip(loss)
        return loss

    return closure_then_clip
