"""Ranks that differ are told, all of them, by name; parameters go by name, not by order."""

import logging
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.comms import CountComms
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradclip import ClipByNorm, ConfigError, GradientClipper, ZClip
from gradclip.layouts import agreement

ADAPTIVE = {"policies": [{"type": "zclip", "warmup_steps": 2, "max_norm": None}]}


def batch(step, rank):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def wrapped(kind):
    net = uneven_net(1)
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "fsdp1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    return fully_shard(net)


def backward(net, step, rank):
    net.zero_grad()
    net(batch(step, rank)).square().mean().backward()


def said(call, *args, **options):
    """What an error of this call says; empty without one."""
    try:
        call(*args, **options)
    except ConfigError as error:
        return str(error)
    return ""


def whole(p):
    return p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad


def squares(net, kind):
    """The squared norm of each gradient over all ranks."""
    grads = [torch.zeros(1) if p.grad is None else whole(p) for p in net.parameters()]
    found = torch.stack([grad.double().square().sum() for grad in grads])
    if kind == "fsdp1":
        dist.all_reduce(found)
    names = [name.replace("module.", "") for name, _ in net.named_parameters()]
    return dict(zip((n.replace("_fsdp_wrapped_", "") for n in names), found, strict=True))


def listed(net, by, turned):
    """Names and an optimizer, of which one rank turns the order of one."""
    named = list(net.named_parameters())
    first, second = [p for _, p in named[:2]], [p for _, p in named[2:]]
    groups = [{"params": first, "name": "a"}, {"params": second, "name": "b"}]
    if by == "groups" and turned:
        groups = groups[::-1]
    if by == "optimizer" and turned:
        groups = [{**group, "params": group["params"][::-1]} for group in groups]
    if by == "own names":
        own = named[::-1] if turned else named
        return {"optimizer": torch.optim.SGD(own, lr=0.1)}
    if by in ("names", "names alone") and turned:
        named = named[::-1]
    if by == "names alone":
        return {"named_parameters": named}
    return {"named_parameters": named, "optimizer": torch.optim.SGD(groups, lr=0.1)}


def listed_in_orders(rank, world):
    """Logged norms beside the true ones, and what parameters are clipped to."""
    del world
    found = {}
    every = ("optimizer", "groups", "names", "names alone", "own names")
    for kind, orders in (("ddp", every[:3]), ("fsdp1", every[:2]), ("fsdp2", every)):
        for by in orders:
            net = wrapped(kind)
            given = listed(net, by, turned=rank == 1)
            scopes = ["parameter"] if by in ("names alone", "own names") else ["group", "parameter"]
            for scope in scopes:
                config = {
                    "policies": [ClipByNorm(max_norm=0.01, scope=scope)],
                    "log": {"per_parameter": True},
                    "verify_every": int(by == "names"),
                }
                clipper = GradientClipper(config, **given)
                backward(net, 0, rank)
                before = squares(net, kind)
                record = clipper.clip()
                logged = {name: float(norm) for name, norm in record.per_parameter.items()}
                true = {name: math.sqrt(value) for name, value in before.items()}
                after = squares(net, kind)
                names = list(after)
                of_group = [sum(after[n] for n in names[:2]), sum(after[n] for n in names[2:])]
                largest = max(of_group if scope == "group" else after.values())
                slots = clipper.state_dict()["policies"][0]["slots"]
                found[kind, by, scope] = logged, true, math.sqrt(largest), slots, record.grad_norm
    return found


def test_parameters_go_by_name_whatever_order_a_rank_lists_them_in(subtests):
    first, second = run_on_ranks(listed_in_orders, 2)
    for case, (logged, true, largest, slots, norm) in first.items():
        with subtests.test("-".join(case)):
            assert logged == pytest.approx(true, rel=1e-5)
            assert second[case][0] == logged
            assert largest == pytest.approx(0.01, rel=1e-4)
            assert second[case][3] == slots
            assert torch.equal(second[case][4], norm)


