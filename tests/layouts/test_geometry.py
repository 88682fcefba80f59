"""Who counts what, on every grid of ranks: each element once, and sums that reach everyone."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradclip import LayoutError
from gradclip.layouts.geometry import Axis, Sharding, counts, reduction_axes


def line(grid, rank, dims):
    """The ranks that differ from this one along some dimensions of a grid."""
    here = coordinates(grid, rank)
    return Axis(
        tuple(
            index
            for index, other in enumerate(itertools.product(*map(range, grid)))
            if all(other[d] == here[d] for d in range(len(grid)) if d not in dims)
        )
    )


def coordinates(grid, rank):
    return list(itertools.product(*map(range, grid)))[rank]


@given(
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    split=st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=4),
)
def test_each_element_is_counted_by_one_rank(grid, split):
    """Every parameter is split over some dimensions of one grid and copied over the others."""
    summed = set().union(*split)
    for index, dims in enumerate(split):
        every, counted = set(), []
        for rank in range(math.prod(grid)):
            shardings = [
                Sharding(
                    tuple(line(grid, rank, (d,)) for d in range(3) if d in own),
                    tuple(line(grid, rank, (d,)) for d in range(3) if d not in own),
                )
                for own in split
            ]
            at = coordinates(grid, rank)
            replica = tuple(at[d] for d in range(3) if d not in summed)
            part = replica, tuple(at[d] for d in sorted(dims))
            every.add(part)
            if counts(shardings[index], reduction_axes(shardings), rank):
                counted.append(part)
        assert sorted(counted) == sorted(every)


def test_an_axis_inside_another_is_summed_once_and_the_rest_holds_other_experts():
    world, experts = Axis((0, 1, 2, 3)), Axis((0, 2))
    dense, expert, router = Sharding((world,)), Sharding((experts,)), Sharding()
    axes = reduction_axes([dense, expert, router])
    assert axes == [world]
    assert [counts(sharding, axes, 0) for sharding in (dense, expert, router)] == [True, True, True]
    other = Sharding((Axis((1, 3)),))
    assert [counts(sharding, axes, 1) for sharding in (dense, other, router)] == [True, True, False]


def test_hybrid_shards_beside_a_flat_axis_are_counted_in_one_replica():
    world = Axis((0, 1, 2, 3))
    for rank, (split, copied) in enumerate([((0, 1), (0, 2)), ((0, 1), (1, 3)), ((2, 3), (0, 2))]):
        hybrid = Sharding((Axis(split),), (Axis(copied),))
        assert counts(hybrid, [world], rank) == (rank < 2)


def test_axes_that_overlap_otherwise_are_refused():
    with pytest.raises(LayoutError, match=r"ranks \(0, 1, 2\) and over ranks \(0, 2, 3\)"):
        reduction_axes([Sharding((Axis((0, 1, 2)),)), Sharding((Axis((0, 2, 3)),))])
