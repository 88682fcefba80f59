"""The coefficient and the withholding inside a fused optimizer's step."""

import copy

import pytest
import torch
from support.gradients import small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adagrad, Adam, AdamW

from gradclip import (
    AGC,
    ClipByNorm,
    ClipByValue,
    ClipConfig,
    ConfigError,
    GradientClipper,
    NonFiniteError,
    SkipLarge,
    SkipLimitError,
    SkipNonfinite,
    ZClip,
)

OPTIMIZERS = {
    "adam": lambda p, fused: Adam(p, lr=0.01, fused=fused),
    "adamw": lambda p, fused: AdamW(p, lr=0.01, fused=fused, weight_decay=0.1),
    "amsgrad": lambda p, fused: AdamW(p, lr=0.01, fused=fused, amsgrad=True),
    "sgd": lambda p, fused: SGD(p, lr=0.01, fused=fused),
    "momentum": lambda p, fused: SGD(p, lr=0.01, momentum=0.9, dampening=0.1, fused=fused),
    "nesterov": lambda p, fused: SGD(p, lr=0.01, momentum=0.9, nesterov=True, fused=fused),
    "adagrad": lambda p, fused: Adagrad(p, lr=0.01, fused=fused),
}
NORM = ClipByNorm(max_norm=0.3)


def config(apply, policies=(NORM,)):
    return ClipConfig(policies=list(policies), apply=apply)


def start(name, clip, *, fused=True, **options):
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters(), fused)
    return model, optimizer, GradientClipper(clip, model.named_parameters(), optimizer, **options)


def backward(model, step, scaler=None, size=1.0):
    model.zero_grad()
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    loss = model(inputs).square().mean() * size
    (loss if scaler is None else scaler.scale(loss)).backward()


def take_step(optimizer, clipper, scaler, way):
    if way == "called":
        clipper.clip()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return clipper.last_record


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(name, apply, scale, way, steps=50):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    known = scaler if way != "attached" else None
    model, optimizer, clipper = start(name, config(apply), scaler=known)
    if way != "called":
        clipper.attach(optimizer)
    norms = []
    for step in range(steps):
        backward(model, step, scaler, size=50)
        norms.append(take_step(optimizer, clipper, scaler, way).grad_norm)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    assert clipper.state_dict()["counts"]["clipped"] > steps / 2
    return flat(model), torch.stack(norms)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_end_where_scaling_in_place_ends(name):
    wanted, norms = train(name, "in_place", None, "called")
    cells = [("fold", None, "called"), ("fold", None, "attached"), ("auto", None, "attached")]
    cells += [("fold", 2.0**16, way) for way in ("called", "attached", "attached with scaler")]
    cells += [("in_place", 2.0**16, way) for way in ("called", "attached")]
    for cell in cells:
        found, also = train(name, *cell)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=str(cell))
        torch.testing.assert_close(also, norms, rtol=1e-5, atol=0)


def test_folding_leaves_gradients_to_the_step():
    model, optimizer, clipper = start("adamw", config("fold"))
    backward(model, 0, size=50)
    before = [p.grad.clone() for p in model.parameters()]
    record = clipper.clip()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert float(record.clipped_norm) == pytest.approx(0.3, rel=1e-5)
    optimizer.step()
    left = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()
    assert float(left) == pytest.approx(0.3, rel=1e-5)


def test_folding_leaves_unscaling_to_the_step_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, _, clipper = start("adamw", config("fold"), scaler=scaler)
    backward(model, 0, scaler, size=50)
    before = [p.grad.clone() for p in model.parameters()]
    record = clipper.clip()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    norm = torch.cat([g.reshape(-1) for g in before]).norm() / 1024
    assert float(record.grad_norm) == pytest.approx(float(norm), rel=1e-5)


def test_gradients_of_a_step_withheld_on_the_device_stay_as_they_are():
    clip = config("auto", [SkipLarge(limit=1.0), NORM])
    model, _, clipper = start("adamw", clip, kernel="accelerator")
    backward(model, 0, size=1000)
    before = [p.grad.clone() for p in model.parameters()]
    assert clipper.clip().skipped
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_what_no_step_followed_is_taken_back():
    results = []
    for stale in (True, False):
        clip = ClipConfig(policies=[NORM], apply="fold", on_nonfinite="ignore")
        model, optimizer, clipper = start("sgd", clip)
        if stale:
            backward(model, 0, size=1000)
            assert clipper.clip().clipped
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        assert not clipper.clip().clipped
        optimizer.step()
        results.append(flat(model))
    assert torch.equal(*results)


