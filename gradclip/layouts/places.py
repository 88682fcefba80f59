"""Where this rank's part of a parameter lies in the whole of it. FSDP1 was read in torch 2.13."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradclip.errors import LayoutError
from gradclip.layouts.cuts import flat_handle, is_flat, is_flattened
from gradclip.types import Place

__all__ = ["place_of"]


def place_of(name: str, parameter: Tensor) -> Place:
    """Where the local part of a parameter lies.

    Args:
        name: To name in errors.
        parameter: A plain tensor, a DTensor, or a parameter of FSDP1.

    Raises:
        LayoutError: If that can't be told: several parameters in one, or cut twice by FSDP1.
    """
    if is_flattened(parameter):
        return _in_flat(name, parameter)
    if isinstance(parameter, DTensor):
        shape = tuple(parameter.shape)
        size, start = compute_local_shape_and_global_offset(
            shape, parameter.device_mesh, parameter.placements
        )
        return Place(shape, tuple(start) or (0,) * len(shape), tuple(size))
    return Place.whole(tuple(parameter.shape))


def _in_flat(name: str, parameter: Tensor) -> Place:
    handle = flat_handle(name, parameter)
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
            f"{name!r} was cut by tensor parallelism and then by FSDP1, in the middle of rows; "
            "supported for units, and to save the memory of elements: fully_shard over tensor "
            "parallelism. Use that, or another scope, or save: false."
        )
        raise LayoutError(msg)
    shape = tuple(flat._shapes[index])
    if not handle.uses_sharded_strategy:
        return Place.whole(shape)
    info = flat._shard_param_infos[index]
    if info.intra_param_start_idx is None or info.intra_param_end_idx is None:
        return Place.between(shape, 0, 0)
    return Place.between(shape, info.intra_param_start_idx, info.intra_param_end_idx + 1)