def stages(rank, world):
    """Each of two stages on every rank, in another order; the group adds them up."""
    del world
    own = {f"stage{rank}.{name}": torch.nn.Parameter(torch.zeros(2)) for name in "ab"}
    for index, p in enumerate(own.values()):
        p.grad = torch.full((2,), 1.0 + 2 * rank + index)
    named = list(own.items())[:: -1 if rank else 1]
    config = {"policies": [ClipByNorm(max_norm=100)], "log": {"per_parameter": True}}
    clipper = GradientClipper(config, named, process_group=dist.group.WORLD)
    return {name: float(norm) for name, norm in clipper.clip().per_parameter.items()}


def test_stages_go_by_name():
    values = {"stage0.a": 1, "stage0.b": 2, "stage1.a": 3, "stage1.b": 4}
    wanted = {name: math.sqrt(2) * value for name, value in values.items()}
    for found in run_on_ranks(stages, 2):
        assert found == pytest.approx(wanted)


def built(rank, world):
    """What building says where one rank of two is given something else."""
    del world
    found = {}
    for kind in ("ddp", "fsdp1", "fsdp2"):
        net = wrapped(kind)
        named = list(net.named_parameters())
        options = [
            {"params": [p for _, p in named[: 2 + rank]], "name": "a"},
            {"params": [p for _, p in named[2 + rank :]], "name": "b"},
        ]
        ordered = list(net.parameters())[:: -1 if rank else 1]
        groups = {"policies": [ClipByNorm(max_norm=1.0, scope="group")]}
        limit = {"policies": [ClipByNorm(max_norm=1.0 + rank)]}
        files = ADAPTIVE | {"recorder": {"file": f"rank{rank}.jsonl"}}
        cases = {
            "limit": (limit, named),
            "policies": ([ZClip(), ClipByNorm(max_norm=1.0)][rank:], named),
            "fewer": (ADAPTIVE, named[rank:]),
            "names": (ADAPTIVE, [(f"{rank}.{name}", p) for name, p in named]),
            "groups": (groups, net, torch.optim.SGD(options, lr=0.1)),
            "no scope group": (ADAPTIVE, net, torch.optim.SGD(options, lr=0.1)),
            "file of the record": (files, named),
            "numbers for names": (ADAPTIVE, None, torch.optim.SGD(ordered, lr=0.1)),
        }
        found |= {(kind, case): said(GradientClipper, *args) for case, args in cases.items()}
    net = uneven_net(1)
    clipper = GradientClipper(ClipByNorm(max_norm=1.0 + rank), net)
    later = DistributedDataParallel(net)
    backward(later, 0, rank)
    found["ddp afterwards", "limit"] = said(clipper.clip)
    return found


SAID = {
    "limit": "rank 1 and rank 0 differ in configuration: policies[0].max_norm is 2.0 on rank 1, "
    "1.0 on rank 0",
    "policies": "differ in configuration: policies[0].",
    "fewer": "rank 1 and rank 0 differ in parameters: ",
    "names": "rank 1 and rank 0 differ in parameters: 0.",
    "groups": "differ in parameters: ",
    "numbers for names": "differ in parameters: group0.0 is torch.float32 of shape (1,) on rank 1",
}


def test_ranks_that_are_given_other_things_are_told_when_built(subtests):
    first, second = run_on_ranks(built, 2)
    assert first == second
    for (kind, case), text in first.items():
        with subtests.test(f"{kind}-{case}"):
            assert SAID.get(case, "") in text
            assert bool(text) == (case in SAID)


def on_a_mesh(rank, world):
    """HSDP on four ranks, of which the last is given another limit; in another order too."""
    del world
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    net = fully_shard(uneven_net(1), mesh=mesh)
    named = list(net.named_parameters())[:: -1 if rank == 2 else 1]
    config = {"policies": [{"type": "norm", "max_norm": 1.0, "scope": "parameter"}]}
    config |= {"verify_every": 1, "log": {"per_parameter": True}}
    clipper = GradientClipper(config, named)
    backward(net, 0, rank)
    true = {name: float(whole(p).norm()) for name, p in net.named_parameters()}
    logged = {name: float(norm) for name, norm in clipper.clip().per_parameter.items()}
    limit = ClipByNorm(max_norm=2.0 if rank == 3 else 1.0)
    return said(GradientClipper, limit, named), logged, true


