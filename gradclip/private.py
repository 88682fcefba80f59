"""What torch offers under private names only. Read in torch 2.13.

tests/engine/test_private.py notices when one changes. FSDP1 and meshes have files of their own in
gradclip/layouts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

__all__ = [
    "has_gradient_hooks",
    "is_unscaled",
    "is_view",
    "optimizers_in_backward",
    "takes_scale",
    "writes",
]


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to; its views count with it, and nothing is read."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor shares the memory of another one."""
    return tensor._is_view()


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether a hook runs on a parameter's gradient, before or after it is accumulated."""
    return bool(parameter._post_accumulate_grad_hooks or parameter._backward_hooks)


def optimizers_in_backward(parameter: Tensor) -> list[Any]:
    """What `torch.distributed.optim._apply_optimizer_in_backward` gave a parameter."""
    return list(getattr(parameter, "_in_backward_optimizers", ()))


def takes_scale(optimizer: Any) -> bool:
    """Whether a step reads `grad_scale` and `found_inf` of the optimizer, which a scaler sets."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_unscaled(scaler: GradScaler, optimizer: Any) -> bool:
    """Whether a scaler unscaled an optimizer's gradients since its last update."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY
