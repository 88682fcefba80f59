"""Arithmetic: sums of powers and scaling, one kernel per kind of device."""

from __future__ import annotations

from typing import Literal

import torch

from gradclip.errors import ConfigError, LayoutError
from gradclip.kernels.accelerator import AcceleratorKernel
from gradclip.kernels.cpu import CpuKernel
from gradclip.kernels.reference import ReferenceKernel
from gradclip.types import Kernel

__all__ = ["KernelName", "kernel_for"]

KernelName = Literal["cpu", "accelerator", "reference"]

_KERNELS: dict[str, Kernel] = {
    "cpu": CpuKernel(),
    "accelerator": AcceleratorKernel(),
    "reference": ReferenceKernel(),
}


def kernel_for(device: torch.device, name: KernelName | None = None) -> Kernel:
    """The kernel for a device, or the one asked for by name.

    Raises:
        ConfigError: If no kernel has that name.
        LayoutError: If the device has no float64, which norms are accumulated in.
    """
    if device.type == "mps":
        msg = "Gradients are on mps, which has no float64; supported: cpu, cuda, xpu. Train there."
        raise LayoutError(msg)
    chosen = name or ("cpu" if device.type == "cpu" else "accelerator")
    if chosen not in _KERNELS:
        msg = f"kernel is {name!r}; allowed: {', '.join(map(repr, _KERNELS))}, or None to choose."
        raise ConfigError(msg)
    return _KERNELS[chosen]
