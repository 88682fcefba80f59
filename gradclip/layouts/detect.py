"""From parameters to their layout: read from the tensors, and from the groups the user names."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradclip.errors import LayoutError
from gradclip.layouts.deepspeed import is_managed
from gradclip.layouts.fsdp1 import fsdp1_shardings, is_flattened
from gradclip.layouts.geometry import Sharding, distinct, reduction_axes
from gradclip.layouts.local import LocalLayout
from gradclip.layouts.meshes import axis_of, is_dtensor, root_of, sharding_over
from gradclip.layouts.sharded import ShardedLayout

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Groups", "detect", "distinct_groups", "gathered", "shardings_of"]

Groups = ProcessGroup | Mapping[str, ProcessGroup | None]
"""Which ranks hold other parameters: a group for all, or by pattern of the parameter's name."""

Fact = TypeVar("Fact")


def detect(
    parameters: Mapping[str, Tensor],
    groups: Groups | None = None,
    model: nn.Module | None = None,
) -> LocalLayout:
    """Read from the parameters themselves how they lie over ranks.

    Args:
        parameters: Every parameter by name, in the same order on every rank.
        groups: A group whose ranks hold other parameters of the same model, or one for each
            pattern of names; the first pattern that matches counts. Parameters with the group
            None, or with no matching pattern, are the same on every rank.
        model: The module that has the parameters, if the caller knows it. FSDP1's parameters
            alone don't say which ranks hold the rest; its modules do.

    Returns:
        A `ShardedLayout` if a parameter is sharded, else a `LocalLayout`.

    Raises:
        LayoutError: If a parameter is laid out in a way that isn't supported, this rank isn't in
            a group, or the first rank of a group lacks copies that others have.
    """
    managed = [name for name, p in parameters.items() if is_managed(p)]
    if managed:
        msg = (
            f"Parameters {managed[:3]} belong to a DeepSpeed engine, which keeps their gradients "
            "to itself until its step; supported: the engine as a whole. Build the clipper with "
            "it: GradientClipper(policy, optimizer=engine).attach(engine)."
        )
        raise LayoutError(msg)
    on_xla = [name for name, p in parameters.items() if p.device.type == "xla"]
    if on_xla:
        msg = (
            f"Parameters {on_xla[:3]} are on an XLA device, where gradients are reduced over ranks "
            "only while the optimizer steps, so that no norm before it is theirs; supported: "
            "other devices."
        )
        raise LayoutError(msg)
    shardings = shardings_of(parameters, model)
    if groups is None:
        _refuse_marked(parameters)
        _warn_of_forgotten_axes(parameters, shardings.values())
    else:
        _refuse_outsiders(groups)
        named = {name: _group_of(name, groups) for name in parameters}
        _check_copies(parameters, named)
        shardings = {
            name: own if (group := named[name]) is None else own.also_split(axis_of(group))
            for name, own in shardings.items()
        }
    axes = reduction_axes(shardings.values())
    if axes or any(is_dtensor(p) for p in parameters.values()):
        return ShardedLayout(parameters, shardings, axes)
    return LocalLayout(parameters)


def gathered(facts: dict[str, Fact], groups: Groups | None) -> dict[str, Fact]:
    """Exchange facts about parameters between ranks that hold different ones.

    Args:
        facts: This rank's, by name of the parameter; anything that can be pickled.
        groups: As for `detect`; every rank of them must call.

    Returns:
        The facts of all ranks of the groups, in the order of names; without a group as they are.
    """
    for group in distinct_groups(groups):
        found = [item for one in _exchanged(facts, group) for item in one.items()]
        facts = dict(sorted(found, key=lambda item: item[0]))
    return facts


def refuse_shared_names(parameters: Mapping[str, Tensor], groups: Groups | None) -> None:
    """Refuse one name for different parameters on different ranks.

    Raises:
        LayoutError: If two ranks of a group use one name, or a parameter is sharded over a part
            of an axis only, so that ranks outside that part hold another one (an expert).
    """
    for group in distinct_groups(groups):
        mine = [name for name in parameters if groups and _group_of(name, groups) is group]
        seen = [name for names in _exchanged({"": mine}, group) for name in names[""]]
        shared = [name for name in mine if seen.count(name) > 1]
        if shared:
            raise LayoutError(_shared(shared[0]))
    shardings = shardings_of(parameters)
    for axis in reduction_axes(shardings.values()):
        for name, sharding in shardings.items():
            within = [own for own in (*sharding.split, *sharding.copied) if own.within(axis)]
            known = math.prod(len(own.ranks) for own in within)
            if any(own.within(axis) for own in sharding.split) and known < len(axis.ranks):
                raise LayoutError(_shared(name))


def _shared(name: str) -> str:
    return (
        f"Scope is 'unit' or memory of elements is saved, and {name!r} is another parameter on "
        "other ranks (an expert), whose rows have no place among the rows of one; supported: names "
        "of their own, as in [(f'expert{rank}.' + n, p) ...], or scope 'global', 'group' or "
        "'parameter', or save: false."
    )


