"""Which ranks hold what, as sets of ranks; without tensors, and the same answer on every rank.

One rule makes a norm right under every layout: of the ranks that are summed over, exactly one
counts each gradient element. As all ranks receive the same sum, all have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from gradclip.errors import LayoutError

__all__ = ["Axis", "Sharding", "counts", "distinct", "reduction_axes"]


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks along one axis of a mesh, this rank among them.

    Attributes:
        ranks: Global ranks, in the order of the group.
        group: The process group they communicate over.
    """

    ranks: tuple[int, ...]
    group: Any = field(compare=False, default=None)

    def within(self, other: Axis) -> bool:
        """Whether every rank of this axis is also one of the other's."""
        return set(self.ranks) <= set(other.ranks)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How one parameter lies over ranks.

    Attributes:
        split: Axes it is sharded over: every rank along them holds other elements.
        copied: Axes it is replicated over: every rank along them holds the same elements.
    """

    split: tuple[Axis, ...] = ()
    copied: tuple[Axis, ...] = ()

    def also_split(self, axis: Axis) -> Sharding:
        """The same, sharded over one more axis."""
        return Sharding((*self.split, axis), self.copied)


def distinct(shardings: Iterable[Sharding]) -> list[Sharding]:
    """Each object once, by identity: parameters that lie alike share one."""
    # Comparing them by value would compare tuples of up to 1024 ranks for every parameter.
    return list({id(sharding): sharding for sharding in shardings}.values())


def reduction_axes(shardings: Iterable[Sharding]) -> list[Axis]:
    """The axes to sum over, one after the other.

    They are orthogonal, and every axis that a parameter is sharded over lies within one of them.

    Args:
        shardings: One for each parameter.

    Returns:
        Axes by stride, nearest ranks first, which is the same order on every rank; empty if no
        parameter is sharded.

    Raises:
        LayoutError: If two of them share some ranks but neither holds the other.
    """
    split = {
        axis for sharding in distinct(shardings) for axis in sharding.split if len(axis.ranks) > 1
    }
    largest = [a for a in split if not any(a != b and a.within(b) for b in split)]
    largest.sort(key=lambda axis: (axis.ranks[1] - axis.ranks[0], axis.ranks))
    for a, b in combinations(largest, 2):
        if len(set(a.ranks) & set(b.ranks)) != 1:
            msg = (
                f"Parameters are sharded over ranks {a.ranks} and over ranks {b.ranks}, which "
                "overlap without one holding the other; supported: axes of one regular grid, or "
                "one axis within another. Build all meshes as slices of one init_device_mesh."
            )
            raise LayoutError(msg)
    return largest


def counts(sharding: Sharding, axes: Iterable[Axis], rank: int) -> bool:
    """Whether this rank counts the elements of a parameter that it holds.

    Args:
        sharding: How the parameter lies over ranks.
        axes: The axes that are summed over (`reduction_axes`).
        rank: This rank.

    Returns:
        Along an axis that the parameter is sharded over: True on every rank, each for its part.
        Along an axis that it is replicated over: True on the first rank alone.
    """
    # A mesh of 2 x 4 ranks:    0 1 2 3
    #                           4 5 6 7
    # A is sharded over all of it, W over the rows, and b is replicated. A makes us sum along rows
    # and then along columns. Ranks 0 and 4 hold the same quarter of W: if both counted it, the
    # column 0-4 would add it twice. So along columns the first rank counts W (ranks 0 to 3), and
    # along both axes b (rank 0). Dividing by the number of copies would do too, but 1/3 isn't
    # exact, and a maximum (p = inf) isn't divided. Without A only rows are summed: both rows count
    # W, and find the same sum of the same copies.
    for axis in axes:
        if any(own.within(axis) for own in sharding.split):
            # Sharded over a part of this axis only, as experts are: the rest of the axis holds
            # other experts, unless a mesh says that it holds copies (HSDP beside a flat mesh).
            copies = [own for own in sharding.copied if own.within(axis)]
            if any(rank != own.ranks[0] for own in copies):
                return False
        elif rank != axis.ranks[0]:
            return False
    return True
