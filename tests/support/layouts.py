"""One small network under every parallel layout, with real gradients of one and the same batch."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gradclip import GradientClipper

CPU = torch.device("cpu")
BATCH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network(head=True):
    """Blocks and a head of 3 rows, which leave the last of 4 ranks without a shard."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), *([nn.Linear(8, 3)] if head else []))


def batch():
    return torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(7)) * 3


def share(rank, world):
    return batch()[rank * BATCH // world : (rank + 1) * BATCH // world]


def loss(output):
    return output.square().mean()


def alone():
    """The gradients of the whole batch in one process."""
    net = network()
    loss(net(batch())).backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


@dataclass
class Built:
    """A model under some layout, after backward.

    Attributes:
        named: The parameters this rank holds.
        whole: Gathers every gradient in float64, named as in one process where that makes sense.
        options: What the clipper has to be told.
    """

    named: list
    whole: Callable[[], dict] = None
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.whole = self.whole or (lambda: whole(self.named))
        self.grads = [copied(p.grad) for _, p in self.named]

    def renew(self):
        """Put the gradients of that backward back."""
        for (_, p), grad in zip(self.named, self.grads, strict=True):
            p.grad = copied(grad)

    def clipper(self, policy, optimizer=None):
        return GradientClipper(policy, self.named, optimizer, **self.options)


def whole(named):
    """Every gradient, whole; DTensors over one axis in one exchange, as `full_tensor` is slow."""
    parts = {
        name: grad.to_local()
        for name, p in named
        if isinstance(grad := p.grad, DTensor) and grad.device_mesh.ndim == 1
        if grad.device_mesh.size() == dist.get_world_size()
    }
    found = [None] * dist.get_world_size()
    if parts:
        dist.all_gather_object(found, parts)
    return {
        name: joined(p.grad.placements[0], [one[name].double() for one in found])
        if name in parts
        else full(p.grad)
        for name, p in named
    }


def joined(placement, parts):
    if placement.is_partial():
        return sum(parts)
    return torch.cat(parts, placement.dim) if placement.is_shard() else parts[0]


def bits(grads):
    """Equal for equal bits of whole gradients, so that ranks can be compared."""
    parts = [grad.contiguous().numpy().tobytes() for grad in grads.values()]
    return hashlib.sha1(b"".join(parts)).hexdigest()


def full(grad):
    return (
        None
        if grad is None
        else (grad.full_tensor() if isinstance(grad, DTensor) else grad).double()
    )


def gathered(named, group):
    """Gradients that differ over a group under one name are one parameter sharded over it."""
    mine = {name: full(p.grad) for name, p in named if p.grad is not None}
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    names = dict.fromkeys(name for one in found for name in one)
    return {
        name: torch.cat([one[name].reshape(-1) for one in found if name in one]) for name in names
    }


def copied(grad):
    """A clone would reduce a partial sum."""
    if not isinstance(grad, DTensor):
        return None if grad is None else grad.clone()
    return DTensor.from_local(
        grad.to_local().clone(),
        grad.device_mesh,
        grad.placements,
        run_check=False,
        shape=grad.shape,
        stride=grad.stride(),
    )


def ddp(rank, world):
    net = network()
    wrapped = DistributedDataParallel(net)
    loss(wrapped(share(rank, world))).backward()
    return Built(list(net.named_parameters()))


def fsdp1(rank, world, strategy="FULL_SHARD", orig=True, ignored=False, mixed=False):
    net = network()
    if mixed:
        net[1].bfloat16()
        net[1].register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        net[1].register_forward_hook(lambda *args: args[-1].float())
    options = {"device_id": CPU, "use_orig_params": orig}
    options["sharding_strategy"] = ShardingStrategy[strategy]
    if "HYBRID" in strategy:
        options["device_mesh"] = init_device_mesh("cpu", (2, world // 2))
    if ignored:
        options["ignored_states"] = [net[2].weight]
        net[2].weight.register_hook(functools.partial(average, world=world))
    for index in (0, 1):
        net[index] = FullyShardedDataParallel(net[index], **options)
    wrapped = FullyShardedDataParallel(net, **options)
    loss(wrapped(share(rank, world))).backward()
    named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in wrapped.named_parameters()]

    def whole():
        if orig:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                return {name: p.grad.double().clone() for name, p in named}
        split = {
            module._handle.flat_param: module.process_group
            for module in FullyShardedDataParallel.fsdp_modules(wrapped)
            if module._handle.uses_sharded_strategy
        }
        return {
            name: gathered([(name, p)], split[p])[name] if p in split else p.grad.double().clone()
            for name, p in named
        }

    return Built(named, whole)


def average(grad, world):
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / world


def fsdp2(rank, world, hybrid=False, ignored=False):
    names = ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names) if hybrid else None
    mesh = mesh or init_device_mesh("cpu", (world,))
    net = network()
    kept = {net[2].weight} if ignored else set()
    for p in kept:
        p.register_hook(functools.partial(average, world=world))
    for module in (net[0], net[1], net):
        fully_shard(module, mesh=mesh, ignored_params=kept)
    loss(net(share(rank, world))).backward()
    return Built(list(net.named_parameters()))


PLAN = {
    f"{i}.{name}": style
    for i in (0, 1)
    for name, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
}


def tp(rank, world):
    net = parallelize_module(network(), init_device_mesh("cpu", (world,)), PLAN)
    loss(net(batch())).backward()
    return Built(list(net.named_parameters()))


def sequence(rank, world):
    """Tensor parallel with norms over a sharded batch: their gradients are partial sums."""
    plan = {}
    for i in (0, 1):
        plan[f"{i}.norm"] = SequenceParallel(sequence_dim=0)
        plan[f"{i}.up"] = ColwiseParallel(input_layouts=Shard(0))
        plan[f"{i}.down"] = RowwiseParallel(output_layouts=Shard(0))
    net = parallelize_module(network(head=False), init_device_mesh("cpu", (world,)), plan)
    net(share(rank, world)).square().sum().div(BATCH * 8).backward()
    assert net[0].norm.weight.grad.placements[0].is_partial()
    return Built(list(net.named_parameters()))


def partial(rank, world):
    """One replicated weight whose gradient is a partial sum, by hand."""
    mesh = init_device_mesh("cpu", (world,))
    net = network()
    weight = nn.Parameter(distribute_tensor(net[2].weight.detach(), mesh, [Replicate()]))
    x = DTensor.from_local(share(rank, world), mesh, [Shard(0)])
    loss(x @ weight.T).backward()
    assert weight.grad.placements[0].is_partial()
    return Built([("weight", weight)])


def fsdp2_tp(rank, world):
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    net = parallelize_module(network(), mesh["tp"], PLAN)
    for module in (net[0], net[1], net):
        fully_shard(module, mesh=mesh["dp"])
    loss(net(share(mesh["dp"].get_local_rank(), world // 2))).backward()
    return Built(list(net.named_parameters()))


def fsdp1_tp(rank, world):
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    net = parallelize_module(network(), mesh["tp"], PLAN)
    before = {
        name: (p.to_local().shape, p.placements[0]) if isinstance(p, DTensor) else (p.shape, None)
        for name, p in net.named_parameters()
    }
    options = {"device_mesh": mesh["dp"], "device_id": CPU, "use_orig_params": True}
    wrapped = FullyShardedDataParallel(net, **options)
    loss(wrapped(share(mesh["dp"].get_local_rank(), world // 2))).backward()
    named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in wrapped.named_parameters()]

    def whole():
        found = {}
        for name, grad in gathered(named, mesh["dp"].get_group()).items():
            shape, placement = before[name]
            parts = [torch.empty(shape, dtype=grad.dtype) for _ in range(2)]
            dist.all_gather(parts, grad.view(shape), mesh["tp"].get_group())
            sharded = isinstance(placement, Shard)
            found[name] = torch.cat(parts, placement.dim) if sharded else parts[0]
        return found

    whole.model = wrapped  # what parameters of FSDP1 are is known as long as their model lives
    return Built(named, whole)


class Experts(nn.Module):
    """Dense and router, the same on every rank, and an expert that each `ep` rank has its own."""

    def __init__(self, ep):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(8, 8)
        self.router = nn.Linear(8, 2)
        torch.manual_seed(10 + ep)
        self.expert = nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.expert(torch.relu(self.dense(x))) + self.router(x).sum(-1, keepdim=True)


def ep(rank, world):
    """Experts over one mesh, the dense part over another, the router whole."""
    experts = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("edp", "ep"))
    net = Experts(experts["ep"].get_local_rank())
    router = set(net.router.parameters())
    for p in router:
        p.register_hook(functools.partial(average, world=world))
    fully_shard(net.expert, mesh=experts["edp"])
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)), ignored_params=router)
    loss(net(share(rank, world))).backward()
    named = list(net.named_parameters())

    def whole():
        return {
            name: gathered([(name, p)], experts["ep"].get_group())[name]
            if name == "expert.weight"
            else full(p.grad)
            for name, p in named
        }

    return Built(named, whole)


def ep_plain(rank, world):
    """Experts without a mark: the user names their group."""
    groups = [dist.new_group([i, i + world // 2]) for i in range(world // 2)]
    group = groups[rank % (world // 2)]
    net = Experts(dist.get_rank(group))
    loss(net(share(0, 1))).backward()
    for p in [*net.dense.parameters(), *net.router.parameters()]:
        p.grad = average(p.grad, world)
    named = list(net.named_parameters())

    def whole():
        return {
            name: gathered([(name, p)], group)[name] if "expert" in name else full(p.grad)
            for name, p in named
        }

    return Built(named, whole, {"process_group": {"expert.*": group}})


def pp(rank, world, chunks=1):
    """Pipeline stages, one or more of them on each rank."""
    torch.manual_seed(0)
    stages = world * chunks
    parts = [nn.Sequential(Block(), Block()) for _ in range(stages)]
    mine = [rank + world * chunk for chunk in range(chunks)]
    built = [PipelineStage(parts[i], i, stages, CPU) for i in mine]
    if chunks == 1:
        schedule = ScheduleGPipe(built[0], n_microbatches=4, loss_fn=lambda y, _: loss(y))
    else:
        schedule = ScheduleInterleaved1F1B(built, n_microbatches=4, loss_fn=lambda y, _: loss(y))
    inputs = (batch(),) if rank == 0 else ()
    target = {"target": batch()} if mine[-1] == stages - 1 else {}
    schedule.step(*inputs, **target)
    named = [(f"{i}.{name}", p) for i in mine for name, p in parts[i].named_parameters()]
    return Built(
        named, lambda: gathered(named, dist.group.WORLD), {"process_group": dist.group.WORLD}
    )


def pp_fsdp2(rank, world):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))
    stage, group = mesh["pp"].get_local_rank(), mesh["pp"].get_group()
    torch.manual_seed(0)
    part = [Block(), nn.Sequential(Block(), nn.Linear(8, 3))][stage]
    fully_shard(part, mesh=mesh["dp"])
    loss(part(share(mesh["dp"].get_local_rank(), world // 2))).backward()
    named = [(f"{stage}.{name}", p) for name, p in part.named_parameters()]
    return Built(named, lambda: gathered(named, group), {"process_group": group})


class Layout(NamedTuple):
    """How a model is built, and what a step under it sends.

    Attributes:
        make: A function of this file.
        worlds: Numbers of ranks to build it at.
        options: More arguments of `make`.
        sums: Axes to sum over, in separate messages.
        partial: Messages that complete partial sums.
    """

    make: Callable[..., Built]
    worlds: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    sums: int = 1
    partial: int = 0


LAYOUTS = {
    "DDP": Layout(ddp, (2, 4), sums=0),
    "FSDP1": Layout(fsdp1, (2, 4)),
    "FSDP1 flat": Layout(fsdp1, (2, 4), {"orig": False}),
    "FSDP1 SHARD_GRAD_OP": Layout(fsdp1, (2,), {"strategy": "SHARD_GRAD_OP"}),
    "FSDP1 NO_SHARD": Layout(fsdp1, (2, 4), {"strategy": "NO_SHARD"}, sums=0),
    "FSDP1 NO_SHARD flat": Layout(fsdp1, (2,), {"strategy": "NO_SHARD", "orig": False}, sums=0),
    "FSDP1 HYBRID_SHARD": Layout(fsdp1, (4,), {"strategy": "HYBRID_SHARD"}),
    "FSDP1 HYBRID_SHARD flat": Layout(fsdp1, (4,), {"strategy": "HYBRID_SHARD", "orig": False}),
    "FSDP1 ignored": Layout(fsdp1, (2, 4), {"ignored": True}),
    "FSDP1 mixed dtypes": Layout(fsdp1, (2,), {"mixed": True}),
    "FSDP2": Layout(fsdp2, (2, 4)),
    "FSDP2 ignored": Layout(fsdp2, (2, 4), {"ignored": True}),
    "HSDP": Layout(fsdp2, (4,), {"hybrid": True}),
    "TP": Layout(tp, (2, 4)),
    "TP + sequence parallel": Layout(sequence, (2, 4), partial=1),
    "partial sum": Layout(partial, (2, 4), sums=0, partial=1),
    "FSDP2 x TP": Layout(fsdp2_tp, (4,)),
    "FSDP1 x TP": Layout(fsdp1_tp, (4,)),
    "EP": Layout(ep, (4,)),
    "EP, named group": Layout(ep_plain, (2, 4)),
    "PP": Layout(pp, (2, 4)),
    "PP, 2 stages a rank": Layout(pp, (2,), {"chunks": 2}),
    "PP x FSDP2": Layout(pp_fsdp2, (4,)),
}
"""Every layout. All tests of layouts take theirs from this table."""

PLACES = [(name, world) for name, layout in LAYOUTS.items() for world in layout.worlds]


def build(name, rank, world) -> Built:
    layout = LAYOUTS[name]
    return layout.make(rank, world, **layout.options)
