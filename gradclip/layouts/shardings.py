"""How parameters lie over ranks: as their mesh says, or as the FSDP1 module that holds them does.

FSDP1's flat shards don't say which ranks hold the rest. Only its handles know, which modules hold
and parameters don't, so they are looked for among all live objects, once. Read in torch 2.13.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.tensor.placement_types import Placement
from torch.utils.weak import WeakIdKeyDictionary

from gradclip.errors import LayoutError
from gradclip.layouts.geometry import Axis, Sharding

__all__ = [
    "axis_of",
    "flat_handle",
    "fsdp1_shardings",
    "is_flat",
    "is_flattened",
    "root_of",
    "sharding_over",
]

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Cuts found so far, so that the drop-ins don't look again on every step."""
_handles: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weak references to what holds them, which itself refers to them."""


def axis_of(group: ProcessGroup) -> Axis:
    """The ranks of a group that this rank is in."""
    return Axis(tuple(dist.get_process_group_ranks(group)), group)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that this one is a slice of, or itself."""
    return mesh._get_root_mesh()


def sharding_over(mesh: DeviceMesh, placements: Sequence[Placement]) -> Sharding:
    """How a DTensor lies over the axes of its mesh."""
    axes = [axis_of(group) for group in mesh.get_all_groups()]
    whole = [p.is_replicate() or p.is_partial() for p in placements]
    return Sharding(
        split=tuple(axis for axis, same in zip(axes, whole, strict=True) if not same),
        copied=tuple(axis for axis, same in zip(axes, whole, strict=True) if same),
    )


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 holds this parameter, as it was or as part of a flat one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_flat(parameter: Tensor) -> bool:
    """Whether this is several parameters in one (`use_orig_params=False`)."""
    return isinstance(parameter, FlatParameter)


def fsdp1_shardings(flattened: Mapping[str, Tensor]) -> dict[str, Sharding]:
    """How the parameters of FSDP1 lie over ranks.

    Raises:
        LayoutError: If one of them belongs to no live FSDP module, or is a FlatParameter over
            tensor parallelism.
    """
    # Other models' handles may be such as are refused, which is no concern of this one.
    for handle in _handles_of(p for p in flattened.values() if p not in _known):
        _known.update(_shardings_by(handle))
        _handles.update(dict.fromkeys(_held_by(handle), weakref.ref(handle)))
    lost = [name for name, p in flattened.items() if p not in _known]
    if lost:
        raise LayoutError(_lost(lost))
    return {name: _known[p] for name, p in flattened.items()}


def flat_handle(name: str, parameter: Tensor) -> FlatParamHandle:
    """The FSDP1 handle that holds a parameter.

    Raises:
        LayoutError: If the wrapped model is gone.
    """
    fsdp1_shardings({name: parameter})
    handle: FlatParamHandle | None = _handles[parameter]()
    if handle is None:
        raise LayoutError(_lost([name]))
    return handle


def _lost(names: Sequence[str]) -> str:
    return (
        f"Parameters {list(names[:3])} belong to FullyShardedDataParallel (FSDP1), and no live "
        "FSDP module holds them, so nothing says which ranks hold the rest; supported: parameters "
        "of a wrapped model that is in use. Build the optimizer and the clipper from the wrapped "
        "model's parameters, after wrapping."
    )


def _handles_of(parameters: Iterable[Tensor]) -> Iterator[FlatParamHandle]:
    wanted = set(parameters)
    for handle in gc.get_objects() if wanted else ():
        if type(handle) is FlatParamHandle and not wanted.isdisjoint(_held_by(handle)):
            yield handle


def _held_by(handle: FlatParamHandle) -> Sequence[Tensor]:
    """The parameters as the model has them: its own, or the flat one in their place."""
    return handle.flat_param._params or [handle.flat_param]


def _shardings_by(handle: FlatParamHandle) -> dict[Tensor, Sharding]:
    """The parameters of one handle; tensor parallelism may have cut them before it did."""
    flat = handle.flat_param
    split = (axis_of(handle.process_group),) if handle.uses_sharded_strategy else ()
    before = [
        Sharding() if spec is None else sharding_over(spec.mesh, spec.placements)
        for spec in flat._param_extensions
    ]
    held = _held_by(handle)
    if flat._params is None:
        if any(sharding != Sharding() for sharding in before):
            msg = (
                "A FlatParameter of FSDP1 holds parameters that tensor parallelism has cut, and "
                "others it hasn't; supported: FSDP1 over tensor parallelism with "
                "use_orig_params=True, and fully_shard. Wrap with use_orig_params=True."
            )
            raise LayoutError(msg)
        before = [Sharding()]
    return {
        p: Sharding((*split, *sharding.split), sharding.copied)
        for p, sharding in zip(held, before, strict=True)
    }
