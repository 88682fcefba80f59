"""What optimizers' own hooks tell: where a step begins, and that none went past the callback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from gradclip import ConfigError
from gradclip.adapters import Patches, claim_steps, closure_place, follow_steps

__all__ = ["Steps"]


class Steps:
    """Follows the steps of the Trainer's optimizers.

    Args:
        optimizers: Those that have a clipper, in that order.
        patches: Whose `undo` takes the hooks off the optimizers.
        claims: Refuse optimizers that somebody else clips.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer | Any], patches: Patches, *, claims: bool = True
    ) -> None:
        self._names = [f"Optimizer {i} ({type(o).__name__})" for i, o in enumerate(optimizers)]
        self._announced: set[int] = set()
        self._stepping: set[int] = set()
        self._evaluated: set[int] = set()  # in the step that is under way
        # Outside of batches torch steps optimizers too, to make their state before it is loaded.
        self._is_in_batch = False
        for index, optimizer in enumerate(optimizers):
            if isinstance(optimizer, Optimizer):
                if claims:
                    claim_steps(optimizer, patches, "GradientClip")
                begin, end = partial(self._begin, index), partial(self._end, index)
                follow_steps(optimizer, patches, before=begin, after=end)

    @property
    def is_in_batch(self) -> bool:
        """Whether each step has to be announced now."""
        return self._is_in_batch

    def begin_batch(self) -> None:
        """From now on each step has to be announced."""
        self._announced.clear()
        self._stepping.clear()
        self._is_in_batch = True

    def end_batch(self) -> None:
        """Until the next batch no step has to be announced."""
        self._is_in_batch = False

    def announce(self, index: int) -> bool:
        """Take in that Lightning is about to step an optimizer.

        Returns:
            Whether this is one more evaluation of the closure in the same step: LBFGS and SAM
            evaluate it several times, each time with all of Lightning's hooks.
        """
        self._announced.add(index)
        repeat = index in self._evaluated
        # Under a scaler the closure is evaluated before the step, and once.
        self._evaluated |= {index} & self._stepping
        return repeat

    def _begin(
        self, index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._evaluated.discard(index)
        # A step with a closure is announced by the closure, if it is Lightning's.
        if closure_place(type(optimizer).step, args, kwargs) is None:
            self._refuse_unannounced(index)
        self._stepping.add(index)

    def _end(self, index: int, *_: object) -> None:
        self._refuse_unannounced(index)
        self._announced.discard(index)
        self._stepping.discard(index)

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
