"""Every rank holds every gradient: one process, or DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from gradclip.errors import LayoutError
from gradclip.types import Collected, Grads

__all__ = ["LocalLayout"]

_is_sparse = attrgetter("is_sparse")


class LocalLayout:
    """Whole gradients, so no collective, unless a process group adds one axis."""

    def __init__(
        self, parameters: Mapping[str, Tensor], process_group: ProcessGroup | None = None
    ) -> None:
        complex_ = [name for name, p in parameters.items() if p.is_complex()]
        if complex_:
            msg = (
                f"Parameters {complex_[:3]} are complex; supported: real floating point. Store "
                "them as real tensors (torch.view_as_real), or leave them out of the optimizer."
            )
            raise LayoutError(msg)
        self._groups: list[ProcessGroup] = [] if process_group is None else [process_group]
        self._devices = tuple(dict.fromkeys(p.device for p in parameters.values()))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where local gradients are; measures and decisions live on the first."""
        return self._devices or (torch.device("cpu"),)

    def collect(self, slots: Sequence[Sequence[Parameter]]) -> Collected:
        """Take `.grad` of each parameter that has one.

        Raises:
            LayoutError: If a gradient can't be measured; see `take`.
        """
        return self.take([[g for p in slot if (g := p.grad) is not None] for slot in slots])

    def take(self, grads: Grads) -> Collected:
        """Take the local part of gradients, without a copy.

        Raises:
            LayoutError: If a gradient is sparse.
        """
        if any(map(_is_sparse, chain.from_iterable(grads))):
            msg = (
                "A gradient is sparse, and clipping needs dense ones. Build the embedding with "
                "sparse=False, or leave its parameters out of what is clipped."
            )
            raise LayoutError(msg)
        return Collected(all=grads, counted=grads)

    def sum(self, values: Tensor) -> Tensor:
        """One all-reduce for each group of ranks that hold other parts; none if there is none."""
        for group in self._groups:
            dist.all_reduce(values, dist.ReduceOp.SUM, group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest over the same groups, reduced as integers.

        Some backends lose NaN in a MAX reduction. The bits of non-negative doubles order like
        the numbers themselves, with NaN above infinity, and integers have no NaN to lose.
        """
        if not self._groups:
            return values
        bits = values.abs().view(torch.int64)
        for group in self._groups:
            dist.all_reduce(bits, dist.ReduceOp.MAX, group)
        return bits.view(torch.float64)
