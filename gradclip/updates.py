"""How far an optimizer's step moves the parameters: observed, so right for every optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from gradclip.errors import ConfigError
from gradclip.layouts.deepspeed import DeepSpeedLayout
from gradclip.private import has_step_hooks
from gradclip.types import Kernel, Layout

__all__ = ["Updates", "refuse_unseen_steps"]


class Updates:
    """Measures what a step changes: the first one, and each so many steps after it.

    Parameters are copied when such a step begins and compared when it ends. The copy takes as
    much memory as this rank's part of them, and is let go at the end of the step.

    Args:
        every: Steps from one that is measured to the next.

    Attributes:
        found: Float64 of shape (2,), of the last one that was measured: this rank's sums of squares
            of the change, and of the parameters before it. None once it was taken in.
    """

    def __init__(self, every: int) -> None:
        self.found: Tensor | None = None
        self._every = every
        self._known: object = None
        self._begun: tuple[list[Parameter], Layout, list[Tensor]] | None = None

    def begin(
        self, made: int, record: object, parameters: Collection[Parameter], layout: Layout
    ) -> None:
        """A step begins.

        Args:
            made: Steps that were counted so far. They are the same on every rank, even if a scaler
                leaves a step out on some of them.
            record: Of the last clip; another one than at the end of the last step if the clip
                for this one came before it.
            parameters: What may move.
            layout: Which parts of them this rank counts.
        """
        self._begun = None
        before = made if record is self._known else made - 1
        if before % self._every == 0 and not any(map(is_lazy, parameters)):
            held = list(parameters)
            copies = [part.clone() for part in _counted(held, layout)]
            # At the end the same ones count, even if the clipper was built anew within the step.
            self._begun = held, layout, copies

    def end(self, record: object, kernel: Kernel) -> None:
        """The step has ended.

        Args:
            record: As for `begin`.
            kernel: What measures this rank's tensors.
        """
        self._known = record
        if self._begun is None:
            return
        held, layout, copies = self._begun
        self._begun = None
        weights = kernel.power_sums([copies], 2.0)
        if copies:  # in place, so that there is never more than one copy
            torch._foreach_sub_(copies, _counted(held, layout))
        self.found = torch.cat([kernel.power_sums([copies], 2.0), weights])

    def share(self, layout: Layout) -> Tensor | None:
        """What this rank adds to the next message, as `found`; None where ranks hold it all.

        It is in every message, 0 if nothing is new: messages have one length on all ranks then,
        whatever each of them measured.
        """
        if not layout.reduces:
            return None
        if self.found is None:
            return torch.zeros(2, dtype=torch.float64, device=layout.devices[0])
        return self.found.to(layout.devices[0])


def _counted(parameters: Sequence[Parameter], layout: Layout) -> list[Tensor]:
    """What this rank holds, and counts, of the parameters as they are now."""
    (parts,) = layout.weights([parameters]).counted
    return parts


def refuse_unseen_steps(optimizer: Any | None, layout: Layout | None) -> None:
    """Refuse to measure updates where nothing tells of the optimizer's steps.

    Args:
        optimizer: That the clipper was built with.
        layout: That it was given.

    Raises:
        ConfigError: If there is no optimizer, it runs no hooks, or a DeepSpeed engine has it.
    """
    found = ""
    if isinstance(layout, DeepSpeedLayout):
        found = "a DeepSpeed engine makes the steps, on partitions of its own"
    elif optimizer is None:
        found = "the clipper was built without an optimizer"
    elif not has_step_hooks(optimizer):
        found = f"{type(optimizer).__name__} runs no step hooks"
    if found:
        msg = (
            f"log.update_norm_every is set, and {found}, so updates can't be observed; allowed: a "
            "torch.optim.Optimizer whose steps run hooks, given as optimizer=... when the clipper "
            "is built. Give it, or leave log.update_norm_every out."
        )
        raise ConfigError(msg)
