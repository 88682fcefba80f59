"""The same gradients on several ranks give the one-process answer, on every rank, bitwise."""

import pytest
import torch
from support.ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradclip import ClipByNorm, GradientClipper


def model():
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def fsdp2(rank, world):
    net = model()
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(net, mesh=mesh)
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), named_parameters=net.named_parameters())
    batch = torch.ones(2, 5)
    net(batch).square().mean().backward()
    record = clipper.clip()
    return record.grad_norm, [p.grad.full_tensor() for p in net.parameters()]


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp2(world):
    answers = run_on_ranks(fsdp2, world)
    net = model()
    net(torch.ones(2, 5)).square().mean().backward()
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), named_parameters=net.named_parameters())
    record = clipper.clip()
    assert record.clipped
    for norm, grads in answers:
        assert norm == answers[0][0]
        torch.testing.assert_close(norm, record.grad_norm, rtol=1e-6, atol=0)
        for got, parameter in zip(grads, net.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-6, atol=1e-7)
