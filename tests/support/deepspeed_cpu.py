"""What DeepSpeed 0.19 does on GPUs only, for tests on the CPU: fp16, FusedAdam, no C++ build."""

import copy
import logging
import os
import warnings

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime import bf16_optimizer

deepspeed.utils.logging.logger.setLevel(logging.ERROR)
# DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 renames.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# Shared memory collectives are compiled when first used; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
get_accelerator().is_fp16_supported = lambda: True
# Collects garbage and prints, at every group of parameters.
bf16_optimizer.see_memory_usage = lambda *_, **__: None


class StubFusedAdam(FusedAdam):
    """SGD under the name by which DeepSpeed chooses FP16_Optimizer, whose kernel isn't built."""

    def __init__(self, params, lr):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


def config(stage, precision="fp32", **more):
    """A DeepSpeed configuration for one micro-batch per step."""
    zero = {"stage": stage, **more.pop("zero", {})}
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, **zero},
    }
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    settings.update(copy.deepcopy(more))
    return settings


def engine_of(net, optimizer, settings, **options):
    """An engine over the process group a test has started."""
    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings, **options)
    return engine


def whole(engine):
    """Every parameter of the model, whole, in float32."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return [p.detach().float().clone() for p in parameters]


__all__ = ["StubFusedAdam", "config", "engine_of", "whole"]
