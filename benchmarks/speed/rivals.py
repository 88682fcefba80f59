"""How others clip: calls as a user writes them, packages, and loops in the manner of trainers.

The loops are written here from descriptions of what those trainers do; packages are imported where
they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Clip = Callable[[], object]
PACKAGES = ("zclip", "smartclip", "autoclip")


def installed(package: str) -> str | None:
    """Its version; None if it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torchs(model: nn.Module, limit: float, foreach: bool | None = None) -> Clip:
    """`clip_grad_norm_`."""
    clip = torch.nn.utils.clip_grad_norm_
    return lambda: clip(model.parameters(), limit, foreach=foreach)


def zclip_package(model: nn.Module, limit: float, warmup: int) -> Clip:
    """The zclip package, its norm above `limit` clipped in any case."""
    theirs = import_module("zclip").ZClip(max_grad_norm=limit, warmup_steps=warmup)
    return partial(theirs.step, model)


def smartclip_package(model: nn.Module) -> Clip:
    """The smartclip package's AutoClip, at its defaults."""
    smartclip = import_module("smartclip")
    return partial(smartclip.apply, model, smartclip.AutoClip())


def autoclip_package(model: nn.Module) -> Clip:
    """The autoclip package, with one threshold for all parameters."""
    clip = import_module("autoclip.torch").QuantileClip
    return clip(model.parameters(), global_threshold=True).step


def autoclip_handler(model: nn.Module, percentile: float, norms: list[float]) -> Clip:
    """The AutoClip paper's handler: every norm in a list, a percentile of them by numpy."""

    def clip() -> None:
        squares = 0.0
        for p in model.parameters():
            if p.grad is not None:
                squares += p.grad.norm(2).item() ** 2
        norms.append(squares**0.5)
        limit = np.percentile(norms, percentile)
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    return clip


def _unit_norms(x: Tensor) -> Tensor:
    if x.ndim <= 1:
        return x.norm(2)
    return x.norm(2, dim=tuple(range(1, x.ndim)), keepdim=True)


def timm_agc(model: nn.Module, factor: float) -> Clip:
    """AGC as in timm: for each tensor both branches are computed, and one selected."""

    def clip() -> None:
        for p in model.parameters():
            if p.grad is None:
                continue
            limit = _unit_norms(p.detach()).clamp_(min=1e-3).mul_(factor)
            norms = _unit_norms(p.grad)
            clipped = p.grad * (limit / norms.clamp(min=1e-6))
            p.grad.copy_(torch.where(norms < limit, p.grad, clipped))

    return clip


def composer_agc(model: nn.Module, factor: float) -> Clip:
    """AGC as in composer: a coefficient of at most 1 for each unit, a product for each tensor."""

    def clip() -> None:
        for p in model.parameters():
            if p.grad is None:
                continue
            limit = _unit_norms(p.detach()).clamp_(min=1e-3).mul_(factor)
            coef = limit.div_(_unit_norms(p.grad)).nan_to_num_(nan=1.0).clamp_(max=1.0)
            p.grad.copy_(p.grad * coef)

    return clip


def titan(model: nn.Module, limit: float) -> Clip:
    """As in torchtitan: torch's norm, gathered to a plain tensor, then torch's scaling."""

    def clip() -> None:
        params = list(model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)

    return clip
