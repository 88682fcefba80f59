"""Short runs of DDP and FSDP2 on ranks: one process's answers, bitwise equal on every rank."""

import functools
import inspect
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import gradclip
from gradclip import ClipByNorm, ClipByValue, GradientClipper, ZClip

CASES = {
    "norm": [ClipByNorm(max_norm=0.5)],
    "norm_p1": [ClipByNorm(max_norm=2.0, norm_type=1.0)],
    "norm_p3": [ClipByNorm(max_norm=0.3, norm_type=3.0)],
    "norm_inf": [ClipByNorm(max_norm=0.1, norm_type=math.inf)],
    "norm_p9": [ClipByNorm(max_norm=0.1, norm_type=9.0)],
    "parameter": [ClipByNorm(max_norm=0.1, scope="parameter")],
    "group": [ClipByNorm(max_norm=0.2, scope="group", norm_type=math.inf)],
    "value": [ClipByValue(clip_value=0.05)],
    "zclip": [ZClip(warmup_steps=2, max_norm=None), ClipByNorm(max_norm=1.0)],
}
COLLECTIVES = {"norm_inf": 1, "norm_p9": 2, "group": 1, "value": 2}
FAULTS = ("nan", "inf", "no gradients", "none at all", "zeros", "zeros and none")
WORLD_BATCH = 8


def batch(step):
    size = 20.0 if step == 3 else 1.0
    return torch.randn(WORLD_BATCH, 5, generator=torch.Generator().manual_seed(step)) * size


def optimizer_for(net):
    parameters = list(net.parameters())
    return torch.optim.SGD([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.05)


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def train(net, policies, rank=0, world=1, steps=5):
    """A short run; per step the record and every whole clipped gradient, and the collectives."""
    optimizer = optimizer_for(net)
    names = (net.module if isinstance(net, DistributedDataParallel) else net).named_parameters()
    clipper = GradientClipper(policies, names, optimizer)
    share = WORLD_BATCH // world
    seen, collectives = [], set()
    for step in range(steps):
        optimizer.zero_grad()
        net(batch(step)[rank * share : (rank + 1) * share]).square().mean().backward()
        with CommDebugMode() as comms:
            record = clipper.clip()
        collectives.add(comms.get_total_counts())
        metrics = {key: value.clone() for key, value in record.as_metrics().items()}
        seen.append((metrics, [whole(p.grad).clone() for p in net.parameters()]))
        optimizer.step()
    return seen, collectives


def ddp(rank, world):
    return {
        case: train(DistributedDataParallel(uneven_net(1)), policies, rank, world)
        for case, policies in CASES.items()
    }


def fsdp2(rank, world, ignored):
    return {case: train(sharded(world, ignored), CASES[case], rank, world) for case in CASES}


def sharded(world, ignored):
    net = uneven_net(1)
    mesh = init_device_mesh("cpu", (world,))
    kept = {net[3].weight} if ignored else set()
    if kept:  # whole on every rank, and averaged as DDP would
        net[3].weight.register_hook(lambda grad: average(grad, world))
    options = {"ignored_params": kept} if kept else {}
    return fully_shard(net, mesh=mesh, **options)


def average(grad, world):
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / world


def check(answers, expected):
    for seen, _ in answers:
        for (metrics, grads), (first, first_grads), (want, want_grads) in zip(
            seen, answers[0][0], expected, strict=True
        ):
            for key, value in metrics.items():
                torch.testing.assert_close(value, first[key], rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(
                    value, want[key], rtol=1e-5, atol=1e-7, equal_nan=True, msg=key
                )
            for got, same, grad in zip(grads, first_grads, want_grads, strict=True):
                assert torch.equal(got, same)
                torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)


@functools.cache
def alone(case):
    return train(uneven_net(1), CASES[case])[0]


def test_ddp_needs_no_collective():
    answers = run_on_ranks(ddp, 2)
    for case in CASES:
        assert any(metrics["clip/clipped"] for metrics, _ in alone(case)), case
        found = [answer[case] for answer in answers]
        check(found, alone(case))
        assert all(collectives == {0} for _, collectives in found), case


IGNORES = "ignored_params" in inspect.signature(fully_shard).parameters
shards_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 runs on no CPU"
)
without_ignored = pytest.mark.skipif(
    not IGNORES, reason="this torch's fully_shard leaves no parameters out"
)


