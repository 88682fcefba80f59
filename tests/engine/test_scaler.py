"""A GradScaler: limits are of unscaled gradients, and an overflow leaves no trace but its count."""

from itertools import product

import pytest
import torch
from support.gradients import small_model
from support.program import Program, fused_adamw, sgd
from torch.amp.grad_scaler import GradScaler, OptState

from gradclip import ClipByNorm, ClipConfig, ConfigError, GradientClipper, ZClip

MAKE = {"ordinary": sgd, "fused": fused_adamw}
CALLS = ("called", "called after unscale_", "attached", "attached after unscale_")
WAYS = [  # optimizer, how the script clips, whether the clipper knows the scaler
    *product(MAKE, CALLS, (True,)),
    *product(MAKE, ("attached",), (False,)),
]
NORM = ClipByNorm(max_norm=0.005)


def start(kind, call, told=True, *, scale=1024.0, clip=NORM):
    return Program(clip, MAKE[kind], call=call, told=told, scale=scale)


def test_norm_limit_and_result_are_the_same_at_every_scale(subtests):
    for way in WAYS:
        with subtests.test(str(way)):
            one, other = (start(*way, scale=scale) for scale in (1.0, 2.0**16))
            for seed in range(10):
                norm, record = one.step(seed).grad_norm, other.step(seed)
                torch.testing.assert_close(record.grad_norm, norm, rtol=1e-5, atol=0)
                assert record.clipped
                assert float(record.clipped_norm) <= 0.005
            torch.testing.assert_close(one.weights, other.weights, rtol=1e-5, atol=1e-6)


def test_an_overflow_is_counted_and_leaves_no_trace(subtests):
    for index, (kind, call) in enumerate(product(MAKE, CALLS)):
        # A known scaler overrules each of them, wherever an overflow is seen.
        rules = ("raise",) if index % 2 else ("skip", "ignore")
        for on_nonfinite in rules:
            with subtests.test(f"{kind}, {call}, {on_nonfinite}"):
                config = ClipConfig(
                    policies=[ZClip(warmup_steps=4), NORM], on_nonfinite=on_nonfinite
                )
                spoiled, clean = (start(kind, call, clip=config) for _ in range(2))
                for seed in range(8):
                    spoiled.step(seed)
                    clean.step(seed)
                    if seed == 4:
                        overflow(spoiled)
                saved, other = (p.clipper.state_dict() for p in (spoiled, clean))
                assert saved["counts"]["nonfinite"] == saved["counts"]["skipped"] == 1
                assert saved["counts"]["taken"] == other["counts"]["taken"] == 8
                found, wanted = (s["policies"][0]["state"] for s in (saved, other))
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def overflow(program):
    """A step with one infinite gradient: it is withheld, and the scale is halved."""
    before, scale = program.weights, program.scaler.get_scale()
    program.optimizer.zero_grad()
    program.backward(99)
    program.model[0].weight.grad[0] = torch.inf
    record = program.finish()
    assert not record.finite
    assert record.skipped
    assert program.scaler.get_scale() == scale / 2
    assert torch.equal(program.weights, before)


@pytest.mark.parametrize("kind", MAKE)
def test_an_overflow_of_a_scaler_that_is_not_known_changes_nothing(kind):
    program = start(kind, "attached", told=False, scale=2.0**120)
    before = program.weights
    program.step(0, 1e30)
    assert torch.equal(program.weights, before)
    assert program.scaler.get_scale() == 2.0**119
    assert all(s["step"] == 0 for s in program.optimizer.state.values())
    program.scaler.load_state_dict({**program.scaler.state_dict(), "scale": 1.0})
    program.step(0)
    assert not torch.equal(program.weights, before)


def test_two_optimizers_share_a_scaler_and_removing_one_leaves_the_other():
    models = [small_model(), small_model()]
    optimizers = [sgd(m.parameters()) for m in models]
    scaler = GradScaler("cpu", init_scale=1024.0)
    clippers, handles = [], []
    for model, optimizer in zip(models, optimizers, strict=True):
        clipper = GradientClipper(NORM, model.named_parameters(), optimizer, scaler=scaler)
        clippers.append(clipper)
        handles.append(clipper.attach(optimizer))

    def step():
        loss = sum(m.zero_grad() or m(torch.ones(8, 4)).square().mean() for m in models)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return [int(c.state_dict()["counts"]["steps"]) for c in clippers]

    assert step() == [1, 1]
    handles[0].remove()
    assert step() == [1, 2]
    handles[1].remove()
    assert step() == [1, 2]
    assert "step" not in vars(scaler)


def test_after_an_overflow_a_step_without_the_scaler_is_clipped():
    program = start("ordinary", "attached")
    overflow(program)
    program.scaler = None
    assert program.step(1, 100.0).clipped
    assert program.counts["steps"] == 2


@pytest.mark.parametrize("apply", ["auto", "fold"])
def test_other_hooks_of_the_optimizer_stand_where_they_like(apply):
    seen = []
    program = Program(ClipConfig(policies=[NORM], apply=apply), fused_adamw)
    program.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    program.clipper.attach(program.optimizer)
    program.optimizer.register_step_pre_hook(lambda *_: seen.append("after"))
    program.backward(0)
    program.optimizer.step()
    assert seen == ["before", "after"]


def test_a_disabled_scaler_is_none():
    model = small_model()
    optimizer = sgd(model.parameters())
    scaler = GradScaler("cpu", enabled=False)
    clipper = GradientClipper(NORM, model.named_parameters(), optimizer, scaler=scaler)
    clipper.attach(optimizer)
    model(torch.ones(8, 4)).square().mean().backward()
    scaler.step(optimizer)
    assert clipper.state_dict()["counts"]["steps"] == 1


def test_a_scaler_needs_an_optimizer():
    with pytest.raises(ConfigError, match="scaler is given with no optimizer"):
        GradientClipper(NORM, small_model().named_parameters(), scaler=GradScaler("cpu"))


def test_torch_s_scaler_still_keeps_its_stages_where_we_read_them():
    scaler = GradScaler("cpu")
    optimizer = sgd([torch.nn.Parameter(torch.ones(2))])
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    states = scaler._per_optimizer_states
    assert states[id(optimizer)]["stage"] is OptState.READY
    scaler.unscale_(optimizer)
    assert states[id(optimizer)]["stage"] is OptState.UNSCALED
