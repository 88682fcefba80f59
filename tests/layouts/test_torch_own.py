"""What torch's own tests of clipping under FSDP ask for, asked of `gradclip.clip_grad_norm_`.

The same cases on gloo: every wrapped model against DDP with torch's function, norm returned and
parameters after a step of Adam alike. FSDP1's offload to the CPU needs an accelerator to start.
"""

import itertools
import math

import torch
from support.ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import gradclip

CPU = torch.device("cpu")
STRATEGIES = ("FULL_SHARD", "NO_SHARD", "mixed")
NORMS = [(max_norm, p) for max_norm in (1.0, 2.5) for p in (1, 2, math.inf)]
LAYERS = {nn.TransformerEncoderLayer, nn.TransformerDecoderLayer}


class Seq2Seq(nn.Module):
    """Encoder and decoder that share one embedding, which is the output's weight too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.transformer = nn.Transformer(
            8, 2, 2, 2, dim_feedforward=12, dropout=0.1, batch_first=True
        )
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, source, target):
        hidden = self.transformer(self.embed(source), self.embed(target))
        return self.out(hidden) * self.scale


def batch(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randint(0, 11, (3, length), generator=generator) for length in (6, 4)]


def backward(net, rank):
    net.eval()  # no dropout: the layouts draw other random numbers
    source, target = batch(rank)
    nn.functional.cross_entropy(net(source, target).flatten(0, 1), target.flatten()).backward()
    for p in net.parameters():
        if p.grad is not None:
            p.grad *= 100


def reference(rank, max_norm, p):
    """DDP with torch's own function: the norm, and the parameters after a step."""
    net = DistributedDataParallel(Seq2Seq())
    backward(net, rank)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm, p)
    torch.optim.Adam(net.parameters(), lr=1e-2).step()
    return norm, dict(net.module.named_parameters())


def clip(net, rank, max_norm, p):
    backward(net, rank)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, foreach=False)
    before = [None if q.grad is None else local(q.grad).clone() for q in net.parameters()]
    with CommDebugMode() as comms:
        norm = gradclip.clip_grad_norm_(net.parameters(), max_norm, p)
    for q, grad in zip(net.parameters(), before, strict=True):
        assert grad is None or grad.numel() == 0 or not torch.equal(local(q.grad), grad)
    optimizer.step()
    return norm, comms.get_total_counts()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(norm, wanted, parameters, expected):
    assert type(norm) is torch.Tensor
    torch.testing.assert_close(norm, wanted)
    assert set(parameters) == set(expected)
    for name, value in parameters.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def fsdp1(strategy, orig):
    options = {"device_id": CPU, "use_orig_params": orig}
    net = Seq2Seq()
    if strategy == "mixed":
        for part, kind in (("encoder", "NO_SHARD"), ("decoder", "FULL_SHARD")):
            wrapped = FullyShardedDataParallel(
                getattr(net.transformer, part), sharding_strategy=ShardingStrategy[kind], **options
            )
            setattr(net.transformer, part, wrapped)
        return FullyShardedDataParallel(net, **options)
    return FullyShardedDataParallel(
        net,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy(LAYERS),
        **options,
    )


def fsdp2(world, offload):
    options = {"mesh": init_device_mesh("cpu", (world,))}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    net = Seq2Seq()
    for module in net.modules():
        if type(module) in LAYERS:
            fully_shard(module, **options)
    return fully_shard(net, **options)


def ddp_parity(rank, world):
    """Every wrapped model against one reference for each norm."""
    for max_norm, p in NORMS:
        wanted, expected = reference(rank, max_norm, p)
        for strategy, orig in itertools.product(STRATEGIES, (False, True)):
            net = fsdp1(strategy, orig)
            norm, _ = clip(net, rank, max_norm, p)
            with FullyShardedDataParallel.summon_full_params(net):
                same(norm, wanted, dict(net.named_parameters()), expected)
        for offload in (False, True):
            net = fsdp2(world, offload)
            norm, collectives = clip(net, rank, max_norm, p)
            same(norm, wanted, dict(net.named_parameters()), expected)
            assert collectives == 1


def test_fsdp1_and_fsdp2_equal_ddp():
    run_on_ranks(ddp_parity, 2, timeout=180)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def stack():
    """Parts that tensor parallelism shards, one that it doesn't, and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(Part(), Part(), Part(), nn.LayerNorm(8))


def fsdp2_2d(rank, world):
    del rank
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    here = mesh["dp"].get_local_rank()
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for max_norm, p in NORMS:
        alone = stack()
        (alone(x).square().mean() * 100).backward()
        wanted = torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm, p)
        net = stack()
        for part in net[:2]:
            parallelize_module(
                part, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
            fully_shard(part, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
        (net(x[here]).square().mean() * 100).backward()
        with CommDebugMode() as comms:
            norm = gradclip.clip_grad_norm_(net.parameters(), max_norm, p)
        assert comms.get_total_counts() == 1
        torch.testing.assert_close(norm, wanted)
        for q, grad in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), grad.grad, rtol=1e-4, atol=1e-5)


def test_fsdp2_with_tensor_parallel_equals_one_process():
    run_on_ranks(fsdp2_2d, 4)
