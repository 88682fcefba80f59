"""Gradients on a device without float64, as Apple's mps: measured there, decided on the CPU."""

import io
import math

import pytest
import torch
from support import single_device
from support.gradients import POLICIES, SHAPES, SIZES, optimizer_for, small_model
from support.single_device import SingleDevice

import gradclip
from gradclip import (
    AGC,
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GradientClipper,
    LayoutError,
    NonFiniteError,
    ZClip,
)

pytestmark = pytest.mark.skipif(
    not single_device.WORKS, reason="this torch takes no device that is written in Python"
)
DEVICE = getattr(single_device, "DEVICE", None)
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where flight records go
    with SingleDevice() as context:
        yield context


def program(policy, device, dtype=torch.float32, **options):
    make = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype).to(device))
        for name, shape in SHAPES.items()
    }
    optimizer = optimizer_for(params)
    return params, optimizer, GradientClipper(policy, params.items(), optimizer, **options)


def fill(params, seed, size=1.0):
    make = torch.Generator().manual_seed(seed)
    for parameter in params.values():
        value = torch.randn(parameter.shape, generator=make) * size
        parameter.grad = value.to(parameter.dtype).to(parameter.device)


def gradients(params):
    held = [p.grad for p in params.values() if p.grad is not None]
    return torch.cat([grad.cpu().double().reshape(-1) for grad in held]) if held else None


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_does_the_same_as_on_the_cpu(name, device):
    config = ClipConfig(
        policies=[POLICIES[name]],
        log={"per_parameter": True, "update_norm_every": 3},
        recorder={"steps": 8, "worst": 2},
    )
    runs = [program(config, where) for where in (CPU, DEVICE)]
    for step, size in enumerate(SIZES):
        records = []
        for params, _, clipper in runs:
            fill(params, step, math.nan if step == 10 else size)
            records.append(clipper.clip(loss=torch.tensor(1.0 + step).to(params["scale"].device)))
        ours, theirs = (gradients(params) for params, *_ in runs)
        assert (ours is None) == (theirs is None), step
        if ours is not None:
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-7)
        for _, optimizer, _ in runs:
            optimizer.step()
        expected, found = (record.as_metrics() for record in records)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9, equal_nan=True)
    buffer = io.BytesIO()
    torch.save(runs[1][2].state_dict(), buffer)
    buffer.seek(0)
    again = program(config, DEVICE)[2]
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert repr(again.state_dict()) == repr(runs[1][2].state_dict())


@pytest.mark.parametrize("policy", [ClipByNorm(max_norm=0.5), ZClip()], ids=["norm", "zclip"])
def test_a_step_makes_one_copy_and_unclipped_gradients_keep_their_bits(policy, device):
    params, _, clipper = program(policy, DEVICE)
    fill(params, 0, 1e-3)
    before = gradients(params)
    device.reads = 0
    record = clipper.clip()
    assert device.reads == 1
    assert float(record.coef) == 1
    assert record.grad_norm.device == CPU
    assert torch.equal(gradients(params), before)
    fill(params, 0)
    device.reads = 0
    clipper.clip()
    assert device.reads == 1


def test_256_elements_cross_to_the_host_as_one_number(device):
    parameter = torch.nn.Parameter(torch.zeros(1 << 16).to(DEVICE))
    parameter.grad = torch.ones(1 << 16).to(DEVICE)
    clipper = GradientClipper(ClipByNorm(max_norm=1e9), [("p", parameter)])
    device.values = 0
    assert float(clipper.clip().grad_norm) == 256
    assert device.values == 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", [ClipByNorm(max_norm=0.5), AGC()], ids=["norm", "agc"])
def test_every_dtype_with_a_loss_scale(policy, dtype):
    scale = torch.tensor(64.0)
    found = []
    for where in (CPU, DEVICE):
        params, _, clipper = program(policy, where, dtype)
        fill(params, 1, 3.0)
        record = clipper.clip(grad_scale=scale.to(where))
        found.append((record.grad_norm, record.coef, gradients(params)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [3e38, 1e-30, 1e-42])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 9.0, math.inf])
def test_norms_outside_the_range_of_float32_squares(value, norm_type):
    held = torch.full((1000,), value)
    parameter = torch.nn.Parameter(held.to(DEVICE))
    parameter.grad = held.to(DEVICE)
    exact = float(held[0].double()) * 1000 ** (1 / norm_type)
    clipper = GradientClipper(
        ClipByNorm(max_norm=1e300, norm_type=norm_type), named_parameters=[("p", parameter)]
    )
    assert float(clipper.clip().grad_norm) == pytest.approx(exact, rel=1e-6)


def test_a_bad_gradient_is_named_before_anything_is_written():
    params, _, clipper = program(
        ClipConfig(policies=[ClipByNorm(max_norm=1.0)], on_nonfinite="raise"), DEVICE
    )
    fill(params, 0)
    params["layer.bias"].grad.mul_(math.inf)
    before = gradients(params)
    with pytest.raises(NonFiniteError, match=r"layer\.bias"):
        clipper.clip()
    assert torch.equal(gradients(params).nan_to_num(), before.nan_to_num())


def test_torchs_own_functions():
    params, *_ = program(ClipByNorm(max_norm=1.0), DEVICE)
    fill(params, 0)
    norm = gradients(params).norm()
    total = gradclip.clip_grad_norm_(params.values(), 0.5)
    assert float(total) == pytest.approx(float(norm), rel=1e-6)
    assert float(gradients(params).norm()) == pytest.approx(0.5, rel=1e-5)
    gradclip.clip_grad_value_(params.values(), 0.01)
    assert float(gradients(params).abs().max()) == pytest.approx(0.01)
    held = [p.grad for p in params.values()]
    assert float(gradclip.get_total_norm(held)) == pytest.approx(float(gradients(params).norm()))


@pytest.mark.parametrize("stage", ["step", "after_backward"])
def test_a_loop_with_backward_and_an_attached_clipper(stage):
    weights = []
    for where in (CPU, DEVICE):
        model = small_model().to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        config = ClipConfig(policies=[ZClip(warmup_steps=2)], stage=stage, debug=True)
        clipper = GradientClipper(config, model.named_parameters(), optimizer)
        clipper.attach(optimizer)
        for step, size in enumerate(SIZES):
            batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(where)
            optimizer.zero_grad()
            for half in batch.chunk(2):
                loss = model(half).square().mean() * size / 2
                if stage == "step":
                    loss.backward()
                else:
                    with clipper.micro_batch(share=0.5):
                        loss.backward()
            optimizer.step()
        assert clipper.last_record.as_metrics()["clip/grad_norm"].device == CPU
        weights.append(torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_what_needs_float64_or_a_fused_step_is_refused():
    with pytest.raises(LayoutError, match="on single, which has no float64; allowed there"):
        program(ClipByNorm(max_norm=1.0), DEVICE, kernel="accelerator")
    model = small_model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    config = ClipConfig(policies=[ClipByNorm(max_norm=1.0)], apply="fold")
    with pytest.raises(ConfigError, match="whose fused kernels read no factor"):
        GradientClipper(config, model.named_parameters(), optimizer)
    config = config.model_copy(update={"apply": "auto"})
    clipper = GradientClipper(config, model.named_parameters(), optimizer)
    assert not clipper._core.machinery.effect.folds(in_step=True)
