"""The loss over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_loss"]


def mean_loss(loss: Tensor | None, device: torch.device) -> Tensor | None:
    """The mean over the ranks that have a loss, in one message of 16 bytes; every rank takes part.

    Args:
        loss: 0-d, this rank's; None where it has none, as all but the last pipeline stage.
        device: Where decisions are made.

    Returns:
        0-d float64, the same on every rank; None if no rank has a loss.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return None if loss is None else loss.detach().to(device, torch.float64)
    message = torch.zeros(2, dtype=torch.float64, device=device)
    if loss is not None:
        message = torch.stack([loss.detach().to(device, torch.float64), message.new_ones(())])
    dist.all_reduce(message)
    total, count = message.unbind()
    if loss is None and not bool(count):
        return None
    return total / count
