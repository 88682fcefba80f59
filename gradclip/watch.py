"""Sees steps that nobody clipped, whatever hooks ran."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from gradclip.layouts.local import local_part
from gradclip.plan.rates import grows_with_gradient, kinds_of
from gradclip.private import all_writes, writes
from gradclip.steps import is_within_its_own
from gradclip.weak import weak

__all__ = ["Watch"]

_logger = logging.getLogger("gradclip")


class Watch:
    """Warns, once, of parameters that moved with gradients that weren't clipped.

    It has two signs. torch calls a hook after each optimizer's step. A step lacks a clip if its
    gradients aren't those of the last clip, and its optimizer has stepped since then already, or
    isn't the one that the clipper is attached to. And torch counts the writes to each tensor: where
    a clipper is attached, parameters that were written to although no optimizer stepped since the
    last clip were moved by something that has no hooks.

    A write through `.data` isn't counted, and a step within a compiled region isn't seen. Nothing
    is read of any tensor.

    Args:
        lacks_rate: A policy asks for the optimizer's rate, and the clipper knows no optimizer. One
            whose steps grow with the gradient is then named once, when it has stepped.
    """

    def __init__(self, *, lacks_rate: bool = False) -> None:
        self._lacks_rate = lacks_rate
        self._parameters: Mapping[str, Parameter] = {}
        self._held: set[Parameter] = set()
        self._attached: Sequence[Callable[[], Any]] = ()
        self._stepped: WeakSet[Any] = WeakSet()  # since the last clip
        self._has_stepped = False  # any of them, also one that is gone
        self._is_in_step = False
        self._has_clipped = self._is_told = False
        self._writes = 0
        self._clipped_grad: tuple[TensorWeakRef, int] | None = None
        _begin()
        _watches.add(self)

    def begin(self, optimizers: Sequence[Any], parameters: Mapping[str, Parameter]) -> None:
        """The clipper is attached to these now, and clips each of their steps."""
        self._attached = [weak(optimizer) for optimizer in optimizers]
        self._note(parameters)

    def end(self) -> None:
        """Until the next clip steps need none."""
        self._attached, self._has_clipped, self._is_in_step = (), False, False

    def clipped(self, parameters: Mapping[str, Parameter]) -> None:
        """These parameters' gradients have been clipped, or the step is withheld."""
        self._note_clip(parameters)
        one = next(iter(parameters.values()), None)
        for other in _watches:
            # Another clipper's clip is one, too: a finder clips with its own for a while.
            if other is not self and other._is_in_use and one in other._held:
                other._note_clip(other._parameters)

    def _note_clip(self, parameters: Mapping[str, Parameter]) -> None:
        self._has_clipped, self._has_stepped = True, False
        self._stepped.clear()
        self._note(parameters)

    @property
    def _is_in_use(self) -> bool:
        return self._has_clipped or bool(self._attached)

    def begin_step(self) -> None:
        """An optimizer that the clipper is attached to begins a step."""
        if not self._is_in_step:
            self.check(in_clip=True)
        self._is_in_step = True  # within it, closures are evaluated wherever parameters are

    def end_step(self) -> None:
        """It has ended."""
        self._has_stepped, self._is_in_step = True, False

    def check(self, *, in_clip: bool) -> None:
        """Look whether something without hooks moved parameters.

        Args:
            in_clip: A clip begins. Before the first one, parameters may have been loaded.
        """
        if self._is_told or not self._attached:
            return
        if self._is_in_step or self._has_stepped:
            return
        if not self._has_clipped and (in_clip or not _any_grad(self._parameters.values())):
            return
        optimizer = self._attached[0]()
        if optimizer is not None and _written(self._parameters.values()) != self._writes:
            who = type(optimizer).__name__
            self._tell(
                f"parameters have changed since the last clip, and {who}, which this clipper is "
                "attached to, made no step that runs hooks: something else moved them (a step "
                "method that was replaced, a functional optimizer, an update by hand), and its "
                "gradients weren't clipped. Call clip() before each step that goes past the "
                "optimizer's own. If you set them yourself (a checkpoint, an average of weights), "
                "all is well."
            )

    def see(self, optimizer: Optimizer) -> None:
        """Take in that an optimizer has stepped."""
        # What steps within the step of an attached optimizer is part of that.
        if self._is_told or not self._is_in_use or self._is_in_step:
            return
        if any(optimizer is one() for one in self._attached):
            return
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p in self._held for p in stepped) or is_within_its_own(optimizer):
            return
        if self._lacks_rate and grows_with_gradient(kinds_of(optimizer)):
            self._lacks_rate = False
            _logger.warning(
                "gradclip: a policy asks for the optimizer's rate, and this clipper was built "
                "without the %s that steps its parameters, so its limit has no ceiling. Write "
                "GradientClipper(model, optimizer). This is said once.",
                type(optimizer).__name__,
            )
        # Where the clipper is attached, clips are for the steps of that optimizer.
        has_no_clip = optimizer in self._stepped or not self._has_clipped or bool(self._attached)
        self._stepped.add(optimizer)
        self._has_stepped = True
        uses_others = _any_grad(stepped) and not self._are_clipped()
        if has_no_clip and uses_others and _moves(optimizer):
            self._tell(
                f"{type(optimizer).__name__} stepped with gradients that weren't clipped: there "
                "was no clip() for this step. Call clip() before each step, or attach the "
                "clipper to the optimizer that makes the steps (clipper.attach(optimizer))."
            )

    def _are_clipped(self) -> bool:
        """Whether the gradients in place are still those of the last clip."""
        if self._clipped_grad is None:
            return False
        grad, before = self._clipped_grad[0](), self._clipped_grad[1]
        held = any(p.grad is grad for p in self._parameters.values())
        return grad is not None and held and writes(grad) == before

    def _note(self, parameters: Mapping[str, Parameter]) -> None:
        if parameters is not self._parameters:
            self._parameters, self._held = parameters, set(parameters.values())
        grad = next((p.grad for p in parameters.values() if p.grad is not None), None)
        self._clipped_grad = None if grad is None else (TensorWeakRef(grad), writes(grad))
        if self._attached:
            self._writes = _written(parameters.values())

    def _tell(self, what: str) -> None:
        self._is_told = True
        _logger.warning("gradclip: %s This is said once.", what)


def _moves(optimizer: Optimizer) -> bool:
    """Whether a step changes parameters; reads a rate that is a tensor on the host.

    With a rate of 0 torch makes an optimizer's state before a checkpoint is loaded.
    """
    return any(bool(group.get("lr", 1) != 0) for group in optimizer.param_groups)


def _any_grad(parameters: Iterable[Tensor]) -> bool:
    return any(p.grad is not None for p in parameters)


def _written(parameters: Iterable[Parameter]) -> int:
    return all_writes([p if type(p) is Parameter else local_part(p) for p in parameters])


_watches: WeakSet[Watch] = WeakSet()
_is_begun = False


def _begin() -> None:
    """Have torch tell of each step of each optimizer, from the first clipper on."""
    global _is_begun
    if not _is_begun:
        register_optimizer_step_post_hook(_see_step)
        _is_begun = True


def _see_step(optimizer: Optimizer, *_: object) -> None:
    if not torch.compiler.is_compiling():
        for watch in list(_watches):
            watch.see(optimizer)
