"""Parameters sharded over ranks: FSDP, tensor, expert and pipeline parallel, alone and together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip.errors import LayoutError
from gradclip.layouts.geometry import Axis, Sharding, counts, distinct
from gradclip.layouts.local import LocalLayout, Owned, overlaps
from gradclip.layouts.meshes import is_dtensor
from gradclip.layouts.partial import PartialSums
from gradclip.tensors import refuse_sparse
from gradclip.types import Collected

__all__ = ["ShardedLayout"]


class ShardedLayout(LocalLayout):
    """Each rank holds parts of some parameters and all of others.

    Every gradient element is counted by exactly one rank (`gradclip.layouts.geometry.counts`).
    The sum over ranks is then the sum over all elements, and the same bits on every rank.

    Args:
        parameters: Every parameter by name, in the same order on every rank.
        shardings: How each of them lies over ranks, by name.
        axes: The axes to sum over (`gradclip.layouts.geometry.reduction_axes`).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shardings: Mapping[str, Sharding],
        axes: Sequence[Axis],
    ) -> None:
        complex_ = [name for name, p in parameters.items() if p.is_complex()]
        if complex_:
            msg = (
                f"Parameters {complex_[:3]} are complex and the model is sharded over ranks; "
                "supported: real floating point there, complex in one process or under DDP. Store "
                "them as real tensors (torch.view_as_real), or leave them out of the optimizer."
            )
            raise LayoutError(msg)
        super().__init__(parameters, _groups(axes))
        rank = dist.get_rank()
        mine = {
            id(sharding): counts(sharding, axes, rank) for sharding in distinct(shardings.values())
        }
        self._names = {p: name for name, p in parameters.items()}
        self._counted = {p for name, p in parameters.items() if mine[id(shardings[name])]}
        self._all_counted = len(self._counted) == len(self._names)
        self._partial = PartialSums(parameters)

    def collect(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take the local part of `.grad` of each parameter; partial sums are reduced first.

        Raises:
            LayoutError: If a gradient can't be measured; see `take`.
        """
        self._partial.reduce()
        return self.take([[(p, g) for p in slot if (g := p.grad) is not None] for slot in slots])

    def take(self, slots: Owned) -> Collected:
        """Take the local part of gradients that are given with their parameters; nothing is copied.

        Raises:
            LayoutError: If a gradient is sparse, has elements that share memory, or lies over
                ranks as its parameter doesn't.
        """
        held: list[list[Tensor]] = []
        counted: list[list[Tensor]] = []
        for slot in slots:
            parts = [(owner, self._part(owner, grad)) for owner, grad in slot]
            for owner, part in parts:
                if not part.is_contiguous():
                    self._refuse_irregular(owner, part)
            held.append([part for _, part in parts if part.numel()])
            if not self._all_counted:
                mine = (x for owner, x in parts if owner in self._counted)
                counted.append([part for part in mine if part.numel()])
        return Collected(all=held, counted=held if self._all_counted else counted)

    def _refuse_irregular(self, owner: Tensor, part: Tensor) -> None:
        name = self._names.get(owner, "?")
        refuse_sparse([(name, part)], "the model is sharded over ranks, which needs dense ones")
        if overlaps(part):
            msg = (
                f"The gradient of {name!r} has elements that share memory (expand); supported: "
                "one place for each. Assign a clone() of it."
            )
            raise LayoutError(msg)

    def _part(self, owner: Tensor, grad: Tensor) -> Tensor:
        if not is_dtensor(grad):
            return grad
        if is_dtensor(owner) and grad.placements == owner.placements:
            return grad.to_local()
        msg = (
            f"The gradient of {self._names[owner]!r} is a DTensor placed {grad.placements}, its "
            f"parameter is placed {getattr(owner, 'placements', 'on no mesh')}; supported: both "
            "alike, or a gradient that is Partial where its parameter is Replicate on every "
            "axis. Call grad.redistribute(placements=parameter.placements) after backward."
        )
        raise LayoutError(msg)


def _groups(axes: Sequence[Axis]) -> list[ProcessGroup]:
    """The groups to sum over: one of all ranks in place of axes that together hold every rank."""
    whole = math.prod(len(axis.ranks) for axis in axes) == dist.get_world_size()
    if len(axes) > 1 and whole and dist.group.WORLD is not None:
        return [dist.group.WORLD]
    return [axis.group for axis in axes]