def test_at_the_limit_a_folded_step_is_bitwise_the_plain_one():
    results = []
    for policy in (NORM, None):
        model, optimizer, clipper = start("adamw", config("fold"))
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        if policy:
            clipper.clip()
        optimizer.step()
        results.append(flat(model))
    assert torch.equal(*results)


def snapshot(model, optimizer):
    state = [
        {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()}
        for s in optimizer.state.values()
    ]
    return [p.detach().clone() for p in model.parameters()], state


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("way", ["called", "attached"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("apply", "fused"),
    [("fold", True), ("in_place", True), ("device", True), ("in_place", False), ("device", False)],
)
def test_a_withheld_step_changes_no_bit(name, apply, first, way, scale, fused):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    options = {"kernel": "accelerator"} if apply == "device" else {}
    clip = config("auto" if apply == "device" else apply, [SkipLarge(limit=1.0), NORM])
    model, optimizer, clipper = start(name, clip, scaler=scaler, fused=fused, **options)
    if way == "attached":
        clipper.attach(optimizer)

    def step(number, size):
        backward(model, number, scaler, size)
        return bool(take_step(optimizer, clipper, scaler, way).skipped)

    twin = small_model()
    fresh = OPTIMIZERS[name](twin.parameters(), fused)
    if not first:
        assert not step(0, 0.01)
        twin.load_state_dict(model.state_dict())
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    params, state = snapshot(model, optimizer)
    assert step(1, 1000.0)
    after, state_after = snapshot(model, optimizer)
    assert all(map(torch.equal, params, after))
    for old, new in zip(state, state_after, strict=not first):
        assert old.keys() == new.keys()
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)
    # And the step after it is the one an optimizer makes that never saw the withheld one.
    assert not step(2, 0.01)
    backward(twin, 2, None, 0.01)
    GradientClipper(NORM, twin.named_parameters(), fresh).clip()
    fresh.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-7)


def test_a_scaler_s_own_overflow_in_the_first_step_leaves_no_unwritten_momentum():
    model, optimizer, clipper = start("momentum", config("fold"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    clipper.attach(optimizer)
    backward(model, 0, scaler, 1e30)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**119
    assert all(s.get("momentum_buffer") is None for s in optimizer.state.values())


def test_a_bound_is_noticed_within_ten_steps_and_nothing_moves_until_then():
    for policy, bad, error in (
        (SkipNonfinite(max_consecutive=2), torch.inf, NonFiniteError),
        (SkipLarge(limit=1.0, max_consecutive=2, fallback="raise"), 9.0, SkipLimitError),
    ):
        clip = config("auto", [policy])
        model, optimizer, clipper = start("adamw", clip, kernel="accelerator")
        before = flat(model)
        for step in range(10):
            for p in model.parameters():
                p.grad = torch.full_like(p, bad if step < 4 else 1e-3)
            if step == 9:
                with pytest.raises(error, match="within the last 10 steps"):
                    clipper.clip()
                continue
            clipper.clip()
            optimizer.step()
        assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    ("policy", "optimizer", "words"),
    [
        (NORM, lambda p: AdamW(p), "wasn't built with fused=True"),
        (NORM, lambda p: torch.optim.RMSprop(p), "RMSprop wasn't built with fused=True, or can't"),
        (NORM, lambda _: None, "has no optimizer of torch's"),
        (AGC(), lambda p: AdamW(p, fused=True), "policy 'agc' asks for more than one"),
        (ClipByValue(clip_value=1.0), lambda p: AdamW(p, fused=True), "policy 'value'"),
        (
            ClipByNorm(max_norm=1.0, scope="parameter"),
            lambda p: AdamW(p, fused=True),
            "policy 'norm' asks for more than one coefficient",
        ),
    ],
)
def test_what_can_t_be_folded_is_refused(policy, optimizer, words):
    model = small_model()
    with pytest.raises(ConfigError, match=words):
        GradientClipper(
            config("fold", [policy]), model.named_parameters(), optimizer(model.parameters())
        )


def test_an_optimizer_that_steps_more_than_is_clipped_is_refused():
    model = small_model()
    optimizer = AdamW(model.parameters(), fused=True)
    clipper = GradientClipper(config("fold"), model.named_parameters(), optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "fused": False})
    with pytest.raises(ConfigError, match="fused"):
        clipper.clip()


@pytest.mark.parametrize("apply", ["fold", "auto"])
def test_a_whole_step_with_withholding_is_free_of_syncs_on_a_fake_accelerator(apply):
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, 4, device="cuda")) for _ in range(3)]
        optimizer = AdamW(params, fused=True)
        policies = [SkipNonfinite(max_consecutive=3), ZClip(), NORM]
        clipper = GradientClipper(config(apply, policies), optimizer=optimizer)
        clipper.attach(optimizer)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert clipper.last_record.skipped.device.type == "cuda"
