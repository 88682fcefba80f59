"""Whether somebody changed gradients, without reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from gradclip.private import writes

__all__ = ["GradientSnapshot", "changes_gradients"]


class GradientSnapshot:
    """The gradients that are in place now, to tell later whether they are others.

    torch counts the writes to each tensor, so nothing is read, and no gradient is kept alive. A
    write through `.data`, and a `torch._foreach_*` operation on a DTensor, aren't counted.

    Args:
        parameters: Whose gradients.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._seen = [
            (p, None if p.grad is None else (TensorWeakRef(p.grad), writes(p.grad)))
            for p in parameters
        ]

    @property
    def gradients(self) -> list[Tensor]:
        """Those that were there and still are alive."""
        found = [seen[0]() for _, seen in self._seen if seen is not None]
        return [grad for grad in found if grad is not None]

    @property
    def is_changed(self) -> bool:
        """Whether a gradient is another tensor now, was written to, or came or went."""
        return any(_is_changed(p.grad, seen) for p, seen in self._seen)


def _is_changed(grad: Tensor | None, seen: tuple[TensorWeakRef, int] | None) -> bool:
    if grad is None or seen is None:
        return grad is not None or seen is not None
    return seen[0]() is not grad or writes(grad) != seen[1]


def changes_gradients(run: Callable[[], Any], parameters: Iterable[Parameter]) -> tuple[Any, bool]:
    """Run something, and see whether it replaced gradients or wrote to them.

    For adapters: around user code that runs after the clip. Nothing is read on the host. A write
    through `.data` isn't seen.

    Args:
        run: Called once.
        parameters: Whose gradients to watch.

    Returns:
        What `run` returned, and whether any of the gradients is another tensor or was written to.
    """
    before, written = GradientSnapshot(parameters), _Writes()
    # Foreach operations on DTensors, such as clip_grad_norm_'s, are seen as they are dispatched.
    is_sharded = any(map(is_traceable_wrapper_subclass, before.gradients))
    with written if is_sharded else nullcontext():
        result = run()
    return result, before.is_changed or any(map(written.has, before.gradients))


class _Writes(TorchDispatchMode):
    """Notes which tensors operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self._written: set[int] = set()

    def has(self, tensor: Tensor) -> bool:
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
