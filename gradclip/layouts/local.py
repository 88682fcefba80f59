"""Every rank holds every gradient: one process, or DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradclip.devices import decided_on
from gradclip.layouts.fsdp1 import flat_region, is_flattened, padding
from gradclip.layouts.meshes import is_dtensor, mesh_region
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
    """Every rank holds every gradient whole, so that no collective is needed.

    Sparse gradients are measured by their values, after values of the same row were added up;
    complex ones by their real and imaginary parts.

    Args:
        parameters: Every parameter by name.
        groups: For subclasses, and for a test: groups of ranks that hold other parts, to sum over.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], groups: Sequence[ProcessGroup] = ()
    ) -> None:
        self._some_complex = any(p.is_complex() for p in parameters.values())
        self._groups = list(groups)
        self.reduces = bool(groups)
        parts = [local_part(p) for p in parameters.values()]
        self.devices = decided_on(part.device for part in parts)
        self._some_empty = not all(part.numel() for part in parts)

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
        """How many elements each slot has over all ranks, without padding: float64, (slots,)."""
        held = [sum(part.numel() for part in slot) for slot in self.weights(slots).counted]
        surplus = [sum(map(_surplus, slot)) for slot in slots]
        mine = [n - extra for n, extra in zip(held, surplus, strict=True)]
        return self.sum(torch.tensor(mine, dtype=torch.float64, device=self.devices[0]))

    def region(self, name: str, parameter: Tensor) -> Region:
        """Where the local part of a parameter lies in it.

        Raises:
            LayoutError: If that can't be told.
        """
        return region_of(name, parameter)

    def take(self, slots: Owned) -> Collected:
        """Take the local part of gradients that are given with their parameters; nothing is copied.

        Args:
            slots: For each slot, pairs of a parameter and its gradient.
        """
        held = [[grad for _, grad in slot] for slot in slots]
        return self._taken(held, _are_contiguous(held))

    def _taken(self, held: list[list[Tensor]], plain: bool) -> Collected:
        if self._some_complex or not plain:
            held = [list(map(_real_values, slot)) for slot in held]
        if self._some_empty or not plain:
            held = [[grad for grad in slot if grad.numel()] for slot in held]
        return Collected(all=held, counted=held)

    def held(self, parameter: Tensor) -> list[Tensor]:
        """The local part of one gradient, or nothing if there is none; without a collective."""
        return [] if parameter.grad is None else [_real_values(local_part(parameter.grad))]

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor that is sharded as a parameter is."""
        return local_part(tensor)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over ranks that hold other parts: one all-reduce for each axis, none without."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest over the same ranks; NaN if one of them has a NaN."""
        if not self._groups:
            return values
        # Some backends lose NaN in a MAX reduction. The bits of non-negative doubles, read as
        # integers, have the order of the numbers, with NaN above infinity.
        bits = values.abs().view(torch.int64)
        return self._reduce(bits, dist.ReduceOp.MAX).view(torch.float64)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        device = values.device
        for group in self._groups:
            values = values.to(device_of(group, values.device))
            dist.all_reduce(values, op, group)
        return values.to(device)


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory (as after `expand`), so that writing one writes others."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _grads(slots: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[g for p in slot if (g := p.grad) is not None] for slot in slots]


def _are_contiguous(held: Grads) -> bool:
    """Whether all are plain dense tensors: a cheap test, so that only others cost more."""
    return all(map(Tensor.is_contiguous, chain.from_iterable(held)))


def _settled(grad: Tensor) -> Tensor:
    """The same gradient with memory of its own for each element."""
    if grad.is_sparse:
        return grad.coalesce()
    return grad if not overlaps(grad) else grad.clone(memory_format=torch.contiguous_format)


def _real_values(grad: Tensor) -> Tensor:
    """The values of a sparse gradient, and complex numbers as pairs of real ones; views."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    if grad.is_complex():
        # A conjugate's magnitudes are the same, and torch can't view a lazy one as real numbers.
        grad = torch.view_as_real(grad.conj() if grad.is_conj() else grad)
    return grad


def _surplus(parameter: Tensor) -> int:
    """Numbers held of a parameter that aren't elements: padding of FSDP1, imaginary parts."""
    imaginary = parameter.numel() if parameter.is_complex() else 0
    return imaginary + padding(parameter)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def device_of(group: ProcessGroup, near: torch.device) -> torch.device:
    """The device a group reduces on: this one if it can, else the one that it has a backend for.

    They differ where shards are offloaded to the CPU and ranks talk over NCCL.
    """
    kinds = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if near.type in kinds:
        return near
    return group.bound_device_id or torch.device(kinds[0])


def region_of(name: str, parameter: Tensor) -> Region:
    """Where the local part of a parameter lies in it.

    Args:
        name: To name in errors.
        parameter: A plain tensor, a DTensor, or a parameter of FSDP1.

    Raises:
        LayoutError: If FSDP1 holds the parameter together with others in one, or holds a part of
            it that tensor parallelism sharded first.
    """
    if is_flattened(parameter):
        return flat_region(name, parameter)
    if is_dtensor(parameter):
        return mesh_region(parameter)
    return Region.whole(tuple(parameter.shape))
