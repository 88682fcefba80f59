"""DeepSpeed steps that are odd: not finite, withheld, with a growing loss scale, accumulated."""

import functools
import math
import tempfile

import pytest
import torch
from support.nets import uneven_net
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ClipConfig, GradientClipper, NonFiniteError, SkipLarge, ZClip

pytest.importorskip("deepspeed")

from support.deepspeed_cpu import whole
from support.zero_engines import (
    ENGINES,
    LR,
    WORLD,
    Spoilt,
    backward,
    batch,
    gradients,
    groups,
    snapshot,
    start,
    step,
)

OVERFLOWS = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}
STATIC = {"enabled": True, "loss_scale": 64.0}
ADAM = torch.optim.Adam
RESUMED = ENGINES.keys() & {"zero 2", "zero 3", "bf16 zero 1 fp32 accumulation"}
# Other geometries of the same step.
GEOMETRY = ("zero 1 aligned", "zero 2 round robin", "zero 1 offload")
NAMES = [name for name in ENGINES if name not in GEOMETRY]


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def spoilt(name, policy, **more):
    net = Spoilt()
    if name.startswith("bf16"):  # DeepSpeed's ZeRO 1 and 2 then look at no norm themselves
        more["bf16"] = {"enabled": True, "check_grad_overflow": False}
    engine = start(name, net, ADAM, schedule, **more)
    clipper = GradientClipper(policy, optimizer=engine)
    clipper.attach(engine)
    return engine, clipper, net


def nan_on_one_rank(rank, world, name):
    """One NaN, in a parameter that one rank owns, between ordinary steps."""
    engine, clipper, net = spoilt(name, ZClip(warmup_steps=2, max_norm=None))
    limits = []
    for number in (0, 1, 2, "nan", 3, 4):
        net.spoil = number == "nan" and rank == 1
        before = snapshot(engine)
        rate = engine.lr_scheduler.get_last_lr()
        step(engine, rank, 0 if number == "nan" else number)
        record = clipper.last_record
        same = all(map(torch.equal, before, snapshot(engine)))
        if number == "nan":
            assert bool(record.skipped)
            assert not bool(record.finite)
            assert same
            assert not engine.was_step_applied()
            assert engine.skipped_steps == 1
            assert engine.lr_scheduler.get_last_lr() == rate
        else:
            assert not same
            assert engine.was_step_applied()
            assert engine.lr_scheduler.get_last_lr() != rate
            limits.append(float(record.limit))
    assert engine.skipped_steps == 1
    return limits


def raising(rank, world, name):
    """Every rank raises; gradients, parameters and state are as they were."""
    policy = ClipConfig(policies=[ClipByNorm(max_norm=1.0)], on_nonfinite="raise")
    more = {"fp16": STATIC} if name.startswith("fp16") else {}
    engine, clipper, net = spoilt(name, policy, **more)
    step(engine, rank, 0)
    net.spoil = rank == 1
    backward(engine, rank, 1)
    held = gradients(engine)
    before = snapshot(engine)
    with pytest.raises(NonFiniteError, match=r"on this rank in last|on another rank") as caught:
        engine.step()
    for after, kept in zip(gradients(engine), held, strict=True):
        torch.testing.assert_close(after, kept, rtol=0, atol=0, equal_nan=True)
    assert all(map(torch.equal, before, snapshot(engine)))
    assert clipper.state_dict()["counts"]["steps"] == 1
    return "on this rank" in str(caught.value)


def ignoring(rank, world, name):
    """`ignore` leaves it to DeepSpeed, which withholds such a step or doesn't, by wrapper."""
    policy = ClipConfig(policies=[ClipByNorm(max_norm=1.0)], on_nonfinite="ignore")
    engine, clipper, net = spoilt(name, policy)
    net.spoil = True
    step(engine, rank, 0)
    assert not bool(clipper.last_record.finite)
    assert bool(clipper.last_record.skipped) is not engine.was_step_applied()
    return engine.was_step_applied()


def accumulating(rank, world, name):
    """Two micro-batches a step: one record, of their average."""
    engine = start(name, gradient_accumulation_steps=2)
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), optimizer=engine)
    clipper.attach(engine)
    seen = []
    for number in range(6):
        step(engine, rank, number)
        seen.append(clipper.last_record)
    assert seen[0] is None
    assert seen[1] is seen[2] is not seen[3] is seen[4] is not seen[5]
    return [float(seen[i].grad_norm) for i in (1, 3, 5)], whole(engine)


def resumed(rank, world, name, folder):
    """Clip state in DeepSpeed's own checkpoint; a threshold found in one stays off."""

    def begin(policy, **more):
        engine = start(name, **more)
        clipper = GradientClipper(policy, optimizer=engine)
        clipper.attach(engine)
        return engine, clipper

    def go(engine, clipper, numbers):
        limits = []
        for number in numbers:
            step(engine, rank, number)
            limits.append(float(clipper.last_record.limit))
        return limits

    policy = ZClip(warmup_steps=2, max_norm=None)
    engine, clipper = begin(policy)
    go(engine, clipper, range(4))
    engine.save_checkpoint(f"{folder}/ours", client_state={"clip": clipper.state_dict()})
    straight = go(engine, clipper, range(4, 7))
    engine, clipper = begin(policy)
    clipper.load_state_dict(engine.load_checkpoint(f"{folder}/ours")[1]["clip"])
    again = go(engine, clipper, range(4, 7))

    engine = start(name, gradient_clipping=1e-6)
    step(engine, rank, 0)
    engine.save_checkpoint(f"{folder}/theirs")
    engine, clipper = begin(ClipByNorm(max_norm=1e9))
    engine.load_checkpoint(f"{folder}/theirs")
    before = whole(engine)
    step(engine, rank, 1)
    moved = torch.cat([(a - b).reshape(-1) for a, b in zip(before, whole(engine), strict=True)])
    return straight, again, float(moved.norm()) / float(clipper.last_record.grad_norm)