def shardings_of(
    parameters: Mapping[str, Tensor], model: nn.Module | None = None
) -> dict[str, Sharding]:
    """How each parameter lies over ranks; a plain tensor is the same on every rank.

    Args:
        parameters: By name.
        model: The module that has them, if the caller knows it.

    Raises:
        LayoutError: If one is laid out in a way that isn't supported.
    """
    flattened = {name: p for name, p in parameters.items() if is_flattened(p)}
    shardings = fsdp1_shardings(flattened, model)
    whole = Sharding()
    known: dict[tuple[int, tuple[Placement, ...]], Sharding] = {}
    for name, p in parameters.items():
        if is_dtensor(p):
            key = (id(p.device_mesh), p.placements)
            if key not in known:
                known[key] = sharding_over(p.device_mesh, p.placements)
            shardings[name] = known[key]
    return {name: shardings.get(name, whole) for name in parameters}


def _group_of(name: str, groups: Groups) -> ProcessGroup | None:
    by_pattern = groups if isinstance(groups, Mapping) else {"*": groups}
    return next((g for match, g in by_pattern.items() if fnmatch.fnmatchcase(name, match)), None)


def distinct_groups(groups: Groups | None) -> list[ProcessGroup]:
    """The groups that are named, each once."""
    named = groups.values() if isinstance(groups, Mapping) else [groups]
    return list(dict.fromkeys(group for group in named if group is not None))


def _exchanged(mine: Fact, group: ProcessGroup) -> list[Fact]:
    found = [mine] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return found


def _refuse_marked(parameters: Mapping[str, Tensor]) -> None:
    """Refuse Megatron's marks: such tensors differ by rank, and no mark says over which ranks."""
    marked = [
        name
        for name, p in parameters.items()
        if getattr(p, "tensor_model_parallel", False) or not getattr(p, "allreduce", True)
    ]
    if marked:
        msg = (
            f"Parameters {marked[:3]} are marked as different on every rank of some group "
            "(tensor_model_parallel=True, or allreduce=False for experts), and nothing says which "
            "group; supported: DTensors, whose mesh says it, and process_group={pattern: group} "
            "with a pattern for these names."
        )
        raise LayoutError(msg)


def _refuse_outsiders(groups: Groups) -> None:
    """Refuse a group that this rank isn't in."""
    # `new_group` returns an object on ranks outside the group too; it can't reduce anything.
    if any(dist.get_rank(group) < 0 for group in distinct_groups(groups)):
        msg = (
            f"process_group: rank {dist.get_rank()} is not in the group given on it; allowed: the "
            "group of ranks that this one belongs to. Where ranks form several groups, give each "
            "its own (torch.distributed.new_subgroups, or DeviceMesh.get_group)."
        )
        raise LayoutError(msg)


def _check_copies(
    parameters: Mapping[str, Tensor], named: Mapping[str, ProcessGroup | None]
) -> None:
    """Refuse copies that a group's first rank lacks, as that rank counts copies (`counts`)."""
    copies = {name: p.numel() for name, p in parameters.items() if named[name] is None}
    for group in dict.fromkeys(group for group in named.values() if group is not None):
        first, *others = _exchanged(copies, group)
        for index, other in enumerate(others, 1):
            if sum(other.values()) > sum(first.values()):
                lost = [name for name in other if name not in first]
                msg = (
                    f"process_group: rank {index} of a group holds {lost[:3]}, matched by no "
                    "pattern and so taken for copies, and the group's first rank, which counts "
                    "copies, doesn't hold them. Give a pattern and group for them, or keep their "
                    "copy on the first rank too."
                )
                raise LayoutError(msg)


def _warn_of_forgotten_axes(
    parameters: Mapping[str, Tensor], shardings: Iterable[Sharding]
) -> None:
    """Warn if meshes are slices of a larger mesh, and no parameter lies over one of its axes."""
    lines = [
        set(axis.ranks)
        for sharding in distinct(shardings)
        for axis in (*sharding.split, *sharding.copied)
    ]
    meshes = {p.device_mesh for p in parameters.values() if is_dtensor(p)}
    for root in set(map(root_of, meshes)):
        for dim, name in enumerate(root.mesh_dim_names or ()):
            ranks = set(dist.get_process_group_ranks(root.get_group(dim)))
            if len(ranks) > 1 and all(len(ranks & line) < 2 for line in lines):
                warnings.warn(
                    f"Parameters lie over slices of {root}, none over its axis {name!r}: ranks "
                    "along it are taken to hold copies. If they hold other parameters (pipeline "
                    f"stages, experts), pass process_group=mesh.get_group({name!r}); "
                    "process_group={} says that they don't.",
                    stacklevel=4,
                )
