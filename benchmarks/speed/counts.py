"""What a step asks of an accelerator, counted on fake CUDA tensors: none is needed.

Operations are those that torch dispatches and that aren't views. Launches are the kernels that
torch 2.13, built for CUDA 13, starts for them, by the rules below; they are read in its sources
and not measured on a GPU. Bytes are those that operations read and write: arguments, results,
and arguments that are written once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.gradients import Gradients
from gradclip import ClipByNorm, GradientClipper, SkipNonfinite, ZClip
from gradclip.policies import AnyPolicy
from tests.support.memory import FakeCudaPeak
from tests.support.ops import VIEWS

CHUNK = 65536
TENSORS_A_LAUNCH = (770, 448, 336, 252, 210)
"""Of the multi-tensor kernels that work on so many lists, beginning at 1 (MultiTensorApply.cuh)."""
CHUNKS_A_LAUNCH = 2240
NORMS_A_LAUNCH = 3200
"""How many norms the second kernel of `_foreach_norm` finishes (ForeachReduceOp.cu)."""
INPUTS_OF_CAT = 128
NO_KERNEL = {"empty", "empty_like", "empty_strided", "_local_scalar_dense"}
POLICIES: dict[str, list[AnyPolicy]] = {
    "norm": [ClipByNorm(max_norm=1.0)],
    "zclip": [ZClip()],
    "a list of three": [ZClip(), ClipByNorm(max_norm=0.7), SkipNonfinite()],
}


class Counted(NamedTuple):
    """What one step asks for.

    Attributes:
        operations: How many are dispatched and aren't views.
        launches: How many kernels they start.
        bytes: How much these read and write.
        peak: Most bytes held at once beside gradients and what lives from step to step.
    """

    operations: int
    launches: int
    bytes: int
    peak: int


class Count(TorchDispatchMode):
    """Operations, launches and bytes while active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        results = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if func.namespace != "aten" or name in VIEWS:
            return results
        self.operations += 1
        launches = launches_of(name, args, results)
        self.launches += launches
        if launches:
            self.bytes += bytes_of(func, args, kwargs or {}, results)
        return results


def launches_of(name: str, args: Sequence[Any], results: Any) -> int:
    """How many kernels torch starts for one operation."""
    if name in NO_KERNEL:
        return 0
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / INPUTS_OF_CAT)
    if "_foreach_" in name:
        lists = [held for held in args if isinstance(held, list | tuple) and held]
        lists = [held for held in lists if isinstance(held[0], Tensor)]
        sizes = [tensor.numel() for tensor in lists[0]]
        depth = len(lists) + (name[-1] != "_" and name != "_foreach_norm" and results is not None)
        launches = multi_tensor_launches(sizes, depth)
        if name == "_foreach_norm":  # zeros, the sums of chunks, and their roots
            launches += 1 + math.ceil(len(sizes) / NORMS_A_LAUNCH)
        return launches
    return 1


def multi_tensor_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches that work through tensors of these sizes in chunks.

    A launch is full when it has so many tensors, or so many chunks.
    """
    launches = tensors = chunks = 0
    for size in sizes:
        left = math.ceil(size / CHUNK)
        if not left:
            continue
        tensors += 1
        while chunks + left >= CHUNKS_A_LAUNCH:
            left -= CHUNKS_A_LAUNCH - chunks
            launches, chunks, tensors = launches + 1, 0, int(left > 0)
            if not left:
                break
        chunks += left
        if left and tensors == TENSORS_A_LAUNCH[depth - 1]:
            launches, chunks, tensors = launches + 1, 0, 0
    return launches + (chunks > 0)


def bytes_of(func: Any, args: Any, kwargs: dict[str, Any], results: Any) -> int:
    """Bytes that an operation reads and writes."""
    moved = 0
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(map(stored, tree_leaves(value)))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        moved += size * (1 + is_written)
    if not any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        moved += sum(map(stored, tree_leaves(results)))
    return moved


def stored(value: Any) -> int:
    """Bytes of a tensor, however often it is expanded; 0 for what isn't one."""
    if not isinstance(value, Tensor):
        return 0
    repeated = math.prod(n for n, step in zip(value.shape, value.stride(), strict=True) if not step)
    return value.nbytes // max(repeated, 1)


def our_step(policies: list[AnyPolicy], model: nn.Module) -> Callable[[], object]:
    """With a fused optimizer, which takes the flag that withholds a step: nothing is read."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return GradientClipper(policies, model.named_parameters(), optimizer).clip


def torchs_step(model: nn.Module) -> Callable[[], object]:
    """`clip_grad_norm_` with the multi-tensor kernels, which it takes by itself on real tensors."""
    return lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)


def counted(held: Gradients, start: Callable[[nn.Module], Callable[[], object]]) -> Counted:
    """A step after two others, on fake CUDA tensors.

    Args:
        held: The gradients.
        start: Makes the step for a model.
    """
    with FakeTensorMode():
        step = start(held.parameters("cuda"))
        for _ in range(2):
            step()
        with FakeCudaPeak() as memory, Count() as count:
            step()
    return Counted(count.operations, count.launches, count.bytes, memory.peak)
