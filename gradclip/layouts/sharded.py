"""DTensor parameters over one mesh axis: `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from gradclip.errors import LayoutError
from gradclip.layouts.local import LocalLayout
from gradclip.types import Collected, Grads

__all__ = ["ShardedLayout"]


class ShardedLayout(LocalLayout):
    """Each rank holds a slice of the sharded parameters and all of the others.

    A sharded gradient is counted by every rank, each its own slice; a whole one (an ignored or a
    replicated parameter) by the first rank of the axis alone. Then one sum over the axis is the
    sum over every element, and the same bits on every rank.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(parameters, process_group)
        sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        first = next(iter(sharded.values()))
        mesh = first.device_mesh
        for name, p in sharded.items():
            if p.device_mesh != mesh or mesh.ndim != 1:
                msg = (
                    f"Parameter {name!r} is a DTensor over {p.device_mesh}, placed "
                    f"{p.placements}; supported: every DTensor over one and the same mesh axis. "
                    "Shard the whole model with fully_shard over a one-dimensional mesh."
                )
                raise LayoutError(msg)
        local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters.values())
        self._devices = tuple(dict.fromkeys(p.device for p in local))
        self._groups.insert(0, mesh.get_group())
        self._leads = mesh.get_local_rank() == 0

    def take(self, grads: Grads) -> Collected:
        """Take the local shard of each gradient, without a copy.

        Raises:
            LayoutError: If a gradient is sparse, or still waits for its reduction (Partial).
        """
        whole = super().take(grads).all
        shards = [[(g, part) for g in slot if (part := _shard(g)).numel()] for slot in whole]
        held = [[part for _, part in slot] for slot in shards]
        if self._leads:
            return Collected(all=held, counted=held)
        split = [[part for g, part in slot if _is_split(g)] for slot in shards]
        return Collected(all=held, counted=split)


def _is_split(grad: Tensor) -> bool:
    return isinstance(grad, DTensor) and isinstance(grad.placements[0], Shard)


def _shard(grad: Tensor) -> Tensor:
    if not isinstance(grad, DTensor):
        return grad
    if grad.placements[0].is_partial():
        msg = (
            f"A gradient is a DTensor placed {grad.placements}: a partial sum that no collective "
            "has reduced yet. Redistribute it before clipping, or let fully_shard reduce it."
        )
        raise LayoutError(msg)
    return grad.to_local()
