"""Whether somebody changed gradients, told without reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = ["changes_gradients"]


def changes_gradients(run: Callable[[], Any], parameters: Iterable[Parameter]) -> tuple[Any, bool]:
    """Run something, and see whether it replaced gradients or wrote to them.

    For adapters: around user code that runs after the clip. Nothing is read on the host. A write
    through `.data` isn't seen: torch doesn't count it in a tensor's version.

    Args:
        run: Called once.
        parameters: Whose gradients to watch.

    Returns:
        What `run` returned, and whether any of the gradients is another tensor or was written to.
    """
    before = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]
    writes = _Writes()
    # torch's versions don't count foreach operations on DTensors, such as clip_grad_norm_'s.
    is_sharded = any(is_traceable_wrapper_subclass(grad) for _, grad, _ in before)
    with writes if is_sharded else nullcontext():
        result = run()
    changed = any(
        p.grad is not grad or (grad is not None and grad._version != version) or writes.has(grad)
        for p, grad, version in before
    )
    return result, changed


class _Writes(TorchDispatchMode):
    """Notes which tensors operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[int] = set()

    def has(self, tensor: Tensor | None) -> bool:
        """Whether this tensor, which has to be alive all the time, was written to."""
        return id(tensor) in self._written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                self._written.update(map(id, tree_leaves(value)))
        return func(*args, **(kwargs or {}))
