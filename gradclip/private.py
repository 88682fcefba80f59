"""What torch offers under private names only. Read in torch 2.13.

tests/engine/test_private.py notices when one changes. FSDP1 and meshes have files of their own in
gradclip/layouts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = [
    "all_writes",
    "comm_hooks",
    "compile_error",
    "end_to_end",
    "gradient_hooks",
    "has_step_hooks",
    "is_unscaled",
    "is_view",
    "make_step_hooks_run",
    "optimizers_in_backward",
    "steps_under_way",
    "takes_scale",
    "unhooked",
    "writes",
]

_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""What torch puts around each class's `step` to run hooks; one code for all of them."""


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to; its views count with it, and nothing is read."""
    return tensor._version


def all_writes(tensors: Iterable[Tensor]) -> int:
    """How often any of them was written to."""
    return sum([tensor._version for tensor in tensors])


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor shares the memory of another one."""
    return tensor._is_view()


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, one tensor after the other: a copy, unless it is one tensor."""
    return torch._C._nn.flatten_dense_tensors(list(tensors))


def gradient_hooks(parameter: Tensor) -> list[Callable[..., Any]]:
    """What runs on a parameter's gradient, before or after it is accumulated."""
    found = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return [hook for hooks in found for hook in (hooks or {}).values()]


def comm_hooks(model: DistributedDataParallel) -> list[Callable[..., Any]]:
    """What DDP reduces gradients with, where that was replaced."""
    return [hook for hook, _ in model._comm_hooks]


def compile_error() -> type[Exception]:
    """What a function of `torch.compile` raises where torch can't compile it."""
    return torch._dynamo.exc.TorchDynamoException  # its module takes seconds to import


def has_step_hooks(optimizer: Any) -> bool:
    """Whether hooks can be registered on an optimizer, as its base class was initialised."""
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def make_step_hooks_run(optimizer: Optimizer) -> None:
    """See to it that `step` runs hooks: torch does so only in `Optimizer.__init__`."""
    optimizer._patch_step_function()


def unhooked(step: Any) -> Any:
    """What torch put its hooks around; the same if it didn't.

    The first optimizer of a class that inherits its step gives the class one of its own so.
    """
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED_STEP else step


def steps_under_way() -> Iterator[Optimizer]:
    """The optimizers whose step runs hooks in this thread now, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _HOOKED_STEP:
            yield frame.f_locals["args"][0]
        frame = frame.f_back


def optimizers_in_backward(parameter: Tensor) -> list[Any]:
    """What `torch.distributed.optim._apply_optimizer_in_backward` gave a parameter."""
    return list(getattr(parameter, "_in_backward_optimizers", ()))


def takes_scale(optimizer: Any) -> bool:
    """Whether a step reads `grad_scale` and `found_inf` of the optimizer, which a scaler sets."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_unscaled(scaler: GradScaler, optimizer: Any) -> bool:
    """Whether a scaler unscaled an optimizer's gradients since its last update."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY
