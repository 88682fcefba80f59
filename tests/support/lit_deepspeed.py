"""Lightning's DeepSpeedStrategy on CPU processes; the stock one asks for CUDA."""

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from support.deepspeed_cpu import config


class CpuDeepSpeed(DeepSpeedStrategy):
    """Skips the check of the accelerator, and nothing else."""

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()


def strategy(stage, world, **more):
    """A strategy for CPU ranks; indexed devices are what DeepSpeed's launcher would give."""
    settings = config(stage, **more)
    del settings["gradient_clipping"]
    devices = [torch.device("cpu", index) for index in range(world)]
    return CpuDeepSpeed(config=settings | more, parallel_devices=devices)
