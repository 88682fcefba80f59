"""Which ranks hold what, as sets of ranks: pure, the same answer on every rank.

Every gradient element must be counted by exactly one rank of the grid that is summed over. That
one rule makes a norm right under every layout, and equal bits on every rank follow from it.
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
    """A line of ranks through this one.

    Attributes:
        ranks: Global ranks, in the order of the group.
        group: What they talk over.
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
        split: Axes along which every rank holds other elements.
        copied: Axes along which every rank holds the same elements.
    """

    split: tuple[Axis, ...] = ()
    copied: tuple[Axis, ...] = ()

    def also_split(self, axis: Axis) -> Sharding:
        """The same, split over one more axis."""
        return Sharding((*self.split, axis), self.copied)


def distinct(shardings: Iterable[Sharding]) -> list[Sharding]:
    """Each object once: parameters that lie alike share theirs, and ranks are many to compare."""
    return list({id(sharding): sharding for sharding in shardings}.values())


def reduction_axes(shardings: Iterable[Sharding]) -> list[Axis]:
    """The axes to sum over, one after the other: orthogonal, and every split lies within one.

    Args:
        shardings: One for each parameter.

    Returns:
        Axes by stride, nearest ranks first, which is the same order on every rank; empty if no
        parameter is split.

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
                f"Parameters are split over ranks {a.ranks} and over ranks {b.ranks}, which "
                "overlap without one holding the other; supported: axes of one regular grid, or "
                "one axis within another. Build all meshes as slices of one init_device_mesh."
            )
            raise LayoutError(msg)
    return largest


def counts(sharding: Sharding, axes: Iterable[Axis], rank: int) -> bool:
    """Whether this rank is the one that counts the elements of a parameter that it holds.

    Along an axis that the parameter is split over, every rank counts its own part. Where it is
    split over only a part of an axis that others are split over as a whole, the rest holds other
    parameters (experts): had they been copies, nothing would have kept them equal. Along an axis
    that it isn't split over, ranks hold copies, and the first counts.
    """
    for axis in axes:
        if any(own.within(axis) for own in sharding.split):
            copies = [own for own in sharding.copied if own.within(axis)]
            if any(rank != own.ranks[0] for own in copies):
                return False
        elif rank != axis.ranks[0]:
            return False
    return True
