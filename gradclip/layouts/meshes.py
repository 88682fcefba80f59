"""Device meshes, DTensors and `join`: every private touch of theirs is here.

Read in torch 2.13; tests/layouts/test_torch_names.py fails when a name used here is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from gradclip.layouts.geometry import Axis, Sharding
from gradclip.types import Region

if TYPE_CHECKING:
    from torch.distributed.algorithms.join import Joinable
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement
    from typing_extensions import TypeIs

__all__ = [
    "axis_of",
    "is_dtensor",
    "is_joining",
    "mesh_region",
    "root_of",
    "sharding_over",
    "store_of",
]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether this is a DTensor; there is none where nobody imported its module.

    Importing it takes longer than importing the rest of gradclip.
    """
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # missing while the module is being imported
    return kind is not None and isinstance(value, kind)


def axis_of(group: ProcessGroup) -> Axis:
    """The ranks of a group that this rank is in."""
    return Axis(tuple(dist.get_process_group_ranks(group)), group)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one is a slice of, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    from torch.distributed.device_mesh import _mesh_resources  # where torch 2.6 to 2.8 keep it

    return _mesh_resources.get_root_mesh(mesh)


def store_of(group: ProcessGroup) -> Any:
    """The store in which the ranks of a group meet."""
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    from torch.distributed.distributed_c10d import _world  # torch 2.6 has it there only

    return _world.pg_map[group][1]


def sharding_over(mesh: DeviceMesh, placements: Sequence[Placement]) -> Sharding:
    """How a DTensor lies over the axes of its mesh; a partial sum is a copy once it is reduced."""
    split: list[Axis] = []
    copied: list[Axis] = []
    for group, placement in zip(mesh.get_all_groups(), placements, strict=True):
        whole = placement.is_replicate() or placement.is_partial()
        (copied if whole else split).append(axis_of(group))
    return Sharding(tuple(split), tuple(copied))


def mesh_region(tensor: DTensor) -> Region:
    """Which box of a DTensor this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(tensor.shape)
    size, start = compute_local_shape_and_global_offset(
        shape, tensor.device_mesh, tensor.placements
    )
    return Region(shape, tuple(start) or (0,) * len(shape), tuple(size))


def is_joining(module: Joinable) -> bool:
    """Whether this is within `join`, where ranks may make different numbers of steps."""
    return module._join_config.enable
