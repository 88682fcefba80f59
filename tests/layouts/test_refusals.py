"""What can't be clipped rightly is an error when built, with the way out; what may be is said."""

import warnings

import pytest
import torch
import torch.distributed as dist
from support.layouts import PLAN, network
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradclip
from gradclip import ClipByNorm, ConfigError, GradientClipper, LayoutError

POLICY = ClipByNorm(max_norm=1.0)


def flat(rank, world):
    """FlatParameters are clipped together, and not told apart."""
    del rank, world
    net = FullyShardedDataParallel(uneven_net(1), device_id=torch.device("cpu"))
    net(torch.ones(2, 5)).sum().backward()
    named = list(net.named_parameters())
    before = [p.grad.clone() for _, p in named]
    for policy in (
        ClipByNorm(max_norm=1.0, scope="parameter"),
        {"policies": [{"type": "norm", "max_norm": 1.0}], "log": {"per_parameter": True}},
    ):
        with pytest.raises(ConfigError, match=r"_flat_param' is a FlatParameter .*_orig_params=T"):
            GradientClipper(policy, named)
    assert all(torch.equal(p.grad, grad) for (_, p), grad in zip(named, before, strict=True))
    GradientClipper(POLICY, named).clip()


def taken_out(rank, world):
    """Parameters of an FSDP1 model that is gone: nothing knows which ranks hold the rest."""
    del rank, world
    net = FullyShardedDataParallel(
        uneven_net(1), device_id=torch.device("cpu"), use_orig_params=True
    )
    named = [(name, torch.nn.Parameter(p.detach())) for name, p in net.named_parameters()]
    for _, p in named:
        p._fsdp_flattened = True
    with pytest.raises(LayoutError, match=r"belong to FullyShardedDataParallel .* no live FSDP"):
        GradientClipper(POLICY, named)


def stepped_by_ddp(rank, world):
    """Its hook steps as soon as a gradient is reduced, so that none is left to clip."""
    del rank, world
    net = DistributedDataParallel(uneven_net(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it uses torch.jit.script
        net._register_fused_optim(torch.optim.SGD, 0.1)
    with pytest.raises(ConfigError, match="stepped by DDP's _register_fused_optim"):
        GradientClipper(POLICY, net)
    GradientClipper(POLICY, DistributedDataParallel(uneven_net(1)))


def placed_otherwise(rank, world):
    """A gradient that doesn't lie where its parameter does."""
    del rank
    mesh = init_device_mesh("cpu", (world,))
    for parameter, gradient, text in (
        (Shard(0), Partial(), r"'w' is a DTensor placed \(Partial\(sum\),\)"),
        (Replicate(), Shard(0), r"'w' is a DTensor placed \(Shard\(dim=0\),\)"),
        (Replicate(), Partial("max"), r"'w' is Partial\(max\) over ranks"),
    ):
        w = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [parameter]))
        rows = 4 // world if gradient == Shard(0) else 4
        grad = DTensor.from_local(torch.ones(rows, 2), mesh, [gradient], run_check=False)
        w.grad = grad
        clipper = GradientClipper(POLICY, [("w", w)])
        with pytest.raises(LayoutError, match=text):
            clipper.clip()
        assert w.grad is grad
        assert (grad.to_local() == 1).all()


def copies(rank, world):
    """The first rank counts copies, so it must hold them."""
    del world
    named = [("a", torch.nn.Parameter(torch.ones(2)))]
    if rank == 1:
        named.append(("head", torch.nn.Parameter(torch.ones(3))))
    with pytest.raises(LayoutError, match=r"rank 1 of a group holds \['head'\], matched by no"):
        GradientClipper(POLICY, named, process_group={"a": dist.group.WORLD})


def marked(rank, world):
    """Plain tensors that say they differ by rank, but not over which group."""
    del rank, world
    for mark, value in (("tensor_model_parallel", True), ("allreduce", False)):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        setattr(p, mark, value)
        with pytest.raises(LayoutError, match=r"\['experts'\] are marked as different on every"):
            GradientClipper(POLICY, [("experts", p)])
        clipper = GradientClipper(POLICY, [("experts", p)], process_group={"*": dist.group.WORLD})
        assert float(clipper.clip().grad_norm) == pytest.approx(2.0)


def outside(rank, world):
    """A group of other ranks."""
    del world
    group = dist.new_group([0])
    named = [("a", torch.nn.Parameter(torch.ones(2)))]
    for groups in (group, {"*": group}):
        if rank == 0:
            GradientClipper(POLICY, named, process_group=groups)
            continue
        with pytest.raises(LayoutError, match="rank 1 is not in the group given on it; allowed"):
            GradientClipper(POLICY, named, process_group=groups)


def every_refusal(rank, world):
    for case in (flat, taken_out, stepped_by_ddp, placed_otherwise, copies, marked, outside):
        case(rank, world)


def test_what_cannot_be_clipped_rightly_is_refused():
    run_on_ranks(every_refusal, 2)


def forgotten(rank, world):
    """Slices of a mesh whose other axis nothing speaks of: the norm may be a part only."""
    del rank, world
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    net = uneven_net(1)
    fully_shard(net, mesh=mesh["dp"])
    named = list(net.named_parameters())
    with pytest.warns(UserWarning, match=r"none over its axis 'pp': .* pass process_group="):
        GradientClipper(POLICY, named)
    GradientClipper(POLICY, named, process_group={})
    GradientClipper(POLICY, named, process_group=mesh.get_group("pp"))
    with pytest.warns(UserWarning, match="none over its axis 'pp'"):
        gradclip.get_total_norm([p.detach() for p in net.parameters()])


def flat_over_tensor_parallel(rank, world):
    """One FlatParameter holds what tensor parallelism sharded and what it didn't."""
    del rank, world
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = parallelize_module(network(), mesh["tp"], PLAN)
    net = FullyShardedDataParallel(net, device_mesh=mesh["dp"], device_id=torch.device("cpu"))
    with pytest.raises(
        LayoutError, match=r"tensor parallelism has sharded, .* use_orig_params=True"
    ):
        GradientClipper(POLICY, net.named_parameters())
    other = FullyShardedDataParallel(uneven_net(1), device_id=torch.device("cpu"))
    GradientClipper(POLICY, other.named_parameters())  # a refused model beside it is its own affair


def on_a_grid(rank, world):
    forgotten(rank, world)
    flat_over_tensor_parallel(rank, world)


def test_what_a_grid_of_ranks_leaves_open():
    run_on_ranks(on_a_grid, 4)


def test_xla_is_refused_by_name():
    with FakeTensorMode():
        named = [("a", torch.nn.Parameter(torch.empty(2, device="xla")))]
        with pytest.raises(LayoutError, match=r"\['a'\] are on an XLA device, where gradients"):
            GradientClipper(POLICY, named)
