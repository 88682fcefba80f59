"""Where this rank's part of a parameter lies in the whole of it. FSDP1 was read in torch 2.13."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradclip.errors import LayoutError
from gradclip.layouts.cuts import flat_handle, is_flat, is_flattened

__all__ = ["Place", "place_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a parameter: a box of it, or an interval of its elements in memory order.

    Attributes:
        shape: Of the whole parameter.
        start: Offset of the box in each dim.
        size: Of the box in each dim; 0 somewhere if this rank holds nothing.
        interval: First element and the one after the last, of the flattened parameter; the part
            is then one-dimensional and `start` and `size` say nothing.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    interval: tuple[int, int] | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Place:
        """All of it."""
        return cls(shape, (0,) * len(shape), shape)

    @classmethod
    def between(cls, shape: tuple[int, ...], first: int, stop: int) -> Place:
        """Some elements in a row."""
        return cls(shape, (), (), (first, max(first, stop)))

    def of(self, whole: Tensor) -> Tensor:
        """This part of a whole parameter-shaped tensor, as a view of it if that is contiguous."""
        if self.interval is not None:
            first, stop = self.interval
            return whole.reshape(-1)[first:stop]
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
        return whole


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
    handle = flat_handle(parameter)
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
            "supported for units and for memory of elements: fully_shard over tensor parallelism."
        )
        raise LayoutError(msg)
    shape = tuple(flat._shapes[index])
    if not handle.uses_sharded_strategy:
        return Place.whole(shape)
    info = flat._shard_param_infos[index]
    if info.intra_param_start_idx is None or info.intra_param_end_idx is None:
        return Place.between(shape, 0, 0)
    return Place.between(shape, info.intra_param_start_idx, info.intra_param_end_idx + 1)
