"""Faults on purpose: what does your training do if a gradient, a step, a file or a rank fails?

Example:
    >>> import torch
    >>> from gradclip import ClipByNorm, GradientClipper
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = GradientClipper(ClipByNorm(max_norm=1.0), model.named_parameters(), optimizer)
    >>> handle = clipper.attach(optimizer)
    >>> with inject(optimizer, Fault("nan", step=1)) as faults:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(1, 2)).sum().backward()
    ...         optimizer.step()
    >>> faults.happened
    [Fault(kind='nan', step=1, rank=None)]
    >>> int(clipper.state_dict()["counts"]["skipped"])
    1
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from gradclip.errors import ConfigError
from gradclip.layouts.ranks import this_rank
from gradclip.patches import Patches
from gradclip.records import recorder
from gradclip.steps import follow_steps

__all__ = ["Fault", "Faults", "InjectedError", "inject"]


Kind = Literal["nan", "no_gradient", "backward", "step", "record", "dead"]


class InjectedError(RuntimeError):
    """What a fault of kind "backward" or "step" raises."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.

            - "nan": the gradient of the optimizer's first parameter is NaN.
            - "no_gradient": it is dropped as soon as backward has made it.
            - "backward": a hook raises `InjectedError` during backward.
            - "step": the optimizer's step raises it after gradients are clipped, as where memory
              runs out there.
            - "record": no flight record can be written, from this step on: the disk is full.
            - "dead": the process is killed (SIGKILL) during backward.
        step: In which step of the optimizer, counted from 0 by `inject`.
        rank: On which rank; None for each.
    """

    kind: Kind
    step: int
    rank: int | None = None


class Faults:
    """The faults of one optimizer while it trains.

    Attributes:
        happened: Those that happened so far on this rank, in order.
        steps: Steps that the optimizer has begun.
    """

    def __init__(self, optimizer: Optimizer, faults: tuple[Fault, ...], patches: Patches) -> None:
        self.happened: list[Fault] = []
        self.steps = 0
        self._waiting = [fault for fault in faults if fault.rank in (None, this_rank())]
        self._optimizer = optimizer
        self._patches = patches
        parameter: Tensor = optimizer.param_groups[0]["params"][0]
        hook = parameter.register_post_accumulate_grad_hook(self._in_backward)
        patches.callback(hook.remove)
        patches.wrap(recorder, "write_trace", self._write)
        follow_steps(optimizer, patches, before=self._begin_step, after=self._end_step)
        self._arm()

    def _begin_step(self, *_: object) -> None:
        self.steps += 1

    def _end_step(self, *_: object) -> None:
        self._arm()

    def _arm(self) -> None:
        """Have the next step raise; a hook that is registered only now runs after the clip's."""
        for fault in self._take("step"):
            hook = partial(self._fail, fault)
            self._patches.callback(self._optimizer.register_step_pre_hook(hook).remove)

    def _fail(self, fault: Fault, *_: object) -> None:
        if fault not in self.happened:
            self.happened.append(fault)
            msg = f"inject: step {fault.step} fails"
            raise InjectedError(msg)

    def _in_backward(self, parameter: Tensor) -> None:
        for fault in self._take("nan", "no_gradient", "backward", "dead"):
            self.happened.append(fault)
            if fault.kind == "nan" and parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
            elif fault.kind == "no_gradient":
                parameter.grad = None
            elif fault.kind == "backward":
                msg = f"inject: the backward of step {fault.step} fails"
                raise InjectedError(msg)
            elif fault.kind == "dead":
                os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        broken = [f for f in self._waiting if f.kind == "record" and f.step < self.steps]
        if not broken:
            write(*args, **kwargs)
            return
        self.happened += [fault for fault in broken if fault not in self.happened]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take(self, *kinds: str) -> list[Fault]:
        """The faults of these kinds whose step comes next; each happens once."""
        due = [f for f in self._waiting if f.kind in kinds and f.step == self.steps]
        self._waiting = [fault for fault in self._waiting if fault not in due]
        return due


@contextmanager
def inject(optimizer: Optimizer, *faults: Fault) -> Iterator[Faults]:
    """Let things fail while an optimizer trains.

    Enter it once the clipper is attached, on every rank. Works in a plain loop and under Lightning,
    Accelerate and transformers' Trainer, with any number of backwards in a step.

    Args:
        optimizer: Whose steps are counted; the one that a trainer wraps, not the wrapper.
        *faults: What is to happen.

    Yields:
        What happened so far.

    Raises:
        ConfigError: If the optimizer's first group holds no parameter, or a fault can't happen: its
            kind is unknown, or its step below 0.
    """
    kinds = get_args(Kind)
    for fault in faults:
        if fault.kind not in kinds or fault.step < 0:
            msg = (
                f"inject: {fault} can't happen; allowed: one of the kinds {', '.join(kinds)} in a "
                "step from 0 on. Correct the fault, or leave it out."
            )
            raise ConfigError(msg)
    if not any(group["params"] for group in optimizer.param_groups[:1]):
        msg = (
            f"inject: the first group of this {type(optimizer).__name__} holds no parameter, and "
            "faults happen to its first one; allowed: an optimizer with parameters."
        )
        raise ConfigError(msg)
    patches = Patches()
    try:
        yield Faults(optimizer, faults, patches)
    finally:
        patches.undo()
