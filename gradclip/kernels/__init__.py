"""Arithmetic: sums of powers and scaling, one kernel per kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from gradclip.errors import ConfigError, LayoutError
from gradclip.kernels.accelerator import AcceleratorKernel
from gradclip.kernels.cpu import CpuKernel
from gradclip.kernels.reference import ReferenceKernel
from gradclip.kernels.split import SplitKernel
from gradclip.types import Kernel

__all__ = ["KernelName", "kernel_for"]

KernelName = Literal["cpu", "accelerator", "reference"]

_KERNELS: dict[str, Kernel] = {
    "cpu": CpuKernel(),
    "accelerator": AcceleratorKernel(),
    "reference": ReferenceKernel(),
}


def kernel_for(devices: Sequence[torch.device], name: KernelName | None = None) -> Kernel:
    """The kernel for gradients on these devices.

    Args:
        devices: Where local gradients are; results are on the first.
        name: Takes this kernel everywhere instead of the device's own.

    Raises:
        ConfigError: If no kernel has that name.
        LayoutError: If a device has no float64, which norms are accumulated in.
    """
    if name is not None and name not in _KERNELS:
        msg = f"kernel is {name!r}; allowed: {', '.join(map(repr, _KERNELS))}, or None to choose."
        raise ConfigError(msg)
    if any(device.type == "mps" for device in devices):
        msg = "Gradients are on mps, which has no float64; supported: cpu, cuda, xpu. Train there."
        raise LayoutError(msg)
    kernels = {
        device: _KERNELS[name or ("cpu" if device.type == "cpu" else "accelerator")]
        for device in devices
    }
    return next(iter(kernels.values())) if len(kernels) == 1 else SplitKernel(kernels)
