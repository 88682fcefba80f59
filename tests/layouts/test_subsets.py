"""Some parameters of a model, or one of two models: clipped by identity, once, rightly."""

import pytest
import torch
from support.comms import CountComms
from support.layouts import Block, batch, loss, share
from support.ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gradclip
from gradclip import ClipByNorm, ClipByValue, GradientClipper


class Adapted(nn.Module):
    """A frozen layer with a trained one of low rank beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.base = Block().requires_grad_(requires_grad=False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrapped(kind, net, world):
    if kind == "fsdp1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    return fully_shard(net, mesh=init_device_mesh("cpu", (world,)))


def norm_of(parameters):
    return torch.cat([p.grad.double().reshape(-1) for p in parameters]).norm()


def whole(kind, net, named):
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
            return [None if p.grad is None else p.grad.clone() for _, p in named]
    return [g.full_tensor() if isinstance(g := p.grad, DTensor) else g for _, p in named]


def adapters(rank, world, kind):
    net = wrapped(kind, Adapted(), world)
    loss(net(share(rank, world))).backward()
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1)
    clipper = GradientClipper(ClipByNorm(max_norm=0.1), net.named_parameters(), optimizer)
    record = clipper.clip()
    drop_in = gradclip.clip_grad_norm_([p for _, p in named], 1e9)
    return record.grad_norm, drop_in, whole(kind, net, named)


def built_before(rank, world):
    """FSDP1 keeps the parameters, so the clipper still has them, and makes shards of them."""
    net = Block()
    clipper = GradientClipper(ClipByNorm(max_norm=0.1), net.named_parameters())
    wrapped("fsdp1", net, world)
    again = GradientClipper(ClipByNorm(max_norm=0.1), net.named_parameters())
    for p in net.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    before = [clipper.clip().grad_norm, clipper.clip().grad_norm]
    assert again.clip().grad_norm == before[1]
    return before


def test_a_model_wrapped_after_its_clipper_was_built():
    first, second = run_on_ranks(built_before, 2)
    assert first == second
    size = sum(p.numel() for p in Block().parameters())
    assert float(first[0]) ** 2 == pytest.approx(size / 2 * (1 + 4), rel=0.02)  # and padding


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_trained_parameters_beside_frozen_ones(kind):
    alone = Adapted()
    loss(alone(batch())).backward()
    trained = [p for p in alone.parameters() if p.requires_grad]
    norm = float(norm_of(trained))
    for found, after, grads in run_on_ranks(adapters, 2, kind):
        assert float(found) == pytest.approx(norm, rel=1e-5)
        assert float(after) == pytest.approx(0.1, rel=1e-4)
        for grad, p in zip(grads, trained, strict=True):
            torch.testing.assert_close(grad, p.grad * (0.1 / norm), rtol=1e-4, atol=1e-7)


def twins(rank, world, kind):
    """Two models of the same shapes and values; one is clipped."""
    pair = []
    for size in (1.0, 3.0):
        torch.manual_seed(0)
        net = wrapped(kind, nn.Sequential(Block(), nn.Linear(8, 3)), world)
        loss(net(share(rank, world) * size)).backward()
        pair.append((net, list(net.named_parameters())))
    (_, _), (other, other_named) = pair
    untouched = whole(kind, other, other_named)
    net, named = pair[0]
    norm = gradclip.clip_grad_norm_((p for _, p in named), 0.01)
    same = all(map(torch.equal, untouched, whole(kind, other, other_named)))
    return norm, gradclip.clip_grad_norm_([p for _, p in named], 1e9), same


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_one_of_two_models_of_the_same_shapes(kind):
    torch.manual_seed(0)
    alone = nn.Sequential(Block(), nn.Linear(8, 3))
    loss(alone(batch())).backward()
    for norm, after, same in run_on_ranks(twins, 2, kind):
        assert float(norm) == pytest.approx(float(norm_of(alone.parameters())), rel=1e-5)
        assert float(after) == pytest.approx(0.01, rel=1e-3)
        assert same


def clamped(rank, world):
    """Element-wise clamping needs to know nothing of other ranks, but who was clamped does."""
    found = []
    for kind in ("fsdp1", "fsdp2"):
        torch.manual_seed(0)
        net = wrapped(kind, nn.Sequential(Block(), nn.Linear(8, 3)), world)
        loss(net(share(rank, world))).backward()
        named = list(net.named_parameters())
        record = GradientClipper(ClipByValue(clip_value=0.02), named).clip()
        found.append((bool(record.clipped), whole(kind, net, named)))
    return found


def test_value_clipping_equals_one_process():
    torch.manual_seed(0)
    alone = nn.Sequential(Block(), nn.Linear(8, 3))
    loss(alone(batch())).backward()
    for found in run_on_ranks(clamped, 2):
        for clipped, grads in found:
            assert clipped
            for grad, p in zip(grads, alone.parameters(), strict=True):
                torch.testing.assert_close(grad, p.grad.clamp(-0.02, 0.02), rtol=1e-4, atol=1e-6)


def accumulated(rank, world):
    """Only the last of two backward passes of DDP reduces; clipping adds nothing to that."""
    torch.manual_seed(0)
    net = DistributedDataParallel(Block())
    mine = share(rank, world).chunk(2)
    with net.no_sync():
        (loss(net(mine[0])) / 2).backward()
    (loss(net(mine[1])) / 2).backward()
    clipper = GradientClipper(ClipByNorm(max_norm=0.1), net.module.named_parameters())
    with CountComms() as comms:
        record = clipper.clip()
    return record.grad_norm, comms.messages


def test_accumulation_under_ddp_needs_no_collective():
    torch.manual_seed(0)
    alone = Block()
    loss(alone(batch())).backward()
    answers = run_on_ranks(accumulated, 2)
    for norm, messages in answers:
        assert float(norm) == pytest.approx(float(norm_of(alone.parameters())), rel=1e-5)
        assert torch.equal(norm, answers[0][0])
        assert messages == []