def gradient_of_one(rank, world):
    net = torch.nn.Linear(1, 1, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    net(torch.ones(1, 1)).sum().backward()
    return float(net.weight.grad.full_tensor())


@pytest.fixture(scope="module")
def averages():
    """Skip where torch's FSDP2 sums gradients over gloo: torch 2.8 does, also without gradclip."""
    if run_on_ranks(gradient_of_one, 2) != [1.0, 1.0]:
        pytest.skip("this torch's FSDP2 doesn't average over gloo")


@shards_on_cpu
@pytest.mark.usefixtures("averages")
@pytest.mark.parametrize(
    ("world", "ignored"), [(2, False), pytest.param(2, True, marks=without_ignored), (4, False)]
)
def test_fsdp2_needs_one_collective(world, ignored):
    answers = run_on_ranks(fsdp2, world, ignored)
    for case in CASES:
        found = [answer[case] for answer in answers]
        check(found, alone(case))
        assert all(counted == {COLLECTIVES.get(case, 1)} for _, counted in found), case


def one_step(rank, world):
    """Norm and whole clipped gradients of one step, and those of all gradients in one place."""
    net = uneven_net(1)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    net(batch(0)).square().mean().backward()
    full = [whole(p.grad) for p in net.parameters()]
    exact = torch.cat([g.double().reshape(-1) for g in full]).norm()
    record = GradientClipper(ClipByNorm(max_norm=0.01), net.named_parameters()).clip()
    clipped = torch.cat([whole(p.grad).double().reshape(-1) for p in net.parameters()])
    wanted = torch.cat([g.double().reshape(-1) for g in full]) * (0.01 / (exact + 1e-6))
    return record.grad_norm, exact, clipped, wanted


@shards_on_cpu
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_gathered_to_1e_6(world):
    for norm, exact, clipped, wanted in run_on_ranks(one_step, world):
        torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(clipped, wanted, rtol=1e-6, atol=1e-12)


def faults(rank, world, fault, norm_type):
    """One odd step between ordinary ones; what each rank decided and the limits that followed."""
    net = uneven_net(1)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    policy = ZClip(warmup_steps=2, max_norm=None, norm_type=norm_type)
    clipper = GradientClipper(policy, net.named_parameters())
    limits = []
    for step in (0, 1, 2, "odd", 3, 4):
        net.zero_grad()
        net(batch(0 if step == "odd" else step)).square().mean().backward()
        if step == "odd" and rank == 1 and fault in ("nan", "inf", "no gradients"):
            for parameter in net.parameters():
                if fault == "no gradients":
                    parameter.grad = None
                elif parameter.grad.to_local().numel():
                    parameter.grad.to_local().fill_(math.nan if fault == "nan" else math.inf)
        if step == "odd" and fault in ("none at all", "zeros", "zeros and none"):
            net.zero_grad(set_to_none=fault == "none at all" or (fault != "zeros" and rank == 1))
        before = clipper.state_dict()["counts"]["steps"]
        record = clipper.clip()
        if step == "odd":
            counted = bool(clipper.state_dict()["counts"]["steps"] > before)
            odd = (bool(record.skipped), float(record.grad_norm), counted)
        else:
            limits.append(float(record.limit))
    return odd, limits


def one_rank_steps(rank, world):
    """The second step is left out on one rank, as by a scaler that saw an overflow there alone."""
    net = uneven_net(1)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    config = {"policies": [ClipByNorm(max_norm=0.5)], "log": {"update_norm_every": 2}}
    clipper = GradientClipper(config, net, optimizer)
    found = []
    for step in range(6):
        net.zero_grad()
        net(batch(step)).square().mean().backward()
        record = clipper.clip()
        if step != 2 or rank == 0:
            optimizer.step()
        found.append((float(record.clipped_norm), clipper.flush().get("clip/update_norm")))
    return found


@shards_on_cpu
def test_updates_are_of_all_ranks_and_one_that_steps_less_holds_up_no_other():
    first, second = run_on_ranks(one_rank_steps, 2)
    assert first == second
    norms, updates = zip(*first, strict=True)
    assert [update is None for update in updates] == [step % 2 == 0 for step in range(6)]
    assert updates[1] == pytest.approx(0.1 * norms[0], rel=1e-5)  # with the next step's message
    assert 0 < updates[3] < 0.1 * norms[2]
    assert updates[5] == pytest.approx(0.1 * norms[4], rel=1e-5)


def faults_of_all_kinds(rank, world):
    pairs = itertools.product(FAULTS, (2.0, math.inf))
    return {(fault, p): faults(rank, world, fault, p) for fault, p in pairs}


@shards_on_cpu
def test_what_goes_wrong_on_one_rank_is_decided_by_all():
    first, second = run_on_ranks(faults_of_all_kinds, 2)
    assert repr(first) == repr(second)
    for (fault, p), ((skipped, norm, counted), limits) in first.items():
        assert counted == (fault != "none at all"), fault
        assert skipped == (fault in ("nan", "inf")), fault
        assert math.isfinite(norm) == (not skipped), fault
        if fault != "no gradients":  # a gradient on one rank alone is a real observation
            assert limits == first["none at all", p][1], fault


def maximum(rank, world):
    found = []
    for bad in (math.nan, math.inf, -math.inf):
        net = uneven_net(1)
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        net(batch(0)).square().mean().backward()
        if rank == world - 1:
            net[0].weight.grad.to_local()[0, 0] = bad
        policy = ClipByNorm(max_norm=1.0, norm_type=math.inf)
        record = GradientClipper(policy, net.named_parameters()).clip()
        found.append((float(record.grad_norm), bool(record.skipped)))
    return found


@shards_on_cpu
@pytest.mark.parametrize("world", [2, 4])
def test_a_maximum_over_ranks_keeps_what_is_not_finite(world):
    wanted = [(math.nan, True), (math.inf, True), (math.inf, True)]
    assert {repr(answer) for answer in run_on_ranks(maximum, world)} == {repr(wanted)}


def drop_ins(rank, world):
    net = uneven_net(1)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    net(batch(0)).square().mean().backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).full_tensor()
    total = gradclip.get_total_norm([p.grad for p in net.parameters()])
    norm = gradclip.clip_grad_norm_(net.parameters(), 0.1)
    clipped = gradclip.get_total_norm([p.grad for p in net.parameters()])
    gradclip.clip_grad_value_(net.parameters(), 0.01)
    largest = gradclip.get_total_norm([p.grad for p in net.parameters()], math.inf)
    return wanted, total, norm, clipped, largest


