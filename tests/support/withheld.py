"""Which steps of a run of scalar gradients are withheld."""

import torch

from gradclip import GradientClipper


def clipper_of(policy):
    p = torch.nn.Parameter(torch.zeros(1))
    return p, GradientClipper(policy, [("p", p)])


def withheld(policy, norms, losses=None):
    """Whether each step was withheld, from scalar gradients."""
    p, clipper = clipper_of(policy)
    found = []
    for norm, loss in zip(norms, losses or [None] * len(norms), strict=True):
        p.grad = torch.tensor([norm])
        found.append(bool(clipper.clip(loss=loss).skipped))
    return found
