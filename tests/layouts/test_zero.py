"""Inside a DeepSpeed engine's step: one process's norms, decisions and parameters, ZeRO 0 to 3."""

import contextlib
import copy
import functools
import math

import pytest
import torch
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.tensor.debug import CommDebugMode

from gradclip import (
    AGC,
    ClipByNorm,
    ClipByRMS,
    ClipByValue,
    GradientClipper,
    Spam,
    SpikeMax,
    UClip,
    ZClip,
)

pytest.importorskip("deepspeed")

from support.deepspeed_cpu import whole
from support.zero_engines import (
    ENGINES,
    LR,
    ROWS,
    SCALE,
    WORLD,
    backward,
    batch,
    groups,
    spike,
    start,
)

POLICIES = {
    "norm": [ClipByNorm(max_norm=0.5)],
    "norm_p1": [ClipByNorm(max_norm=2.0, norm_type=1.0)],
    "norm_inf": [ClipByNorm(max_norm=0.1, norm_type=math.inf)],
    "parameter": [ClipByNorm(max_norm=0.1, scope="parameter")],
    "group": [ClipByNorm(max_norm=0.2, scope="group")],
    "unit": [ClipByNorm(max_norm=0.05, scope="unit")],
    "agc": [AGC(clip_factor=0.05), ClipByNorm(max_norm=5.0)],
    "rms": [ClipByRMS(max_rms=0.02)],
    "value": [ClipByValue(clip_value=0.05)],
    "zclip": [ZClip(warmup_steps=2, max_norm=None)],
    "groups": {
        "policies": [{"type": "zclip", "warmup_steps": 2}],
        "groups": [{"match": "3.*", "policies": [{"type": "norm", "max_norm": 0.1}]}],
        "log": {"per_parameter": True},
    },
    "spam": [Spam(theta=1.5, warmup_steps=2)],
    "spike_max": [SpikeMax(decay=0.5)],
    "uclip": [UClip(limit=0.05)],
    "uclip_norm": [UClip(limit=0.3, kind="norm")],
}
COLLECTIVES = {"value": 2, "spam": 2, "spike_max": 2, "uclip": 2}
WHOLE = ("SGD", "FP16_Optimizer", "FP16_UnfusedOptimizer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def values(record):
    return {key: float(value) for key, value in record.as_metrics().items()}


def memory(clipper):
    """What is remembered of elements, whole, as one list."""
    saved = clipper.state_dict()["policies"][0].get("elements", {})
    return {name: value.flatten().tolist() for name, own in saved.items() for value in own.values()}


def methods(optimizer):
    """Names of what stands in for a method on the instance alone."""
    return {name for name, value in vars(optimizer).items() if callable(value)}


def train(rank, world, name):
    """A few steps under every policy in turn, on one engine; attached and removed each time."""
    engine = start(name)
    assert type(engine.optimizer).__name__ == ENGINES[name][0]
    seen, number = {}, 0
    for case, policies in POLICIES.items():
        clipper = GradientClipper(policies, optimizer=engine)
        own = methods(engine.optimizer)
        handle = clipper.attach(engine)
        records, comms = [], CommDebugMode()
        for _ in range(4):
            backward(engine, rank, number, spike(number))
            with comms if spike(number) > 1 else contextlib.nullcontext():
                engine.step()
            assert engine.was_step_applied()
            assert float(engine.get_global_grad_norm()) == clipper.last_record.grad_norm.float()
            records.append(values(clipper.last_record))
            number += 1
        handle.remove()
        assert methods(engine.optimizer) == own
        reductions = sum(n for op, n in comms.get_comm_counts().items() if "reduce" in str(op))
        seen[case] = records, reductions, memory(clipper)
    return seen, whole(engine)


def train_all(rank, world):
    return {name: train(rank, world, name) for name in ENGINES}


@functools.cache
def alone(precision):
    """The same by one process: gradients rounded where DeepSpeed rounds, then float32."""
    dtype = DTYPES.get(precision, torch.float32)
    scale = SCALE if precision == "fp16" else 1.0
    net = uneven_net(1).to(dtype)
    master = copy.deepcopy(net).float()
    optimizer = torch.optim.SGD(groups(master), lr=LR)
    seen, number = {}, 0
    for case, policies in POLICIES.items():
        clipper = GradientClipper(policies, master.named_parameters(), optimizer)
        records = []
        for _ in range(4):
            sums = [torch.zeros_like(p) for p in net.parameters()]
            for mine in batch(number).to(dtype).split(ROWS):
                net.zero_grad()
                (net(mine).float().square().mean() * spike(number) * scale).backward()
                for total, p in zip(sums, net.parameters(), strict=True):
                    total += p.grad / WORLD
            for p, total in zip(master.parameters(), sums, strict=True):
                p.grad = total.float() / scale
            records.append(values(clipper.clip()))
            optimizer.step()
            for p, q in zip(net.parameters(), master.parameters(), strict=True):
                p.data.copy_(q.data)
            number += 1
        seen[case] = records, memory(clipper)
    return seen, [p.detach().float() for p in net.parameters()]


every_engine = functools.cache(lambda: run_on_ranks(train_all, WORLD, timeout=300, fresh=True))


@pytest.mark.parametrize("name", ENGINES)
def test_every_wrapper_under_every_policy_is_one_process(name):
    (seen, left), (other, right) = (answer[name] for answer in every_engine())
    want, parameters = alone("".join(ENGINES[name][1][1:]))
    assert repr(seen) == repr(other)
    assert all(map(torch.equal, left, right))
    for case, (records, reductions, kept) in seen.items():
        spread = ENGINES[name][0] not in WHOLE
        assert reductions == (COLLECTIVES.get(case, 1) if spread else 0), case
        assert any(record["clip/clipped"] for record in records), case
        expected_records, expected_kept = want[case]
        for got, expected in zip(records, expected_records, strict=True):
            assert got == pytest.approx(expected, rel=2e-6, abs=1e-6, nan_ok=True), case
        assert kept.keys() == expected_kept.keys(), case
        for key, values in kept.items():
            assert values == pytest.approx(expected_kept[key], rel=1e-5, abs=1e-6), (case, key)
    for got, expected in zip(left, parameters, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
