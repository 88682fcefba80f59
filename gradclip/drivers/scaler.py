"""A `GradScaler` that scales the loss: gradients are unscaled once, and overflows are seen.

Read in torch 2.13 (`torch/amp/grad_scaler.py`): the only place of the engine that
touches what is private there.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from gradclip.errors import ConfigError

__all__ = ["LossScale", "Scalers"]

Around = Callable[[], AbstractContextManager[None]]


class LossScale:
    """A scaler and the optimizer whose gradients it scales.

    Args:
        scaler: The one that scales the loss and makes the optimizer's steps; None for none.
        optimizer: The one that is handed to `scaler.step`.
        in_engine: It is a DeepSpeed engine's.

    Raises:
        ConfigError: If there is a scaler and no optimizer, or a DeepSpeed engine, which scales by
            itself.
    """

    def __init__(self, scaler: GradScaler | None, optimizer: Any, *, in_engine: bool) -> None:
        # A scaler that isn't enabled stands for none.
        self._scaler = GradScaler(enabled=False) if scaler is None else scaler
        self._is_given = scaler is not None
        self._optimizer = optimizer
        if scaler is not None and (in_engine or optimizer is None):
            found = "a DeepSpeed engine, which scales by itself" if in_engine else "no optimizer"
            msg = (
                f"scaler is given with {found}; allowed: a GradScaler and the optimizer that its "
                "step() is called with. Give that optimizer, or leave scaler out."
            )
            raise ConfigError(msg)

    @property
    def is_live(self) -> bool:
        """Whether it scales anything."""
        return self._scaler.is_enabled()

    @property
    def factor(self) -> Tensor:
        """What backward's gradients are multiplied by, 0-d float32, without a host read."""
        return self._scaler.scale(torch.ones((), device=self._device))

    def settle(self, *, leave: bool) -> Tensor | None:
        """Unscale the gradients, unless that was done in this step.

        Args:
            leave: Leave them scaled if the optimizer's own step can unscale them.

        Returns:
            The factor that gradients still carry, 0-d float32; None if they carry none.
        """
        if not self.is_live or not self._is_ready:
            return None
        # A sharded scaler tells all ranks of an overflow only while it unscales.
        if leave and type(self._scaler).unscale_ is GradScaler.unscale_:
            return self.factor
        self._scaler.unscale_(self._optimizer)
        return None

    def around_step(self, clip: Around) -> Callable[[], None]:
        """Do something around each `scaler.step` of this optimizer, overflow or not.

        Returns:
            What undoes it.
        """
        if not self._is_given:
            return lambda: None
        wrapped = vars(self._scaler).get("step")
        clips: dict[int, Around] | None = getattr(wrapped, "gradclip_clips", None)
        if clips is None:
            clips = _wrap_step(self._scaler)
        key = id(self._optimizer)
        clips[key] = clip
        return lambda: _forget(self._scaler, key)

    @property
    def _is_ready(self) -> bool:
        """Whether gradients are still scaled."""
        stage = self._scaler._per_optimizer_states[id(self._optimizer)]["stage"]
        return stage is OptState.READY

    @property
    def _device(self) -> torch.device:
        parameters = self._optimizer.param_groups[0]["params"]
        return parameters[0].device if parameters else torch.device("cpu")


class Scalers:
    """Every scaler of this process, also those a clipper wasn't told of."""

    def __init__(self) -> None:
        self._found: WeakSet[GradScaler] | None = None

    def scale_of(self, optimizer: object) -> float | None:
        """What a scaler multiplies losses by that didn't unscale this optimizer's gradients.

        Read on the host. Scalers are looked for once, as that takes a while.

        Returns:
            The scale of the first that is in use and isn't 1; None if there is none.
        """
        if self._found is None:
            gc.collect()
            every = gc.get_objects()
            self._found = WeakSet(one for one in every if issubclass(type(one), GradScaler))
        for scaler in self._found:
            if not scaler.is_enabled() or scaler._scale is None:
                continue
            known = scaler._per_optimizer_states.get(id(optimizer), {"stage": OptState.READY})
            if known["stage"] is OptState.READY and scaler.get_scale() != 1:
                return scaler.get_scale()
        return None


def _wrap_step(scaler: GradScaler) -> dict[int, Around]:
    """Make a scaler step within what the dict has for the optimizer, by its identity."""
    step = scaler.step
    clips: dict[int, Around] = {}

    @functools.wraps(step)
    def clip_and_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        around = clips.get(id(optimizer)) if scaler.is_enabled() else None
        with nullcontext() if around is None else around():
            return step(optimizer, *args, **kwargs)

    clip_and_step.gradclip_clips = clips  # type: ignore[attr-defined]
    scaler.step = clip_and_step  # type: ignore[method-assign]
    return clips


def _forget(scaler: GradScaler, key: int) -> None:
    """Clip this optimizer no more; the last one gives the scaler its own step back."""
    wrapper = vars(scaler).get("step")
    clips = getattr(wrapper, "gradclip_clips", None)
    if wrapper is None or clips is None:
        return
    clips.pop(key, None)
    if not clips:
        del scaler.step
        inner = wrapper.__wrapped__
        if inner != scaler.step:  # somebody else's, from before
            scaler.step = inner  # type: ignore[method-assign]
