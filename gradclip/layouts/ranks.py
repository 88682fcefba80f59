"""What is asked of all ranks: which is the first, and the mean of their losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gradclip.layouts.local import device_of

__all__ = ["is_first_rank", "mean_loss"]


def mean_loss(losses: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """The mean over the ranks that have a loss, in one message of 16 bytes; every rank takes part.

    Args:
        losses: This rank's, of one element each; empty where it has none, as on all but the last
            pipeline stage.
        device: Where decisions are made.

    Returns:
        0-d float64, the same on every rank; None if no rank has a loss.
    """
    # A loss over sharded classes (loss parallel) is a DTensor.
    whole = [loss.full_tensor() if isinstance(loss, DTensor) else loss for loss in losses]
    own = None
    if whole:
        own = torch.stack([loss.reshape(()).to(device, torch.float64) for loss in whole]).mean()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return own
    message = torch.zeros(2, dtype=torch.float64, device=device)
    if own is not None:
        message = torch.stack([own, torch.ones_like(own)])
    group = dist.group.WORLD
    assert group is not None
    message = message.to(device_of(group, device))
    dist.all_reduce(message, group=group)
    total, count = message.to(device).unbind()
    if own is None and not bool(count):
        return None
    return total / count


def is_first_rank() -> bool:
    """Whether this process is the one of all that writes files and warnings."""
    return not dist.is_initialized() or dist.get_rank() == 0
