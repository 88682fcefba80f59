"""A `GradScaler` that scales the loss: gradients are unscaled once, and overflows are seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gradclip.errors import ConfigError
from gradclip.patches import Patches
from gradclip.private import is_unscaled
from gradclip.weak import weak, weakly

__all__ = ["LossScale"]


class LossScale:
    """A scaler and the optimizer whose gradients it scales.

    Args:
        scaler: The one that scales the loss and makes the optimizer's steps.
        optimizer: The one that is handed to `scaler.step`.
        in_engine: It is a DeepSpeed engine's.

    Attributes:
        scaler: The scaler.

    Raises:
        ConfigError: If there is no optimizer, or a DeepSpeed engine, which scales by itself.
    """

    def __init__(self, scaler: GradScaler, optimizer: Any, *, in_engine: bool) -> None:
        self.scaler = scaler
        self._optimizer = weak(optimizer)
        if in_engine or optimizer is None:
            found = "a DeepSpeed engine, which scales by itself" if in_engine else "no optimizer"
            msg = (
                f"scaler is given with {found}; allowed: a GradScaler and the optimizer that its "
                "step() is called with. Give that optimizer, or leave scaler out."
            )
            raise ConfigError(msg)

    @property
    def is_live(self) -> bool:
        """Whether it scales anything."""
        return self.scaler.is_enabled()

    @property
    def factor(self) -> Tensor:
        """What backward's gradients are multiplied by, 0-d float32, without a host read."""
        return self.scaler.scale(torch.ones((), dtype=torch.float32, device=self._device))

    def settle(self, *, leave: bool) -> Tensor | None:
        """Unscale the gradients, unless that was done in this step.

        Args:
            leave: Leave them scaled if the optimizer's own step can unscale them.

        Returns:
            The factor that gradients still carry, 0-d float32; None if they carry none.
        """
        optimizer = self._optimizer()
        if optimizer is None or is_unscaled(self.scaler, optimizer):
            return None
        # A sharded scaler tells all ranks of an overflow only while it unscales.
        if leave and type(self.scaler).unscale_ is GradScaler.unscale_:
            return self.factor
        self.scaler.unscale_(optimizer)
        return None

    def around_step(
        self, patches: Patches, clip: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Do something around each `scaler.step` of this optimizer, overflow or not.

        Args:
            patches: Which undo it.
            clip: A method that gives the context the step runs in; the optimizer keeps its object
                alive.
        """
        known, one, clip_weakly = weak(self), self._optimizer, weakly(clip)

        # The scaler keeps this, and may serve other optimizers later.
        def clip_and_step(
            step: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any
        ) -> Any:
            scale = known()
            ours = scale is not None and optimizer is one() and scale.is_live
            with (clip_weakly() if ours else None) or nullcontext():
                return step(optimizer, *args, **kwargs)

        patches.wrap(self.scaler, "step", clip_and_step)

    @property
    def _device(self) -> torch.device:
        optimizer = self._optimizer()
        parameters = [] if optimizer is None else optimizer.param_groups[0]["params"]
        return parameters[0].device if parameters else torch.device("cpu")
