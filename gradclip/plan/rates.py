"""How far an optimizer's steps move parameters beside the gradients that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradclip.devices import moved

__all__ = ["grows_with_gradient", "kinds_of", "rate_of"]

_GROWING = {"SGD", "ASGD", "SGDW", "SGDP", "AccSGD", "FusedSGD", "AggMo", "QHM"}
"""Optimizers whose step is the gradient times a rate, up to momentum: of torch, timm, apex and
pytorch_optimizer. All others that are known divide by the size of past gradients."""
_MOST_MOMENTUM = 0.999
"""1 and more would have no end."""


def kinds_of(optimizer: Any) -> tuple[str, ...]:
    """Names of an optimizer's class and of the classes that one is made from."""
    stepping = getattr(optimizer, "stepping", optimizer)
    return tuple(kind.__name__ for kind in type(stepping).__mro__[:-1])


def grows_with_gradient(kinds: Iterable[str]) -> bool:
    """Whether a gradient twice as large makes a step twice as large, as with SGD."""
    return not _GROWING.isdisjoint(kinds)


def rate_of(optimizer: Any, device: torch.device | None) -> Tensor | float | None:
    """How far one gradient moves a parameter in all, for each unit of the gradient.

    That is lr * (1 - dampening) / (1 - momentum): momentum carries a gradient on through later
    steps. The largest of the optimizer's groups, read without waiting for a device.

    Args:
        optimizer: As it is now.
        device: Where policies decide; None for the host, in its own numbers.

    Returns:
        0-d float64, or a number for the host; None without an optimizer, and where steps don't
        grow with the gradient (Adam, Lion, Muon, and every class that isn't known to be like SGD).
    """
    if optimizer is None or not grows_with_gradient(kinds_of(optimizer)):
        return None
    rates = [_rate(group) for group in optimizer.param_groups]
    if device is None:
        return max(map(float, rates), default=0.0)
    tensors = [moved(rate, device).double() for rate in rates if isinstance(rate, Tensor)]
    most = max((rate for rate in rates if not isinstance(rate, Tensor)), default=0.0)
    known = torch.full((), most, dtype=torch.float64, device=device)
    return torch.stack([known, *(t.reshape(()) for t in tensors)]).amax() if tensors else known


def _rate(group: Mapping[str, Any]) -> Any:
    """Of one parameter group; a tensor where its learning rate is one."""
    momentum = min(group.get("momentum", 0.0), _MOST_MOMENTUM)
    return group["lr"] * (1 - group.get("dampening", 0.0)) / (1 - momentum)