@shards_on_cpu
def test_drop_ins_return_plain_tensors_of_the_whole_norm():
    for wanted, total, norm, clipped, largest in run_on_ranks(drop_ins, 2):
        assert not any(isinstance(x, DTensor) for x in (total, norm, clipped, largest))
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=0)
        assert torch.equal(total, norm)
        assert clipped == pytest.approx(0.1, rel=1e-4)
        assert largest == pytest.approx(0.01, rel=1e-6)


def bitwise_after_resume(rank, world, folder):
    def start():
        net = uneven_net(1)
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        optimizer = optimizer_for(net)
        policy = ZClip(warmup_steps=4, scope="parameter")
        return net, optimizer, GradientClipper(policy, net.named_parameters(), optimizer)

    def go(net, optimizer, clipper, steps):
        limits = []
        for step in steps:
            optimizer.zero_grad()
            net(batch(step)).square().mean().backward()
            limits.append(float(clipper.clip().limit))
            optimizer.step()
        return limits

    first, second = start(), start()
    go(*first, range(6))
    torch.save(first[2].state_dict(), f"{folder}/{rank}.pt")
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(torch.load(f"{folder}/{rank}.pt", weights_only=True))
    assert go(*first, range(6, 20)) == go(*second, range(6, 20))


@shards_on_cpu
def test_a_sharded_run_resumes_bitwise(tmp_path):
    run_on_ranks(bitwise_after_resume, 2, str(tmp_path))
