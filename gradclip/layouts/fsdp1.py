"""Parameters that FullyShardedDataParallel (FSDP1) holds: every private touch of FSDP1 is here.

FSDP1 lays the parameters of a module end to end in one flat parameter and gives each rank an
interval of it. What says which ranks hold the rest is the handle of the flat parameter, which the
FSDP module keeps; a parameter doesn't refer to it. Read in torch 2.13; tests/layouts/
test_torch_names.py fails when a name used here is gone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gradclip.errors import LayoutError
from gradclip.layouts.geometry import Sharding
from gradclip.layouts.meshes import axis_of, sharding_over
from gradclip.types import Region

if TYPE_CHECKING:  # else imported where FSDP1 is in use: that takes as long as all of gradclip
    from torch.distributed.fsdp._flat_param import FlatParamHandle

__all__ = [
    "flat_region",
    "fsdp1_class",
    "fsdp1_shardings",
    "is_flat",
    "is_flattened",
    "padding",
    "unflattened_shape",
]


def fsdp1_class() -> Any | None:
    """`FullyShardedDataParallel`, imported if torch was built with it; that takes a while."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel


class _Known(NamedTuple):
    """What is known of a parameter: its sharding, and the handle, which refers to the parameter."""

    sharding: Sharding
    handle: weakref.ReferenceType[FlatParamHandle]


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""`_Known` by parameter, so that the drop-ins don't look for handles on every step."""


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 holds this parameter, as it was or as part of a flat one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_flat(parameter: Tensor) -> bool:
    """Whether this is several parameters in one (`use_orig_params=False`)."""
    return bool(getattr(parameter, "_is_flat_param", False))


def padding(parameter: Tensor) -> int:
    """How many elements of a flat parameter's shard only fill it up."""
    return getattr(parameter, "_shard_numel_padded", 0)


def unflattened_shape(parameter: Tensor) -> tuple[int, ...] | None:
    """The shape of a parameter before it was flattened; None for several in one."""
    handle = _known[parameter].handle() if parameter in _known else None
    if handle is None or handle.flat_param._params is None:
        return None
    held = zip(handle.flat_param._params, handle.flat_param._shapes, strict=True)
    return next((tuple(shape) for own, shape in held if own is parameter), None)


def fsdp1_shardings(
    flattened: Mapping[str, Tensor], model: nn.Module | None = None
) -> dict[str, Sharding]:
    """How parameters of FSDP1 lie over ranks.

    Args:
        flattened: Parameters for which `is_flattened` holds, by name.
        model: The module they come from, if the caller knows it.

    Returns:
        The sharding of each.

    Raises:
        LayoutError: If one of them belongs to no live FSDP module, or is a FlatParameter that
            holds parameters sharded by tensor parallelism.
    """
    _learn(flattened.values(), model)
    lost = [name for name, p in flattened.items() if p not in _known]
    if lost:
        raise LayoutError(_lost(lost))
    return {name: _known[p].sharding for name, p in flattened.items()}


def flat_region(name: str, parameter: Tensor) -> Region:
    """Which elements of a parameter of FSDP1 this rank holds.

    Raises:
        LayoutError: If the wrapped model is gone, the parameter is several in one, or tensor
            parallelism sharded it before FSDP1 did.
    """
    fsdp1_shardings({name: parameter})
    handle = _known[parameter].handle()
    if handle is None:
        raise LayoutError(_lost([name]))
    flat = handle.flat_param
    if is_flat(parameter) or flat._params is None:
        msg = (
            f"{name!r} is a FlatParameter of FSDP1, many parameters in one, which have no rows; "
            "wrap with use_orig_params=True, or use fully_shard."
        )
        raise LayoutError(msg)
    index = next(i for i, own in enumerate(flat._params) if own is parameter)
    if flat._param_extensions[index] is not None:
        msg = (
            f"{name!r} was sharded by tensor parallelism and then by FSDP1, in the middle of rows; "
            "supported for units, and to save the memory of elements: fully_shard over tensor "
            "parallelism. Use that, or another scope, or save: false."
        )
        raise LayoutError(msg)
    shape = tuple(flat._shapes[index])
    if not handle.uses_sharded_strategy:
        return Region.whole(shape)
    info = flat._shard_param_infos[index]
    if info.intra_param_start_idx is None or info.intra_param_end_idx is None:
        return Region.between(shape, 0, 0)
    return Region.between(shape, info.intra_param_start_idx, info.intra_param_end_idx + 1)


def _learn(parameters: Iterable[Tensor], model: nn.Module | None) -> None:
    """Find the handles of parameters not known yet, in the model first."""
    for handles in (_handles_of_model, _handles_alive):
        wanted = {p for p in parameters if p not in _known}
        if not wanted:
            return
        for handle in handles(model):
            # Handles of other models may be of a kind that is refused; that is not our concern.
            if not wanted.isdisjoint(_held_by(handle)):
                reference = weakref.ref(handle)
                for p, sharding in _shardings_by(handle):
                    _known[p] = _Known(sharding, reference)


def _handles_of_model(model: nn.Module | None) -> Iterator[FlatParamHandle]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if model is not None:
        for module in FullyShardedDataParallel.fsdp_modules(model):
            if module._handle is not None:
                yield module._handle


def _handles_alive(_: nn.Module | None) -> Iterator[FlatParamHandle]:
    """Every handle there is, for callers that have no model that keeps one.

    The drop-ins (`gradclip.clip_grad_norm_`) and clippers built from `named_parameters()` get
    parameters alone, and a module may be a part of what one FSDP module wraps. A parameter doesn't
    refer to its handle, and torch keeps no list of handles, so Python's is searched: once for
    each model, as what is found is remembered.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    return (found for found in gc.get_objects() if type(found) is FlatParamHandle)


def _held_by(handle: FlatParamHandle) -> Sequence[Tensor]:
    """The parameters as the model has them: the original ones, or the flat one in their place."""
    return handle.flat_param._params or [handle.flat_param]


def _shardings_by(handle: FlatParamHandle) -> Iterator[tuple[Tensor, Sharding]]:
    """The parameters of one handle; tensor parallelism may have sharded them before FSDP1."""
    flat = handle.flat_param
    own = (axis_of(handle.process_group),)
    split, copied = (own, ()) if handle.uses_sharded_strategy else ((), own)
    before = [
        Sharding() if spec is None else sharding_over(spec.mesh, spec.placements)
        for spec in flat._param_extensions
    ]
    if flat._params is None:
        if any(sharding != Sharding() for sharding in before):
            msg = (
                "A FlatParameter of FSDP1 holds parameters that tensor parallelism has sharded, "
                "and others it hasn't; supported: FSDP1 over tensor parallelism with "
                "use_orig_params=True, and fully_shard. Wrap with use_orig_params=True."
            )
            raise LayoutError(msg)
        before = [Sharding()]
    for p, sharding in zip(_held_by(handle), before, strict=True):
        yield p, Sharding((*split, *sharding.split), (*copied, *sharding.copied))


def _lost(names: Sequence[str]) -> str:
    return (
        f"Parameters {list(names[:3])} belong to FullyShardedDataParallel (FSDP1), and no live "
        "FSDP module holds them, so nothing says which ranks hold the rest; supported: parameters "
        "of a wrapped model that is in use. Build the optimizer and the clipper from the wrapped "
        "model's parameters, after wrapping."
    )
