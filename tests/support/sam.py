"""Sharpness-aware minimisation, as scripts have it: a wrapper that steps an optimizer it holds."""

import torch
from torch.optim import SGD, Optimizer


class Sam(Optimizer):
    """Climbs by one gradient, and steps with the one that it finds there."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})
        self.base = SGD(self.param_groups, lr=1.0)
        self.climbed = []

    @torch.no_grad()
    def first_step(self):
        self.old = [(p, p.detach().clone()) for g in self.param_groups for p in g["params"]]
        self.climbed.append(torch.nn.utils.get_total_norm([p.grad for p, _ in self.old]))
        for p, _ in self.old:
            p.add_(p.grad)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, old in self.old:
            p.copy_(old)
        self.base.step()

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
