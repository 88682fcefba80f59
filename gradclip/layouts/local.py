"""Every rank holds every gradient: one process, or DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from gradclip.errors import LayoutError
from gradclip.layouts.places import place_of
from gradclip.types import Collected, Grads, Place

__all__ = ["LocalLayout", "Owned", "device_of", "local_part", "refuse_sparse"]

Owned = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""For each slot its gradients, each after the parameter (or the tensor itself) it is of."""

_is_sparse = attrgetter("is_sparse")


class LocalLayout:
    """Whole gradients, so no collective, unless groups are given whose ranks hold other parts."""

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[ProcessGroup] = ()
    ) -> None:
        complex_ = [name for name, p in parameters.items() if p.is_complex()]
        if complex_:
            msg = (
                f"Parameters {complex_[:3]} are complex; supported: real floating point. Store "
                "them as real tensors (torch.view_as_real), or leave them out of the optimizer."
            )
            raise LayoutError(msg)
        self._groups = list(groups)
        parts = [local_part(p) for p in parameters.values()]
        self._devices = tuple(dict.fromkeys(part.device for part in parts))
        self._some_empty = not all(part.numel() for part in parts)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where local gradients are; measures and decisions live on the first."""
        return self._devices or (torch.device("cpu"),)

    def collect(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take `.grad` of each parameter that has one.

        Raises:
            LayoutError: If a gradient can't be measured; see `take`.
        """
        return self._taken([[g for p in slot if (g := p.grad) is not None] for slot in slots])

    def weights(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take the local part of each parameter itself, as `collect` does of its gradient."""
        return self.take([[(p, p.detach()) for p in slot] for slot in slots])

    def sizes(self, slots: Sequence[Sequence[Tensor]]) -> Tensor:
        """Elements of each slot over all ranks, float64 of shape (slots,); no padding counts."""
        held = [sum(part.numel() for part in slot) for slot in self.weights(slots).counted]
        padding = [sum(getattr(p, "_shard_numel_padded", 0) for p in slot) for slot in slots]
        mine = [n - extra for n, extra in zip(held, padding, strict=True)]
        return self.sum(torch.tensor(mine, dtype=torch.float64, device=self.devices[0]))

    def place(self, name: str, parameter: Tensor) -> Place:
        """Where the local part of a parameter lies in it.

        Raises:
            LayoutError: If that can't be told.
        """
        return place_of(name, parameter)

    def take(self, slots: Owned) -> Collected:
        """Take the local part of gradients, given with whose they are, without a copy.

        Raises:
            LayoutError: If a gradient is sparse.
        """
        return self._taken([[grad for _, grad in slot] for slot in slots])

    def _taken(self, held: list[list[Tensor]]) -> Collected:
        refuse_sparse(held)
        if self._some_empty:
            held = [[grad for grad in slot if grad.numel()] for slot in held]
        return Collected(all=held, counted=held)

    def held(self, parameter: Tensor) -> list[Tensor]:
        """The local part of one gradient, if there is one; no rank waits for another."""
        return [] if parameter.grad is None else [local_part(parameter.grad)]

    def sum(self, values: Tensor) -> Tensor:
        """One all-reduce for each group of ranks that hold other parts; none if there is none."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest over the same groups, reduced as integers.

        Some backends lose NaN in a MAX reduction. The bits of non-negative doubles order like
        the numbers themselves, with NaN above infinity, and integers have no NaN to lose.
        """
        if not self._groups:
            return values
        bits = values.abs().view(torch.int64)
        return self._reduce(bits, dist.ReduceOp.MAX).view(torch.float64)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        home = values.device
        for group in self._groups:
            values = values.to(device_of(group, values.device))
            dist.all_reduce(values, op, group)
        return values.to(home)


def refuse_sparse(grads: Grads) -> None:
    """Raise a LayoutError if there is a sparse gradient."""
    if any(map(_is_sparse, chain.from_iterable(grads))):
        msg = (
            "A gradient is sparse, and clipping needs dense ones. Build the embedding with "
            "sparse=False, or leave its parameters out of what is clipped."
        )
        raise LayoutError(msg)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_of(group: ProcessGroup, near: torch.device) -> torch.device:
    """Where a group can reduce: here, else where it has a backend (shards offloaded to CPU)."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if near.type in kinds:
        return near
    return group.bound_device_id or torch.device(kinds[0])
