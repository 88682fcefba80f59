"""A small training program whose micro-batches are clipped by themselves."""

import copy

import torch

from gradclip import ClipConfig, GradientClipper
from support.gradients import small_model

LIMIT = 0.05


def config_of(*policies, **options):
    return ClipConfig(policies=list(policies), stage="after_backward", **options)


class Program:
    def __init__(self, config, make=torch.optim.SGD, scaler=None, **options):
        self.model = small_model()
        self.optimizer = make(self.model.parameters(), lr=0.1)
        self.scaler = scaler
        self.clipper = GradientClipper(
            config, self.model.named_parameters(), self.optimizer, scaler=scaler, **options
        )

    def loss(self, seed, size=1.0):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        loss = self.model(inputs).square().mean() * size
        return loss if self.scaler is None else self.scaler.scale(loss)

    def window(self, seeds, sizes=None):
        for seed, size in zip(seeds, sizes or [1.0] * len(seeds), strict=True):
            loss, share = self.loss(seed, size), 1 / len(seeds)
            with self.clipper.micro_batch(loss=loss.detach(), share=share):
                (loss * share).backward()

    def step(self, *window):
        self.optimizer.zero_grad()
        self.window(*window)
        record = self.clipper.clip()
        self.optimizer.step()
        return record

    def alone(self, seed, size=1.0):
        """The gradient of one micro-batch by its own loss."""
        model = copy.deepcopy(self.model)
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        loss = model(inputs).square().mean() * size
        return torch.autograd.grad(loss, list(model.parameters()))

    @property
    def grads(self):
        return [p.grad for p in self.model.parameters()]

    @property
    def params(self):
        return [p.detach().clone() for p in self.model.parameters()]
