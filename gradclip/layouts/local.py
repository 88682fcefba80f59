"""Every rank holds every gradient: one process, or DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradclip.errors import LayoutError
from gradclip.layouts.shardings import flat_handle, is_flat, is_flattened
from gradclip.types import Collected, Grads, Region

__all__ = [
    "LocalLayout",
    "Owned",
    "device_of",
    "local_part",
    "overlaps",
    "region_of",
]

Owned = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""For each slot its gradients, each after the parameter (or the tensor itself) it is of."""


class LocalLayout:
    """Whole gradients, so no collective, unless groups are given whose ranks hold other parts.

    Of a sparse gradient its values are taken, once those of one row are added up; of a complex one
    its real and imaginary parts.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[ProcessGroup] = ()
    ) -> None:
        self._some_complex = any(p.is_complex() for p in parameters.values())
        self._groups = list(groups)
        parts = [local_part(p) for p in parameters.values()]
        self._devices = tuple(dict.fromkeys(part.device for part in parts))
        self._some_empty = not all(part.numel() for part in parts)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where local gradients are; measures and decisions live on the first."""
        return self._devices or (torch.device("cpu"),)

    def collect(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take `.grad` of each parameter that has one.

        Raises:
            LayoutError: If a gradient can't be measured; see `take`.
        """
        held = _grads(slots)
        if plain := _are_contiguous(held):
            return self._taken(held, plain)
        for p in chain.from_iterable(slots):
            if (grad := p.grad) is not None:
                p.grad = _settled(grad)
        return self._taken(_grads(slots), plain)

    def weights(self, slots: Sequence[Sequence[Tensor]]) -> Collected:
        """Take the local part of each parameter itself, as `collect` does of its gradient."""
        return self.take([[(p, p.detach()) for p in slot] for slot in slots])

    def sizes(self, slots: Sequence[Sequence[Tensor]]) -> Tensor:
        """Elements of each slot over all ranks, float64 of shape (slots,); no padding counts."""
        held = [sum(part.numel() for part in slot) for slot in self.weights(slots).counted]
        padding = [sum(map(_surplus, slot)) for slot in slots]
        mine = [n - extra for n, extra in zip(held, padding, strict=True)]
        return self.sum(torch.tensor(mine, dtype=torch.float64, device=self.devices[0]))

    def region(self, name: str, parameter: Tensor) -> Region:
        """Where the local part of a parameter lies in it.

        Raises:
            LayoutError: If that can't be told.
        """
        return region_of(name, parameter)

    def take(self, slots: Owned) -> Collected:
        """Take the local part of gradients, given with whose they are, without a copy."""
        held = [[grad for _, grad in slot] for slot in slots]
        return self._taken(held, _are_contiguous(held))

    def _taken(self, held: list[list[Tensor]], plain: bool) -> Collected:
        if self._some_complex or not plain:
            held = [list(map(_real_values, slot)) for slot in held]
        if self._some_empty or not plain:
            held = [[grad for grad in slot if grad.numel()] for slot in held]
        return Collected(all=held, counted=held)

    def held(self, parameter: Tensor) -> list[Tensor]:
        """The local part of one gradient, if there is one; no rank waits for another."""
        return [] if parameter.grad is None else [_real_values(local_part(parameter.grad))]

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor that lies as a parameter does."""
        return local_part(tensor)

    def sum(self, values: Tensor) -> Tensor:
        """One all-reduce for each group of ranks that hold other parts; none if there is none."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest over the same groups, reduced as integers.

        Some backends lose NaN in a MAX reduction. The bits of non-negative doubles order like
        the numbers themselves, with NaN above infinity, and integers have no NaN to lose.
        """
        if not self._groups:
            return values
        bits = values.abs().view(torch.int64)
        return self._reduce(bits, dist.ReduceOp.MAX).view(torch.float64)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        device = values.device
        for group in self._groups:
            values = values.to(device_of(group, values.device))
            dist.all_reduce(values, op, group)
        return values.to(device)


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory (`expand`), so that each can't be written by itself."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _grads(slots: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[g for p in slot if (g := p.grad) is not None] for slot in slots]


def _are_contiguous(held: Grads) -> bool:
    """One cheap look that lets all but plain dense gradients be seen to."""
    return all(map(Tensor.is_contiguous, chain.from_iterable(held)))


def _settled(grad: Tensor) -> Tensor:
    """The same gradient with one place in memory for each element."""
    if grad.is_sparse:
        return grad.coalesce()
    return grad if not overlaps(grad) else grad.clone(memory_format=torch.contiguous_format)


def _real_values(grad: Tensor) -> Tensor:
    """A view of all that isn't zero, as real numbers; conjugates have the same magnitudes."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    if grad.is_complex():
        grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
    return grad


def _surplus(parameter: Tensor) -> int:
    """Numbers held of a parameter that aren't elements: padding of FSDP1, imaginary parts."""
    imaginary = parameter.numel() if parameter.is_complex() else 0
    return imaginary + getattr(parameter, "_shard_numel_padded", 0)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_of(group: ProcessGroup, near: torch.device) -> torch.device:
    """Where a group can reduce: here, else where it has a backend (shards offloaded to CPU)."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if near.type in kinds:
        return near
    return group.bound_device_id or torch.device(kinds[0])


def region_of(name: str, parameter: Tensor) -> Region:
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
        return Region(shape, tuple(start) or (0,) * len(shape), tuple(size))
    return Region.whole(tuple(parameter.shape))


def _in_flat(name: str, parameter: Tensor) -> Region:
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
        return Region.whole(shape)
    info = flat._shard_param_infos[index]
    if info.intra_param_start_idx is None or info.intra_param_end_idx is None:
        return Region.between(shape, 0, 0)
    return Region.between(shape, info.intra_param_start_idx, info.intra_param_end_idx + 1)
