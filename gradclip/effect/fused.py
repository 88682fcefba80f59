"""A fused optimizer's step as the place where gradients are scaled and a step is withheld.

torch's fused kernels divide gradients by `optimizer.grad_scale` while they read them, and leave
parameters and state alone where `optimizer.found_inf` is not 0: the two attributes with which a
`GradScaler` talks to them. Read in torch 2.13 (`torch/optim/adam.py`, `torch/amp/grad_scaler.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from gradclip.patches import Patches
from gradclip.private import takes_scale
from gradclip.steps import follow_steps
from gradclip.weak import weak

__all__ = ["FusedStep", "has_own_step", "takes_factors"]


def takes_factors(optimizer: Any) -> bool:
    """Whether every group of an optimizer is stepped by one of torch's fused kernels."""
    return (
        isinstance(optimizer, Adam | AdamW | SGD | Adagrad)
        and takes_scale(optimizer)
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def has_own_step(optimizer: Any) -> bool:
    """Whether a subclass replaced torch's `step`: its own may look at gradients before."""
    return not type(optimizer).step.__module__.startswith("torch.optim.")


class FusedStep:
    """What the next step of one optimizer, or the one under way, is asked to do.

    A `GradScaler` multiplies a `grad_scale` that it finds into its own scale, but overwrites
    `found_inf`, so that is joined with the scaler's when the step begins. What the scaler set, it
    removes; what is set here is removed after the step.

    Args:
        optimizer: One that `takes_factors`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._known = weak(optimizer)
        self._scale: Tensor | None = None
        self._inf: Tensor | None = None
        self._scaler_clears = False
        self._patches = Patches()
        follow_steps(optimizer, self._patches, before=self._before, after=self._after)

    @property
    def _optimizer(self) -> Optimizer:
        """It keeps this alive by its hooks, so this is not to keep it."""
        optimizer = self._known()
        assert optimizer is not None
        return optimizer

    @property
    def is_on(self) -> bool:
        """Whether it still has its hooks."""
        return self._patches.is_on

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        self._patches.undo()

    def ask(
        self, scale: Tensor | None, withhold: Tensor | None, *, scaler_steps: bool = False
    ) -> None:
        """Replace what was asked before.

        Args:
            scale: 0-d, what gradients are to be divided by, beside a scaler's; None for nothing.
            withhold: 0-d bool, whether the step is to change nothing; None for no.
            scaler_steps: A scaler will make the step, and has to see gradients first.
        """
        optimizer = self._optimizer
        self._clear(optimizer)
        theirs = getattr(optimizer, "grad_scale", None)
        inf = getattr(optimizer, "found_inf", None)
        self._scaler_clears = inf is not None
        if scale is not None:
            scale = scale.float()
            self._scale = scale if theirs is None else theirs * scale
            optimizer.grad_scale = self._scale  # type: ignore[attr-defined]
        if withhold is not None:
            self._inf = withhold.float()
            if inf is not None or not scaler_steps:
                self._join(optimizer, inf)

    def _join(self, optimizer: Optimizer, theirs: Tensor | int | None) -> None:
        """Let the step see both reasons to withhold it: a scaler's and what was asked."""
        assert self._inf is not None
        if isinstance(theirs, Tensor):  # a scaler that saw no gradient says 0
            self._inf = torch.maximum(theirs.reshape(()), self._inf.to(theirs.device))
        if _lacks_momentum(optimizer) and bool(self._inf):
            _drop(optimizer)
        optimizer.found_inf = self._inf  # type: ignore[attr-defined]

    def _before(self, *_: object) -> None:
        optimizer = self._optimizer
        found = getattr(optimizer, "found_inf", None)
        if found is None or found is self._inf:  # no scaler steps, and all is said
            return
        self._scaler_clears = True
        if self._inf is not None:
            self._join(optimizer, found)
        elif _lacks_momentum(optimizer) and bool(found):
            _drop(optimizer)

    def _after(self, *_: object) -> None:
        if not self._scaler_clears:
            self._clear(self._optimizer)
        self._scale = self._inf = None
        self._scaler_clears = False

    def asked(self, scale: Tensor | None) -> bool:
        """Whether this very tensor is what gradients are to be divided by, as asked."""
        return scale is not None and scale is self._scale

    def _clear(self, optimizer: Optimizer) -> None:
        """Take back what was set here and nobody else removes."""
        for name, value in (("grad_scale", self._scale), ("found_inf", self._inf)):
            if value is not None and getattr(optimizer, name, None) is value:
                delattr(optimizer, name)
        self._scale = self._inf = None


def _lacks_momentum(optimizer: Optimizer) -> bool:
    """Whether a withheld step would leave a buffer behind that nothing was written to.

    torch's fused SGD makes momentum buffers before it looks at `found_inf`, and takes them for
    written ones in the step after. Such a first step is withheld by dropping gradients.
    """
    if not isinstance(optimizer, SGD):
        return False
    state = optimizer.state
    return any(
        p.grad is not None and state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"]
        for p in group["params"]
    )


def _drop(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
