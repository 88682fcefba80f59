"""Where float64 numbers can live: norms, limits and states are kept in float64."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

__all__ = ["decided_on", "has_float64", "moved"]

_HAVE_FLOAT64 = ("cpu", "cuda", "meta")


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's mps doesn't, nor do some of Intel's xpu.

    Other kinds than the usual ones are asked by one small operation, once a process.
    """
    if device.type in _HAVE_FLOAT64:
        return True
    try:
        torch.ones((), dtype=torch.float64, device=device).sqrt()
    except (TypeError, RuntimeError):
        return False
    return True


def decided_on(devices: Iterable[torch.device]) -> tuple[torch.device, ...]:
    """The devices of gradients, after the one where decisions are made.

    That is the first of them, or the CPU if the first has no float64.
    """
    found = tuple(dict.fromkeys(devices)) or (torch.device("cpu"),)
    if has_float64(found[0]):
        return found
    return tuple(dict.fromkeys((torch.device("cpu"), *found)))


def moved(value: Tensor, device: torch.device) -> Tensor:
    """A value on another device, never in float64 on one that hasn't it: cast on the other side."""
    if value.device == device:
        return value
    if value.dtype == torch.float64 and not has_float64(device):
        value = value.float()
    return value.to(device)
