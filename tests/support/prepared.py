"""A small model, prepared by an accelerator that clips."""

import math

import torch
from accelerate import Accelerator
from torch import nn

import accelerate_clip
from support.nets import filled


def net(seed=0):
    return filled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), seed)


def prepared(policy, *, optimizer=torch.optim.SGD, before=True, **kwargs):
    accelerator = Accelerator(cpu=True, **kwargs)
    clip = accelerate_clip.enable(accelerator, policy) if before else None
    model = net()
    model, opt = accelerator.prepare(model, optimizer(model.parameters(), lr=0.1))
    clip = clip or accelerate_clip.enable(accelerator, policy)
    return accelerator, clip, model, opt


def batch(seed=0, size=6):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def norm_of(grads):
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def grads_of(model):
    return [p.grad.clone() for p in model.parameters()]
