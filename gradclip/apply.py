"""Effect: scale in place, clamp, or withhold the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.types import Grads, Kernel, Kernels, Verdict

__all__ = ["apply", "scale_"]


def apply(
    verdict: Verdict,
    grads: Grads,
    parameters: Iterable[Parameter],
    kernels: Kernels,
    grad_scale: Tensor | None = None,
) -> None:
    """Carry out a verdict on this rank's gradients.

    A step is withheld by dropping the gradients (`.grad = None`): every torch optimizer then
    leaves parameters and state, weight decay included, as they are. Knowing that takes one host
    read, made only where something configured can withhold a step.

    Args:
        verdict: The decision, equal on every rank.
        grads: All local gradients, one sequence per measured slot.
        parameters: Whose gradients to drop.
        kernels: Gives the kernel for a device.
        grad_scale: 0-d factor that the gradients still carry; a clamp carries it too.
    """
    if verdict.skip is not None and bool(verdict.skip):
        for parameter in parameters:
            parameter.grad = None
        return
    scale_(grads, verdict.coef, kernels)
    on_cpu = verdict.coef.device.type == "cpu"
    if verdict.clamped is None or (on_cpu and not verdict.clamped):
        return
    for value, slots in verdict.clamps:
        limit = value if grad_scale is None else value * grad_scale
        for kernel, here in _by_device([grads[slot] for slot in slots], kernels):
            kernel.clamp_([grad for slot in here for grad in slot], limit)


def scale_(grads: Grads, coef: Tensor, kernels: Kernels) -> None:
    """Multiply each slot's gradients in place by its coefficient, on whatever device they are."""
    for kernel, here in _by_device(grads, kernels):
        device = next(grad.device for slot in here for grad in slot)
        kernel.scale_(here, coef.to(device))


def _by_device(grads: Grads, kernels: Kernels) -> Sequence[tuple[Kernel, Grads]]:
    devices: set[torch.device] = {grad.device for slot in grads for grad in slot}
    if len(devices) == 1:
        return [(kernels(devices.pop()), grads)]
    return [
        (kernels(device), [[grad for grad in slot if grad.device == device] for slot in grads])
        for device in sorted(devices, key=str)
    ]