def odd_steps(rank, world, folder):
    found = [resumed(rank, world, name, f"{folder}/{i}") for i, name in enumerate(sorted(RESUMED))]
    answers = {"resumed": found}
    for name in NAMES:
        answers[name] = {
            "nan": nan_on_one_rank(rank, world, name),
            "raise": raising(rank, world, name),
            "ignore": ignoring(rank, world, name),
            "accumulate": accumulating(rank, world, name),
        }
    return answers


@functools.cache
def answers():
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(odd_steps, WORLD, folder, timeout=300, fresh=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_is_withheld_raised_or_left_to_deepspeed(name):
    first, second = (answer[name] for answer in answers())
    assert first["nan"] == second["nan"]
    assert min(first["nan"]) < math.inf
    # Under ZeRO the NaN is in one rank's partition; stage 0 averages it into every rank.
    assert first["raise"] + second["raise"] == (2 if "stage 0" in name else 1)
    unchecked = ("bf16 zero 1", "bf16 zero 2", "bf16 zero 2 offload")
    goes_on = name in ("stage 0", *unchecked, "bf16 zero 2 fp32 accumulation")
    assert first["ignore"] == second["ignore"] == goes_on


def test_a_checkpoint_of_deepspeed_carries_clip_state_and_no_threshold():
    for straight, again, rate in (row for answer in answers() for row in answer["resumed"]):
        assert again == straight
        assert rate == pytest.approx(LR, rel=1e-2)


@functools.cache
def accumulated_alone():
    net = uneven_net(1)
    optimizer = torch.optim.SGD(groups(net), lr=LR)
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), net.named_parameters(), optimizer)
    norms = []
    for number in range(0, 6, 2):
        optimizer.zero_grad()
        net(torch.cat([batch(number), batch(number + 1)])).square().mean().backward()
        norms.append(float(clipper.clip().grad_norm))
        optimizer.step()
    return norms, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_clipped_once_a_step(name):
    (norms, left), (other, right) = (answer[name]["accumulate"] for answer in answers())
    want, parameters = accumulated_alone()
    exact = 1e-6 if name.split()[0] not in ("bf16", "fp16") else 2e-2
    assert norms == other
    assert norms == pytest.approx(want, rel=exact)
    for got, same, expected in zip(left, right, parameters, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


def loss_scales(rank, world):
    """fp16: a real overflow, a step that a policy withholds, and steps on which the scale grows."""
    found = {}
    for name in [name for name in ENGINES if name.startswith("fp16")]:
        engine, clipper, net = spoilt(name, ClipByNorm(max_norm=1.0), fp16=OVERFLOWS)
        scales = [engine.optimizer.loss_scale]
        for number in range(3):
            net.spoil = number == 1
            step(engine, rank, number)
            scales.append(engine.optimizer.loss_scale)
        assert bool(clipper.last_record.finite)

        engine, clipper, net = spoilt(name, SkipLarge(limit=1e-3), fp16=OVERFLOWS)
        before = snapshot(engine)
        step(engine, rank, 0)
        assert bool(clipper.last_record.skipped & clipper.last_record.finite)
        assert engine.skipped_steps == 1
        assert all(map(torch.equal, before, snapshot(engine)))
        withheld = engine.optimizer.loss_scale

        engine = start(name, fp16=OVERFLOWS)
        clipper = GradientClipper(ClipByNorm(max_norm=0.5), optimizer=engine)
        clipper.attach(engine)
        norms, grown = [], []
        for number in range(6):
            scale = engine.optimizer.loss_scale
            step(engine, rank, number)
            grown.append(engine.optimizer.loss_scale > scale)
            norms.append(float(clipper.last_record.grad_norm))
            assert float(engine.get_global_grad_norm()) == pytest.approx(norms[-1], rel=1e-6)
        found[name] = scales, withheld, grown, norms, whole(engine)
    return found


def test_loss_scales():
    net = uneven_net(1)
    optimizer = torch.optim.SGD(groups(net), lr=LR)
    clipper = GradientClipper(ClipByNorm(max_norm=0.5), net.named_parameters(), optimizer)
    want = []
    for number in range(6):
        optimizer.zero_grad()
        net(batch(number)).square().mean().backward()
        want.append(float(clipper.clip().grad_norm))
        optimizer.step()
    for found in run_on_ranks(loss_scales, WORLD, fresh=True):
        for name, (scales, withheld, grown, norms, parameters) in found.items():
            assert scales == [256.0, 256.0, 128.0, 128.0], name
            assert withheld == 256.0, name
            assert any(grown)
            assert norms == pytest.approx(want, rel=2e-3), name
            for got, expected in zip(parameters, net.parameters(), strict=True):
                torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
