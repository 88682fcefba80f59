"""What optimizers' own hooks tell: where a step begins, and that none went past the callback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.optim import LBFGS, Optimizer

from gradclip import ConfigError
from gradclip.adapters import Patches

__all__ = ["Steps"]


class Steps:
    """Follows the steps of the Trainer's optimizers.

    Args:
        optimizers: Those that have a clipper, in that order.
        patches: Whose `undo` takes the hooks off the optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer | Any], patches: Patches) -> None:
        self._names = [f"Optimizer {i} ({type(o).__name__})" for i, o in enumerate(optimizers)]
        self._announced: set[int] = set()
        self._closures = {i for i, o in enumerate(optimizers) if isinstance(o, LBFGS)}
        self._evaluated: set[int] = set()
        # Outside of batches torch steps optimizers too, to make their state before it is loaded.
        self._is_in_batch = False
        for index, optimizer in enumerate(optimizers):
            if isinstance(optimizer, Optimizer):
                begin, end = partial(self._begin, index), partial(self._end, index)
                patches.callback(optimizer.register_step_pre_hook(begin).remove)
                patches.callback(optimizer.register_step_post_hook(end).remove)

    @property
    def is_in_batch(self) -> bool:
        """Whether each step has to be announced now."""
        return self._is_in_batch

    def begin_batch(self) -> None:
        """From now on each step has to be announced."""
        self._announced.clear()
        self._is_in_batch = True

    def end_batch(self) -> None:
        """Until the next batch no step has to be announced."""
        self._is_in_batch = False

    def announce(self, index: int) -> bool:
        """Take in that Lightning is about to step an optimizer.

        Returns:
            Whether this is one more evaluation of the closure in the same step: LBFGS evaluates it
            several times, each time with all of Lightning's hooks.
        """
        self._announced.add(index)
        repeat = index in self._evaluated
        self._evaluated |= {index} & self._closures
        return repeat

    def _begin(
        self, index: int, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._evaluated.discard(index)
        # A step with a closure is announced by the closure, if it is Lightning's.
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is None:
            self._refuse_unannounced(index)

    def _end(self, index: int, *_: object) -> None:
        self._refuse_unannounced(index)
        self._announced.discard(index)

    def _refuse_unannounced(self, index: int) -> None:
        if self._is_in_batch and index not in self._announced:
            msg = (
                f"{self._names[index]} makes a step without Lightning's on_before_optimizer_step, "
                "where GradientClip clips; allowed: steps of what self.optimizers() returns, and "
                "of the optimizer that optimizer_step is given. Leave out use_pl_optimizer=False "
                "and `.optimizer`, or remove GradientClip and clip this step with a "
                "gradclip.GradientClipper."
            )
            raise ConfigError(msg)
