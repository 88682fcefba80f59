"""What Accelerate 1.15 does on GPUs only, for tests on the CPU: FSDP, and a live GradScaler."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def joined(**kwargs):
    """An Accelerator that joins the ranks a test started."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return Accelerator(**kwargs)


def with_fsdp(plugin, **kwargs):
    """An Accelerator that shards on CPU processes; unpatched it would train DDP, silently."""
    start = AcceleratorState.__init__

    def start_sharded(self, *args, **options):
        start(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_sharded
    try:
        return joined(fsdp_plugin=plugin, **kwargs)
    finally:
        AcceleratorState.__init__ = start


def with_scaler(scale=1024.0):
    """An fp16 Accelerator whose loss scaling works; unpatched it would be left out, silently."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator
