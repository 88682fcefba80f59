"""Test-only: Accelerate on a CPU with several processes, FSDP, tensor parallel, a GradScaler."""

import contextlib
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Replicate

MULTI_DEVICE = getattr(Accelerator, "multi_device", None)  # since Accelerate 1.2


def fresh():
    """Forget what accelerators before have left in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    Accelerator.multi_device = MULTI_DEVICE


def joined(multi_device=MULTI_DEVICE, **kwargs):
    """A fresh Accelerator that joins the ranks a test started."""
    fresh()
    Accelerator.multi_device = multi_device
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Accelerator(**kwargs)


@contextlib.contextmanager
def sharding_on_cpu():
    """Accelerators made within shard on CPU processes; unpatched they train DDP, silently."""
    # FSDP1 compares devices, and Accelerate would name this process's with an index.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    start = AcceleratorState.__init__

    def start_sharded(self, *args, **options):
        start(self, *args, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_sharded
    try:
        yield
    finally:
        AcceleratorState.__init__ = start


def with_fsdp(plugin, **kwargs):
    """An Accelerator that shards on CPU processes."""
    with sharding_on_cpu():
        return joined(fsdp_plugin=plugin, **kwargs)


def with_tensor_parallel(plugin=None, **kwargs):
    """One whose model's layers are cut; unpatched it would be wrapped in DDP."""
    if plugin is not None:
        # Accelerate 1.15 imports a name that transformers 5.23 no longer has.
        from transformers.integrations import tensor_parallel

        tensor_parallel.ReplicateParallel = Replicated
    multi_device = property(lambda self: self.distributed_type != DistributedType.FSDP)
    return with_fsdp(plugin, multi_device=multi_device, **kwargs)


class Replicated:
    """A module whose weights are whole DTensors takes and gives plain tensors."""

    def prepare_module_tp(self, module, mesh):
        def enter(_, args):
            if isinstance(args[0], DTensor):
                return None
            return (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False), *args[1:])

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *a: getattr(a[-1], "to_local", lambda: a[-1])())


def with_scaler(scale=1024.0):
    """An fp16 Accelerator whose loss scaling works; unpatched it would be left out, silently."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator
