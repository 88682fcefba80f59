"""A fused optimizer's step multiplies gradients by the coefficient, and withholds itself."""

import copy
from functools import partial

import pytest
import torch
from support.gradients import small_model
from support.program import Program
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

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
    "adam": partial(Adam, lr=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "amsgrad": partial(AdamW, lr=0.01, amsgrad=True),
    "sgd": partial(SGD, lr=0.01, weight_decay=0.1),
    "momentum": partial(SGD, lr=0.01, momentum=0.9, dampening=0.1),
    "nesterov": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "adagrad": partial(Adagrad, lr=0.01),
}
READS_FACTORS = hasattr(
    Adagrad([torch.nn.Parameter(torch.zeros(1))], fused=True), "_step_supports_amp_scaling"
)
EVERY = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "adagrad" and not READS_FACTORS,
            reason="this torch's fused Adagrad reads no factor",
        ),
    )
    for name in OPTIMIZERS
]
NORM = ClipByNorm(max_norm=0.3)


def config(apply, *policies, **options):
    return ClipConfig(policies=list(policies) or [NORM], apply=apply, **options)


def start(name, clip, *, fused=True, **options):
    return Program(clip, partial(OPTIMIZERS[name], fused=fused), **options)


def train(name, apply, scale=None, call="called", told=True, steps=50):
    """Where training ends and the norms on the way, of steps most of which are clipped."""
    program = start(name, config(apply), scale=scale, call=call, told=told)
    norms = []
    for seed in range(steps):
        norms.append(program.step(seed, 50).grad_norm)
        assert not hasattr(program.optimizer, "grad_scale")
        assert not hasattr(program.optimizer, "found_inf")
    assert program.counts["clipped"] > steps / 2
    return program.weights, torch.stack(norms)


# apply, loss scale, how the script clips, whether the clipper knows the scaler
WAYS = [
    ("fold", None, "called", True),  # clip() leaves the factor for the step that follows
    ("fold", 2.0**16, "called", True),  # the scaler multiplies its factor into ours
]
MORE_WAYS = [  # which only the hooks around the step tell apart, whatever the optimizer
    ("fold", None, "attached", True),  # the step's own hook sets the factor
    ("auto", None, "attached", True),  # nobody sees gradients in between, so this folds too
    ("fold", 2.0**16, "attached", True),  # ours is set around the scaler's step
    ("fold", 2.0**16, "attached", False),  # the scaler's is found on the optimizer
    ("in_place", 2.0**16, "called", True),  # gradients are unscaled before
    ("in_place", 2.0**16, "attached", False),  # and here after they are clipped
]


