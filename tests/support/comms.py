"""Count what a step sends."""

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountComms(TorchDispatchMode):
    """Collectives issued while active: how many, and the bytes of each message."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it dispatches what it does to the parts of this rank
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            tensors = [t for t in tree_leaves(args[0]) if hasattr(t, "element_size")]
            self.messages.append(sum(t.numel() * t.element_size() for t in tensors))
        return func(*args, **(kwargs or {}))
