"""torch's own clipping functions, on this engine: same signatures, same semantics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from gradclip.errors import ConfigError, NonFiniteError
from gradclip.kernels import kernel_for
from gradclip.layouts import LocalLayout, completed, detect
from gradclip.measure import measure
from gradclip.norms import is_wide
from gradclip.plan.parameters import grad_dtype
from gradclip.types import Collected, Grads, Kernel

__all__ = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"]

Tensors = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, right under `fully_shard` and in half precision.

    Gradients are multiplied by min(1, max_norm / (norm + 1e-6)), torch's formula.

    Departures: a negative or NaN `max_norm` is refused (torch flips or erases gradients), an
    infinite one only measures, half precision gradients give a float32 norm, a parameter given
    twice counts once, and sparse gradients are clipped too.

    Args:
        parameters: A tensor or an iterable of tensors whose `.grad` is clipped in place.
        max_norm: Largest norm, at least 0.
        norm_type: p of the p-norm, above 0, or inf.
        error_if_nonfinite: Raise, before anything is written, if the norm is NaN or infinite.
        foreach: Accepted and ignored: the kernel follows from the device.

    Returns:
        The norm before clipping over all ranks, a plain 0-d tensor; 0 if there is no gradient.

    Raises:
        ConfigError: If `max_norm` or `norm_type` is out of range.
        NonFiniteError: If asked for; it is a RuntimeError, as in torch.
    """
    del foreach
    limit = float(max_norm)
    if not limit >= 0:
        msg = f"max_norm is {max_norm!r}; it must be 0 or more (inf only measures)."
        raise ConfigError(msg)
    owners = list(dict.fromkeys(_listed(parameters)))
    layout = detect({str(i): p for i, p in enumerate(owners)})
    collected = layout.collect([owners])
    grads = [p.grad for p in owners if p.grad is not None]
    total, kernel = _measure(_magnitudes(grads, norm_type) or collected, layout, norm_type, owners)
    if error_if_nonfinite:
        _refuse_nonfinite(total, norm_type)
    if math.isfinite(limit):
        coef = (limit / (total + 1e-6)).clamp(max=1.0)
        kernel.scale_(collected.all, coef.unsqueeze(0))
    return _rounded(total, owners)


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """`torch.nn.utils.clip_grad_value_`: clamp every gradient element to [-v, v] in place.

    Departures: a negative or NaN `clip_value` is refused, and sparse gradients are clamped too.

    Args:
        parameters: A tensor or an iterable of tensors whose `.grad` is clamped in place.
        clip_value: v, at least 0.
        foreach: Accepted and ignored: the kernel follows from the device.

    Raises:
        ConfigError: If `clip_value` is out of range, or a parameter is complex.
    """
    del foreach
    limit = float(clip_value)
    if not limit >= 0:
        msg = f"clip_value is {clip_value!r}; it must be 0 or more."
        raise ConfigError(msg)
    owners = list(dict.fromkeys(_listed(parameters)))
    if complex_ := [i for i, p in enumerate(owners) if p.is_complex()]:
        msg = (
            f"parameters[{complex_[0]}] is complex, which has no order to clamp by; allowed: real "
            "ones. Leave it out, or use clip_grad_norm_."
        )
        raise ConfigError(msg)
    layout = detect({str(i): p for i, p in enumerate(owners)})
    kernel_for(layout.devices).clamp_(layout.collect([owners]).all[0], limit)


@torch.no_grad()
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.get_total_norm`: the norm of tensors taken as one vector, over all ranks.

    Args:
        tensors: A tensor or an iterable of tensors (gradients themselves, not parameters).
        norm_type: p of the p-norm, above 0, or inf.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: Accepted and ignored: the kernel follows from the device.

    Returns:
        A plain 0-d tensor, float32 or float64; 0 for no tensors.

    Raises:
        ConfigError: If `norm_type` is out of range.
        NonFiniteError: If asked for; it is a RuntimeError, as in torch.
    """
    del foreach
    listed = [completed(tensor) for tensor in _listed(tensors)]
    layout = detect({str(i): tensor for i, tensor in enumerate(listed)})
    held = _magnitudes(listed, norm_type) or layout.take([[(t, t) for t in listed]])
    total, _ = _measure(held, layout, norm_type, listed)
    if error_if_nonfinite:
        _refuse_nonfinite(total, norm_type)
    return _rounded(total, listed)


def _listed(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _magnitudes(grads: list[Tensor], norm_type: float) -> Collected | None:
    """Complex gradients as their magnitudes, where squares of both parts don't add up to them."""
    if norm_type == 2 or not any(map(Tensor.is_complex, grads)):
        return None
    held = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    real: Grads = [[grad.abs() if grad.is_complex() else grad for grad in held if grad.numel()]]
    return Collected(all=real, counted=real)


def _measure(
    collected: Collected, layout: LocalLayout, norm_type: float, owners: list[Tensor]
) -> tuple[Tensor, Kernel]:
    p = float(norm_type)
    if not p > 0:
        msg = f"norm_type is {norm_type!r}; it must be above 0, or inf."
        raise ConfigError(msg)
    wide = {p: is_wide(p, map(grad_dtype, owners))}
    kernel = kernel_for(layout.devices)
    [norms], _ = measure([(collected.counted, wide)], layout, kernel)
    return norms[p].squeeze(0), kernel


def _refuse_nonfinite(total: Tensor, norm_type: float) -> None:
    if not torch.isfinite(total):
        msg = (
            f"The total norm of order {norm_type} for gradients is {float(total)}, so it can't be "
            "clipped; gradients are unchanged. Set error_if_nonfinite=False to clip all the same."
        )
        raise NonFiniteError(msg)


def _rounded(total: Tensor, grads: list[Tensor]) -> Tensor:
    return total.to(reduce(torch.promote_types, (g.dtype.to_real() for g in grads), torch.float32))
