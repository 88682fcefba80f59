"""Geometry: the only place that knows about ranks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from gradclip.errors import LayoutError
from gradclip.layouts.local import LocalLayout
from gradclip.layouts.sharded import ShardedLayout

__all__ = ["LocalLayout", "ShardedLayout", "detect"]


def detect(
    parameters: Mapping[str, Tensor], process_group: ProcessGroup | None = None
) -> LocalLayout:
    """Find out from the parameters themselves how they are laid out.

    Args:
        parameters: Every parameter by name, in the same order on every rank.
        process_group: One more group whose ranks hold other parameters of the same model.

    Raises:
        LayoutError: If a parameter is laid out in a way that isn't supported.
    """
    flattened = [name for name, p in parameters.items() if getattr(p, "_fsdp_flattened", False)]
    if flattened:
        msg = (
            f"Parameters {_some(flattened)} belong to FullyShardedDataParallel (FSDP1), whose "
            "shards carry no description; supported: one process, DDP, and fully_shard (FSDP2) "
            "over one mesh axis. Shard the model with torch.distributed.fsdp.fully_shard."
        )
        raise LayoutError(msg)
    partitioned = [name for name, p in parameters.items() if hasattr(p, "ds_id")]
    if partitioned:
        msg = (
            f"Parameters {_some(partitioned)} are partitioned by DeepSpeed, which keeps their "
            "gradients to itself; supported: one process, DDP, and fully_shard (FSDP2). "
            "Let DeepSpeed clip ('gradient_clipping' in its config), or use FSDP2."
        )
        raise LayoutError(msg)
    if any(isinstance(p, DTensor) for p in parameters.values()):
        return ShardedLayout(parameters, process_group)
    return LocalLayout(parameters, process_group)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
