"""Arithmetic: sums of powers and scaling, one kernel per kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from gradclip.devices import has_float64
from gradclip.errors import ConfigError, LayoutError
from gradclip.kernels.accelerator import AcceleratorKernel
from gradclip.kernels.cpu import CpuKernel
from gradclip.kernels.reference import ReferenceKernel
from gradclip.kernels.single import SingleKernel
from gradclip.kernels.split import SplitKernel
from gradclip.types import Kernel

__all__ = ["KernelName", "kernel_for"]

KernelName = Literal["cpu", "accelerator", "single", "reference"]

_KERNELS: dict[str, Kernel] = {
    "cpu": CpuKernel(),
    "accelerator": AcceleratorKernel(),
    "single": SingleKernel(),
    "reference": ReferenceKernel(),
}


def kernel_for(devices: Sequence[torch.device], name: KernelName | None = None) -> Kernel:
    """The kernel for gradients on these devices.

    Args:
        devices: Where local gradients are; results are on the first.
        name: Takes this kernel everywhere instead of the device's own.

    Raises:
        ConfigError: If no kernel has that name.
        LayoutError: If a kernel is named that accumulates in float64, where a device has none.
    """
    if name is not None and name not in _KERNELS:
        msg = f"kernel is {name!r}; allowed: {', '.join(map(repr, _KERNELS))}, or None to choose."
        raise ConfigError(msg)
    lacking = [device.type for device in devices if not has_float64(device)]
    if name not in (None, "single") and lacking:
        msg = (
            f"kernel is {name!r}, and gradients are on {lacking[0]}, which has no float64; allowed "
            "there: 'single', which measures in float32 and brings sums to the CPU, or None."
        )
        raise LayoutError(msg)
    kernels = {device: _KERNELS[name or _suited(device)] for device in devices}
    return next(iter(kernels.values())) if len(kernels) == 1 else SplitKernel(kernels)


def _suited(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return "accelerator" if has_float64(device) else "single"
