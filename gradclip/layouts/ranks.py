"""Questions to all ranks that aren't about gradients: which is the first, the mean loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.devices import moved
from gradclip.layouts.local import device_of
from gradclip.layouts.meshes import is_dtensor

__all__ = ["is_first_rank", "mean_loss", "rank_count", "this_rank"]


def mean_loss(losses: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The mean loss of the ranks that have one: one message of 16 bytes; every rank must call.

    Args:
        losses: This rank's losses, of one element each; empty if it has none, as on all but the
            last pipeline stage.
        device: Where decisions are made.

    Returns:
        0-d float64, the same on every rank; None if no rank has a loss.
    """
    # A loss over sharded classes (loss parallel) is a DTensor.
    whole = [loss.full_tensor() if is_dtensor(loss) else loss for loss in losses]
    mine = None
    if whole:
        mine = torch.stack([moved(loss.reshape(()), device).double() for loss in whole]).mean()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return mine
    message = torch.zeros(2, dtype=torch.float64, device=device)
    if mine is not None:
        message = torch.stack([mine, torch.ones_like(mine)])
    group = dist.group.WORLD
    assert group is not None
    message = message.to(device_of(group, device))
    dist.all_reduce(message, group=group)
    total, count = message.to(device).unbind()
    if mine is None and not bool(count):
        return None
    return total / count


def is_first_rank() -> bool:
    """Whether this process is the first of all ranks, which alone writes files and warnings."""
    return this_rank() == 0


def this_rank() -> int:
    """The number of this process; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    """How many ranks there are; 1 where there is one process alone."""
    return dist.get_world_size() if dist.is_initialized() else 1
