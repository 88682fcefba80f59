"""Geometry: the only place that knows about ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from gradclip.errors import LayoutError
from gradclip.layouts.flat import flat_cuts, is_flat, is_flattened
from gradclip.layouts.geometry import Axis, Cut, reduction_axes
from gradclip.layouts.local import LocalLayout, local_part
from gradclip.layouts.partial import completed
from gradclip.layouts.sharded import ShardedLayout

__all__ = [
    "Groups",
    "LocalLayout",
    "ShardedLayout",
    "completed",
    "detect",
    "gathered",
    "is_flat",
    "local_part",
]

Groups = ProcessGroup | Mapping[str, ProcessGroup | None]
"""Which ranks hold other parameters: a group for all, or by pattern of the parameter's name."""

Fact = TypeVar("Fact")


def detect(parameters: Mapping[str, Tensor], groups: Groups | None = None) -> LocalLayout:
    """Find out from the parameters themselves how they are laid out.

    Args:
        parameters: Every parameter by name, in the same order on every rank.
        groups: A group whose ranks hold other parameters of the same model, or one for each
            pattern of names, first match first; None, as for what no pattern matches, says that
            every rank holds the same.

    Raises:
        LayoutError: If a parameter is laid out in a way that isn't supported.
    """
    partitioned = [name for name, p in parameters.items() if hasattr(p, "ds_id")]
    if partitioned:
        msg = (
            f"Parameters {_some(partitioned)} are partitioned by DeepSpeed, which keeps their "
            "gradients to itself; supported: one process, DDP, and fully_shard (FSDP2). "
            "Let DeepSpeed clip ('gradient_clipping' in its config), or use FSDP2."
        )
        raise LayoutError(msg)
    cuts = {name: _cut_of(p) for name, p in parameters.items()}
    flattened = {name: p for name, p in parameters.items() if is_flattened(p)}
    if flattened:
        cuts |= flat_cuts(flattened)
    if groups is not None:
        cuts = {name: _named(name, cut, groups) for name, cut in cuts.items()}
    axes = reduction_axes(cuts.values())
    if axes or any(isinstance(p, DTensor) for p in parameters.values()):
        return ShardedLayout(parameters, cuts, axes)
    return LocalLayout(parameters)


def gathered(facts: dict[str, Fact], groups: Groups | None) -> dict[str, Fact]:
    """What this rank knows of its parameters, by name, and what ranks with other ones know.

    Args:
        facts: Anything that can be pickled.
        groups: As for `detect`; every rank of them takes part.

    Returns:
        The same names in the same order on every rank of the groups.
    """
    named = groups.values() if isinstance(groups, Mapping) else [groups]
    for group in dict.fromkeys(group for group in named if group is not None):
        found: list[dict[str, Fact]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(found, facts, group)
        facts = {name: fact for one in found for name, fact in one.items()}
    return facts


def _cut_of(parameter: Tensor) -> Cut:
    """How a parameter lies over the axes of its mesh; a plain tensor is the same on every rank."""
    if not isinstance(parameter, DTensor):
        return Cut()
    mesh = parameter.device_mesh
    split: list[Axis] = []
    copied: list[Axis] = []
    for dim, placement in enumerate(parameter.placements):
        group = mesh.get_group(dim)
        axis = Axis(tuple(dist.get_process_group_ranks(group)), group)
        whole = placement.is_replicate() or placement.is_partial()
        (copied if whole else split).append(axis)
    return Cut(tuple(split), tuple(copied))


def _named(name: str, cut: Cut, groups: Groups) -> Cut:
    """The cut with one more axis where the user has named a group for this parameter."""
    by_pattern = groups if isinstance(groups, Mapping) else {"*": groups}
    group = next((g for match, g in by_pattern.items() if fnmatch.fnmatchcase(name, match)), None)
    if group is None:
        return cut
    return Cut((*cut.split, Axis(tuple(dist.get_process_group_ranks(group)), group)), cut.copied)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
