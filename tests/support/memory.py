"""What a call allocates at its peak, counted and not timed."""

import math
import weakref

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call):
    """Most bytes that torch's CPU allocator holds at once beyond those before the call.

    The profiler sees every allocation, also those inside an operator.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert sizes, "the profiler reported no allocation"
    held = highest = 0
    for _, size in sorted(sizes, key=lambda at: at[0]):
        held += size
        highest = max(highest, held)
    return highest


class FakeCudaPeak(TorchDispatchMode):
    """Most bytes that operators on fake CUDA tensors would hold at once, in `peak`.

    Results are counted while they live, each rounded up to the 512 bytes of the caching
    allocator's smallest block. What an operator allocates inside itself is not seen; for the
    multi-tensor norm, as read in torch 2.13 (ForeachReduceOp.cu), it is added: a value for every
    chunk of 65536 elements of the largest tensor, times the number of tensors, or, outside its
    fast route, a copy of the largest tensor in the type of the result.
    """

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {id(tensor.untyped_storage()) for tensor in given}
        results = func(*args, **(kwargs or {}))
        inside = 0
        if func.overloadpacket.__name__ == "_foreach_norm":
            inside = _norm_scratch(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and id(result.untyped_storage()) not in before:
                self._count(result.untyped_storage())
        self.peak = max(self.peak, self.held + inside)
        return results

    def _count(self, storage):
        if storage in self._known:
            return
        size = 512 * math.ceil(storage.nbytes() / 512)
        self._known[storage] = size
        self.held += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.held -= size


def _norm_scratch(tensors, norm_type, dtype=None):
    size = (dtype or tensors[0].dtype).itemsize
    largest = max(tensor.numel() for tensor in tensors)
    if norm_type in (1.0, 2.0, math.inf) and len({tensor.dtype for tensor in tensors}) == 1:
        return len(tensors) * math.ceil(largest / 65536) * max(size, 4)
    return largest * size
