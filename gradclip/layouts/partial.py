"""Gradients that are Partial: each rank holds a term of a sum that no collective has formed yet.

Sequence parallel norms leave such gradients, and computations on DTensors by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.errors import LayoutError
from gradclip.layouts.meshes import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["PartialSums", "completed"]

BUCKET = 1 << 17
"""How many elements are copied into one message; a larger gradient is sent without a copy."""

_NOTHING, _WHOLE, _PARTIAL = range(3)


class PartialSums:
    """Reduces Partial gradients of replicated parameters in place, in few messages.

    Only a parameter that is Replicate on every axis of its mesh can have such a gradient:
    `fully_shard` reduces the gradients of what it shards. Ranks agree once, when a parameter first
    has a gradient on any of them, whether its gradients are Partial. A rank without a gradient
    then knows which messages to take part in.

    Args:
        parameters: Every parameter by name, in the same order on every rank.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names = {p: name for name, p in parameters.items()}
        self._meshes: dict[DeviceMesh, list[DTensor]] = {}
        for p in parameters.values():
            if not is_dtensor(p) or not p.requires_grad:
                continue
            whole = all(placement.is_replicate() for placement in p.placements)
            if whole and p.device_mesh.size() > 1:
                self._meshes.setdefault(p.device_mesh, []).append(p)
        self._kinds: dict[DTensor, list[int]] = {}

    def reduce(self) -> None:
        """Reduce this step's Partial gradients; every rank must call.

        Raises:
            LayoutError: If a gradient is Partial with another reduction than a sum or a mean.
        """
        for mesh, parameters in self._meshes.items():
            unknown = [p for p in parameters if p not in self._kinds]
            if unknown:
                self._agree(mesh, unknown)
            for dim in range(mesh.ndim):
                partial = [
                    p for p in parameters if p in self._kinds and self._kinds[p][dim] == _PARTIAL
                ]
                for bucket in _buckets(partial):
                    _complete(bucket, mesh, dim)

    def _agree(self, mesh: DeviceMesh, parameters: list[DTensor]) -> None:
        mine = [[self._kind(p, dim) for dim in range(mesh.ndim)] for p in parameters]
        device = parameters[0].to_local().device
        kinds = torch.tensor(mine, dtype=torch.int64, device=device)
        for group in mesh.get_all_groups():
            dist.all_reduce(kinds, dist.ReduceOp.MAX, group)
        for p, kind in zip(parameters, kinds.tolist(), strict=True):
            if any(kind):
                self._kinds[p] = kind

    def _kind(self, parameter: DTensor, dim: int) -> int:
        grad = parameter.grad
        if not is_dtensor(grad):
            return _NOTHING
        from torch.distributed.tensor import Partial

        placement = grad.placements[dim]
        if not isinstance(placement, Partial):
            return _WHOLE
        if placement.reduce_op not in ("sum", "avg"):
            msg = (
                f"The gradient of {self._names[parameter]!r} is {placement!r} over ranks; "
                "supported: Partial('sum') and Partial('avg'). Redistribute it after backward."
            )
            raise LayoutError(msg)
        return _PARTIAL


def completed(tensor: Tensor) -> Tensor:
    """The tensor with its partial sums reduced; every rank of its mesh must call."""
    if not is_dtensor(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=whole)


def _buckets(parameters: list[DTensor]) -> Iterator[list[DTensor]]:
    """Groups of neighbours of one dtype that fit into one message; a larger one alone."""
    bucket: list[DTensor] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(q.numel() for q in [*bucket, p]) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _complete(bucket: list[DTensor], mesh: DeviceMesh, dim: int) -> None:
    """Reduce one bucket of gradients along one axis of the mesh.

    The same message counts how many ranks had each gradient: if none had, it stays None.
    """
    group = mesh.get_group(dim)
    shares = [_share(p, mesh, dim).reshape(-1) for p in bucket]
    had = shares[0].new_tensor([p.grad is not None for p in bucket])
    if shares[0].numel() > BUCKET:  # alone in its bucket; a copy would be as large as it is
        dist.all_reduce(shares[0], group=group)
        dist.all_reduce(had, group=group)
    else:
        message = torch.cat([*shares, had])
        dist.all_reduce(message, group=group)
        *shares, had = message.split([*(share.numel() for share in shares), len(bucket)])
    for p, total, ranks in zip(bucket, shares, had, strict=True):
        _write(p, total, ranks, dim)


def _share(parameter: DTensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """What this rank adds to the sum of one gradient along one axis.

    A Partial gradient adds its part. A whole one is the same on every rank: the first adds it.
    """
    grad = parameter.grad
    if is_dtensor(grad):
        from torch.distributed.tensor import Partial

        part = grad.to_local()
        placement = grad.placements[dim]
        if isinstance(placement, Partial):
            return part / mesh.size(dim) if placement.reduce_op == "avg" else part
        if mesh.get_local_rank(dim) == 0:
            return part
    return torch.zeros_like(parameter.to_local())


def _write(parameter: DTensor, total: Tensor, ranks: Tensor, dim: int) -> None:
    """Put a reduced gradient in the parameter's `.grad`, unless no rank had one."""
    from torch.distributed.tensor import DTensor, Replicate

    grad = parameter.grad
    if grad is None:
        if ranks > 0:
            total = total.clone().view(parameter.shape)
            parameter.grad = DTensor.from_local(
                total, parameter.device_mesh, parameter.placements, run_check=False
            )
        return
    assert is_dtensor(grad)
    if grad.placements[dim].is_partial():
        part = grad.to_local()
        part.copy_(total.view(part.shape))
        placements = [*grad.placements[:dim], Replicate(), *grad.placements[dim + 1 :]]
        parameter.grad = DTensor.from_local(part, grad.device_mesh, placements, run_check=False)