@pytest.mark.parametrize("name", EVERY)
def test_fifty_folded_steps_end_where_steps_scaled_in_place_end(name, subtests):
    wanted, norms = train(name, "in_place")
    for way in [*WAYS, *(MORE_WAYS if name in ("adamw", "momentum") else [])]:
        with subtests.test(str(way)):
            found, also = train(name, *way)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(also, norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_folding_leaves_gradients_scaled_and_unclipped_until_the_step(scale):
    program = start("adamw", config("fold"), scale=scale)
    program.backward(0, size=50)
    before = program.grads
    record = program.clipper.clip()
    assert all(map(torch.equal, program.grads, before))
    norm = torch.cat([g.reshape(-1) for g in before]).norm() / (scale or 1.0)
    assert float(record.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert float(record.clipped_norm) == pytest.approx(0.3, rel=1e-5)
    if scale is None:
        program.optimizer.step()
        left = torch.cat([g.reshape(-1) for g in program.grads]).norm()
        assert float(left) == pytest.approx(0.3, rel=1e-5)


def test_gradients_of_a_step_withheld_on_the_device_stay_as_they_are():
    program = start("adamw", config("auto", SkipLarge(limit=1.0), NORM), kernel="accelerator")
    program.backward(0, size=1000)
    before = program.grads
    assert program.clipper.clip().skipped
    assert all(map(torch.equal, program.grads, before))


def test_a_factor_that_no_step_used_is_taken_back_by_the_next_clip():
    results = []
    for stale in (True, False):
        program = start("sgd", config("fold", on_nonfinite="ignore"))
        if stale:
            program.backward(0, size=1000)
            assert program.clipper.clip().clipped
        program.fill(1e-3)
        assert not program.finish().clipped
        results.append(program.weights)
    assert torch.equal(*results)


@pytest.mark.parametrize("scale", [None, 2.0**16])
@pytest.mark.parametrize("apply", ["auto", "fold"])
def test_nothing_is_left_of_a_step_that_raised(apply, scale):
    """As where memory ran out in it, and the loop goes on with the next batch."""
    program = start("sgd", config(apply), scale=scale, call="attached")
    program.step(0, 1000)
    raises = program.optimizer.register_step_pre_hook(run_out_of_memory)
    with pytest.raises(MemoryError):
        program.step(1, 1000)
    raises.remove()
    before = program.weights
    record = program.step(2, 1000)
    moved = (program.weights - before).norm()
    assert record.clipped
    assert float(record.grad_norm) > 100
    # Learning rate 0.01, limit 0.3, and weight decay beside it.
    assert float(moved) < 0.01 * (0.3 + 0.1 * float(before.norm())) * 1.01


def run_out_of_memory(*_):
    raise MemoryError


def test_at_or_below_the_limit_a_folded_step_is_bitwise_the_unclipped_one():
    clipped, plain = (start("adamw", config("fold")) for _ in range(2))
    for program in (clipped, plain):
        program.fill(1e-3)
    clipped.finish()
    plain.optimizer.step()
    assert torch.equal(clipped.weights, plain.weights)


# How steps are withheld, fused optimizer, in the first step, how the script clips, loss scale.
WITHHELD = [
    # By a flag in the fused step. SGD has no momentum to keep in its first: all of these.
    ("fold", True, True, "called", None),
    ("fold", True, True, "called", 1024.0),
    ("fold", True, True, "attached", None),
    ("fold", True, True, "attached", 1024.0),
    ("fold", True, False, "called", 1024.0),
    ("fold", True, False, "attached", None),
    # By the same flag, on a device whose values the host doesn't read.
    ("device", True, True, "called", 1024.0),
    ("device", True, True, "attached", None),
    ("device", True, False, "called", None),
    ("device", True, False, "attached", 1024.0),
    # By dropping gradients on the host, where a scaler's step still has to cope without any.
    ("in_place", True, True, "called", None),
    ("in_place", True, False, "attached", 1024.0),
    ("in_place", False, True, "attached", 1024.0),
    ("in_place", False, False, "called", None),
    # A device, and an optimizer that takes no flag: the host reads and drops them.
    ("device", False, True, "called", 1024.0),
    ("device", False, False, "attached", None),
]


@pytest.mark.parametrize("name", EVERY)
def test_a_withheld_step_changes_no_bit_and_the_next_is_as_if_it_never_was(name, subtests):
    for way in WITHHELD:
        with subtests.test(str(way)):
            withhold_one(name, *way)


def withhold_one(name, apply, fused, first, call, scale):
    on_device = apply == "device"
    clip = config("auto" if on_device else apply, SkipLarge(limit=1.0), NORM)
    kernel = "accelerator" if on_device else None
    program = start(name, clip, fused=fused, call=call, scale=scale, kernel=kernel)
    twin = start(name, NORM, fused=fused)  # never sees the step that is withheld
    if not first:
        assert not program.step(0, 0.01).skipped
        twin.model.load_state_dict(program.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(program.optimizer.state_dict()))
    weights = program.weights
    state = copy.deepcopy(program.optimizer.state_dict()["state"])
    assert program.step(1, 1000.0).skipped
    assert torch.equal(program.weights, weights)
    after = program.optimizer.state_dict()["state"]
    for old, new in zip(state.values(), after.values(), strict=not first):
        assert old.keys() == new.keys()
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)
    assert not program.step(2, 0.01).skipped
    twin.step(2, 0.01)
    torch.testing.assert_close(program.weights, twin.weights, rtol=1e-6, atol=1e-7)


def test_a_scalers_own_overflow_in_the_first_step_leaves_no_unwritten_momentum():
    program = start("momentum", config("fold"), call="attached", scale=2.0**120, told=False)
    program.step(0, 1e30)
    assert program.scaler.get_scale() == 2.0**119
    assert all(s.get("momentum_buffer") is None for s in program.optimizer.state.values())


@pytest.mark.parametrize(
    ("policy", "bad", "error"),
    [
        (SkipNonfinite(max_consecutive=2), torch.inf, NonFiniteError),
        (SkipLarge(limit=1.0, max_consecutive=2, fallback="raise"), 9.0, SkipLimitError),
    ],
)
def test_a_bound_reached_on_a_device_raises_within_ten_steps_and_withholds_until_then(
    policy, bad, error
):
    program = start("adamw", config("auto", policy), kernel="accelerator")
    before = program.weights
    for step in range(9):
        program.fill(bad if step < 4 else 1e-3)
        program.finish()
    with pytest.raises(error, match="within the last 10 steps"):
        program.clipper.clip()
    assert torch.equal(program.weights, before)


def test_what_one_factor_in_the_step_cannot_do_is_refused(subtests):
    fused = partial(AdamW, fused=True)
    by_parameter = ClipByNorm(max_norm=1.0, scope="parameter")
    for policy, make, words in (
        (NORM, AdamW, "wasn't built with fused=True"),
        (NORM, RMSprop, "RMSprop wasn't built with fused=True, or can't"),
        (NORM, lambda _: None, "has no optimizer of torch's"),
        (AGC(), fused, "policy 'agc' asks for more than one"),
        (ClipByValue(clip_value=1.0), fused, "policy 'value'"),
        (by_parameter, fused, "policy 'norm' asks for more than one coefficient"),
    ):
        model = small_model()
        optimizer = make(model.parameters())
        with subtests.test(words), pytest.raises(ConfigError, match=words):
            GradientClipper(config("fold", policy), model.named_parameters(), optimizer)


def test_an_optimizer_that_steps_more_than_is_clipped_is_refused():
    program = start("adamw", config("fold"))
    more = [torch.nn.Parameter(torch.ones(2))]
    program.optimizer.add_param_group({"params": more, "fused": False})
    with pytest.raises(ConfigError, match="fused"):
        program.clipper.clip()


@pytest.mark.parametrize("apply", ["fold", "auto"])
def test_a_whole_step_with_withholding_is_free_of_syncs_on_a_fake_accelerator(apply):
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, 4, device="cuda")) for _ in range(3)]
        optimizer = AdamW(params, fused=True)
        policies = [SkipNonfinite(max_consecutive=3), ZClip(), NORM]
        clipper = GradientClipper(config(apply, *policies), optimizer=optimizer)
        clipper.attach(optimizer)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert clipper.last_record.skipped.device.type == "cuda"