def test_copies_on_a_mesh_are_compared_too():
    for text, logged, true in run_on_ranks(on_a_mesh, 4):
        assert "rank 3 and rank 0 differ in configuration: policies[0].max_norm is 2.0" in text
        assert logged == pytest.approx(true, rel=1e-5)


def loaded(rank, world):
    """What loading says, and the state after it."""
    del world
    found = {}
    for kind in ("ddp", "fsdp2"):
        net = wrapped(kind)
        clipper = GradientClipper(ADAPTIVE, net.named_parameters())
        states = [clipper.state_dict()]
        for step in range(4):
            backward(net, step, rank)
            clipper.clip()
            states.append(clipper.state_dict())
        broken = {**states[4], "format": 1}
        if kind == "ddp":  # loaded before anyone knows that ranks share the model
            later = uneven_net(1)
            alone = GradientClipper(ADAPTIVE, later)
            alone.load_state_dict(states[3 + rank])
            net = DistributedDataParallel(later)
            backward(net, 0, rank)
            found["later"] = said(alone.clip)
        broken = broken if rank else states[2]
        for case, state in (("other", states[3 + rank]), ("broken", broken), ("same", states[2])):
            text = said(clipper.load_state_dict, state)
            found[kind, case] = text, float(clipper.state_dict()["counts"]["steps"])
    return found


def test_ranks_that_load_other_states_are_told_and_nothing_is_changed():
    first, second = run_on_ranks(loaded, 2)
    assert first["later"] == second["later"]
    assert first["later"].startswith("clip: rank 1 and rank 0 differ in state: ")
    for kind in ("ddp", "fsdp2"):
        text, steps = first[kind, "other"]
        assert text.startswith("load_state_dict: rank 1 and rank 0 differ in state: ")
        assert "differ in counts: steps is 4.0 on rank 1, 3.0 on rank 0" in text
        assert second[kind, "other"] == (text, steps)
        assert steps == 4
        assert "failed on rank 1" in first[kind, "broken"][0]
        assert "format 1" in second[kind, "broken"][0]
        assert first[kind, "broken"][1] == second[kind, "broken"][1] == 4
        assert first[kind, "same"] == second[kind, "same"] == ("", 2)


def differing(rank, world):
    """What clip says where one rank of two goes its own way, and at which step."""
    del world
    found = {}
    for case in ("gradient", "share", "skipped", "skipped early", "no_sync before", "same"):
        net = DistributedDataParallel(uneven_net(1))
        every = 3 if case == "skipped early" else 1
        clipper = GradientClipper(ADAPTIVE | {"verify_every": every}, net.named_parameters())
        for step in range(8):
            if case == "no_sync before" and step == 3:
                with net.no_sync():
                    backward(net, step, rank)
            else:
                backward(net, step, rank)
            odd = rank == 1 and step == 3
            if odd and case == "gradient":
                next(iter(net.parameters())).grad.view(-1)[0] *= 2
            if odd and case.startswith("skipped"):
                continue
            grads = [p.grad.clone() for p in net.parameters()]
            share = 0.5 if odd and case == "share" else 1.0
            text = said(clipper.clip, share=share)
            if text:
                same = all(map(torch.equal, grads, (p.grad for p in net.parameters())))
                found[case] = step, text, same, clipper.state_dict()["step"]
                break
    return found


def test_ranks_that_go_their_own_way_are_told_while_training(subtests):
    first, second = run_on_ranks(differing, 2)
    wanted = {
        "gradient": (3, "rank 1 in norms"),
        "share": (3, "rank 1 in state"),
        "skipped": (4, "rank 1 in state"),
        "skipped early": (6, "rank 1 in state"),
        "no_sync before": (3, "rank 1 in state"),
    }
    assert first.keys() == second.keys() == wanted.keys()
    for case, (step, part) in wanted.items():
        with subtests.test(case):
            for found in (first[case], second[case]):
                assert found[0] == step
                assert part in found[1]
                assert found[2]


