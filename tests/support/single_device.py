"""A device without float64 that this machine doesn't have: real values, kept on the CPU.

`SingleDevice` is a context in which such tensors can be made. It refuses what the device couldn't
do: anything in float64, a copy that casts to or from float64 on the way, and operations between
tensors of the device and of the CPU. It counts what crosses to the host.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

_setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
WORKS = _setup is not None
"""Whether this torch takes a device that is written in Python, with a backward of its own."""
if _setup is not None:
    _setup("single")
    DEVICE = torch.device("single", 0)
WIDE = (torch.float64, torch.complex128)
CROSSING = ("aten._to_copy", "aten.copy_", "aten._foreach_copy_")


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class SingleDevice(TorchDispatchMode):
    """The context; `reads` is how often something crossed to the host since it was set to 0.

    `values` is how many numbers did.
    """

    def __init__(self):
        super().__init__()
        self.reads = self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = run(func, args, kwargs or {})
        before = [x.device for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        made = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]
        after = [x.device for x in made]
        reads = str(func).startswith(("aten._local_scalar_dense", "aten.equal", "aten.nonzero"))
        if DEVICE in before and (reads or torch.device("cpu") in after):
            self.reads += 1
            self.values += sum(x.numel() for x in made)
        return found


def run(func, args, kwargs):
    """One operation, on what tensors hold; refused where the device couldn't do it."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [x for x in flat if isinstance(x, OnDevice)]
    wanted = kwargs.get("device")
    crosses = str(func).startswith(CROSSING)
    kinds = {x.dtype for x in flat} | {kwargs.get("dtype")}
    if crosses:
        goes = wanted == DEVICE if wanted is not None else isinstance(args[0], OnDevice)
        is_wide = bool(here or goes) and not kinds.isdisjoint(WIDE)
    else:
        goes = wanted == DEVICE or (wanted is None and bool(here))
        is_wide = goes and not kinds.isdisjoint(WIDE)
        if goes and any(x.dim() for x in flat if not isinstance(x, OnDevice)):
            raise RuntimeError(f"{func}: a tensor of the CPU with tensors of the device")
    if is_wide:
        raise TypeError(f"{func}: the device has no float64")
    inner = dict(kwargs, device="cpu") if wanted is not None else kwargs
    held = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, inner))
    found = func(*held[0], **held[1])
    if not goes or func is torch.ops.aten._local_scalar_dense.default:
        return found
    found = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, found)
