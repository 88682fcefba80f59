"""Models whose weights depend on a seed alone, whatever else has used random numbers."""

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


def filled(model, seed):
    """Set every parameter to normal values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def uneven_net(seed=0):
    """Sizes that shard unevenly over 2 and 4 ranks, one layer smaller than the number of ranks."""
    layers = (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))
    return filled(nn.Sequential(*layers), seed)


def parallel_net(seed=0):
    """A layer for every style of tensor parallelism, and two that stay whole."""
    layers = (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    return filled(nn.Sequential(*layers), seed)


def whole_parameters(module):
    """Every parameter put together again, in the order of the module."""
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        held = [p.detach() for p in module.parameters()]
        return [getattr(p, "full_tensor", p.clone)().clone() for p in held]