def told_at_once(rank, world):
    """clip within no_sync; and within join, by policies that it leaves different and by others."""
    del world
    net = DistributedDataParallel(uneven_net(1))
    texts = []
    for given in (net, net.module):
        clipper = GradientClipper(ADAPTIVE, given)
        with net.no_sync():
            backward(net, 0, rank)
            texts.append(said(clipper.clip))
        steps = clipper.state_dict()["step"]
        backward(net, 0, rank)
        texts.append(said(clipper.clip))
    warned = []
    logging.getLogger("gradclip").addFilter(lambda record: warned.append(record.getMessage()))
    verified = ADAPTIVE | {"verify_every": 1}
    for config in (ClipByNorm(max_norm=1.0), ADAPTIVE, verified, "in line"):
        one = verified if config == "in line" else config
        clipper, text = GradientClipper(one, net.named_parameters()), ""
        for epoch in range(2):
            with net.join():
                for step in range(5 if rank else 3):
                    backward(net, 10 * epoch + step, rank)
                    if text := said(clipper.clip):
                        break
            if text:
                break
            if config == "in line":  # as docs/layouts.md says
                states = [None] * dist.get_world_size()
                dist.all_gather_object(states, clipper.state_dict())
                clipper.load_state_dict(max(states, key=lambda state: state["step"]))
        texts.append(text)
    return texts, steps, warned


def test_unreduced_gradients_and_uneven_data_are_told():
    for texts, steps, warned in run_on_ranks(told_at_once, 2):
        for text in (texts[0], texts[2]):
            assert "clip: called within no_sync() of DistributedDataParallel" in text
        assert texts[1] == texts[3] == texts[4] == texts[5] == ""
        assert "rank 1 in state" in texts[6]
        assert texts[7] == ""
        assert steps == 0
        assert [line[:40] for line in warned] == ["gradclip: clip: within join() of Distrib"] * 3


def on_one_rank(rank, world):
    """A clipper on the first rank alone, beside that of all ranks; and one that loads alone."""
    del world
    warned, longest = [], agreement.TOGETHER
    logging.getLogger("gradclip").addFilter(lambda record: warned.append(record.getMessage()))
    agreement.TOGETHER = timedelta(milliseconds=200)
    net = DistributedDataParallel(uneven_net(1))
    dist.barrier()
    clipper = GradientClipper(ADAPTIVE | {"verify_every": 1}, net)
    for step in range(3):
        backward(net, step, rank)
        if rank == 0 and step == 1:
            GradientClipper(ClipByNorm(max_norm=math.inf), net).clip()
            clipper.load_state_dict(clipper.state_dict())
        clipper.clip()
    agreement.TOGETHER = longest
    return [line.split("some")[0] for line in warned]


def test_what_one_rank_does_alone_hangs_nobody():
    wanted = ["gradclip: GradientClipper: ", "gradclip: load_state_dict: "]
    assert run_on_ranks(on_one_rank, 2, fresh=True) == [wanted, []]


def messages(rank, world):
    """The messages of each step, for each layout and interval."""
    del world
    found = {}
    for kind in ("ddp", "fsdp1", "fsdp2"):
        for every in (0, 3):
            net = wrapped(kind)
            config = ADAPTIVE | {"verify_every": every}
            with CountComms() as built:
                clipper = GradientClipper(config, net.named_parameters())
            steps = []
            for step in range(6):
                backward(net, step, rank)
                with CountComms() as comms:
                    clipper.clip()
                steps.append(comms.messages)
            found[kind, every] = built.messages, steps
    return found


def test_a_comparison_is_one_message_and_none_is_sent_between():
    for found in run_on_ranks(messages, 2):
        for (kind, every), (built, steps) in found.items():
            own = [] if kind == "ddp" else [16]  # a sum, and whether there are gradients
            assert built == [2 * 32], kind  # what two ranks sent arrives
            compared = [every and step % every == 0 for step in range(1, 7)]
            assert steps == [[*own, 64] if due else own for due in compared], kind
