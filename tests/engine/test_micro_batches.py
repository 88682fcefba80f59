"""`stage: after_backward`: each backward's own contribution is clipped before it joins the sum."""

import copy
import json
import logging
import weakref
from functools import partial

import pytest
import torch
from support.gradients import POLICIES
from support.micro_batches import LIMIT, Program, config_of
from torch.amp.grad_scaler import GradScaler

from gradclip import (
    ClipByNorm,
    ClipByValue,
    ClipConfig,
    ConfigError,
    GradientClipper,
    NonFiniteError,
    SkipLarge,
    SkipNonfinite,
    SkipSpike,
    ZClip,
)

INF = float("inf")
NAN = float("nan")
WINDOW = 4


def norm(grads):
    return float(sum(g.double().square().sum() for g in grads).sqrt())


def held(grads, limit=LIMIT):
    factor = min(1.0, limit / (norm(grads) + 1e-6))
    return [g * factor for g in grads]


def mean(contributions, count):
    return [sum(parts) / count for parts in zip(*contributions, strict=True)]


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
def test_each_contribution_is_held_to_the_limit_by_itself(kernel):
    program = Program(config_of(ClipByNorm(max_norm=LIMIT)), kernel=kernel)
    sizes = [1.0, 0.01, 40.0, 1.0]
    alone = [program.alone(seed, size) for seed, size in enumerate(sizes)]
    program.window(range(WINDOW), sizes)
    record = program.clipper.clip()
    wanted = mean(map(held, alone), WINDOW)
    torch.testing.assert_close(program.grads, wanted, rtol=1e-5, atol=1e-8)
    norms = list(map(norm, alone))
    assert min(norms) < LIMIT < max(norms)
    assert float(record.grad_norm) == pytest.approx(max(norms), rel=1e-5)
    assert float(record.coef) == pytest.approx(LIMIT / max(norms), rel=1e-4)
    assert float(record.clipped_norm) == pytest.approx(norm(wanted), rel=1e-5)
    assert float(record.limit) == LIMIT
    flags = (record.clipped, record.finite, record.skipped, record.dropped)
    assert list(map(float, flags)) == [1, 1, 0, 0]
    assert "clip/dropped" in record.as_metrics()
    counts = program.clipper.state_dict()["counts"]
    assert (counts["steps"], counts["clipped"], counts["taken"]) == (1, 1, 1)


def train(config, make, micro, steps=5, window=1):
    program = Program(config, make)
    for step in range(steps):
        seeds = range(step * window, (step + 1) * window)
        if micro:
            program.step(seeds)
            continue
        program.optimizer.zero_grad()
        for seed in seeds:
            (program.loss(seed) / window).backward()
        program.clipper.clip()
        program.optimizer.step()
    return program


def test_without_a_limit_training_is_as_at_stage_step():
    policy, make = ClipByNorm(max_norm=INF), torch.optim.AdamW
    for window in (1, 4):
        one = train(ClipConfig(policies=[policy]), make, micro=False, window=window)
        other = train(config_of(policy), make, micro=True, window=window)
        tolerance = {"rtol": 0, "atol": 0} if window == 1 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(one.params, other.params, **tolerance)


def test_a_window_of_one_clips_as_stage_step_does():
    policies = [ZClip(warmup_steps=2), ClipByNorm(max_norm=LIMIT)]
    one = train(ClipConfig(policies=policies), torch.optim.SGD, micro=False)
    other = train(config_of(*policies), torch.optim.SGD, micro=True)
    assert all(map(torch.equal, one.params, other.params))
    assert one.clipper.last_record.coef < 1


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_micro_batch_that_is_not_finite_is_left_out_and_named(kernel, caplog, subtests):
    for bad in (0, 2, 3):  # before there is a sum, in the middle, and last
        caplog.clear()
        with subtests.test(f"micro-batch {bad}"), caplog.at_level(logging.WARNING, "gradclip"):
            sizes = [NAN if index == bad else 1.0 for index in range(WINDOW)]
            program = Program(config_of(ClipByNorm(max_norm=LIMIT)), kernel=kernel)
            alone = [held(program.alone(s)) for s in range(WINDOW) if s != bad]
            record = program.step(range(WINDOW), sizes)
            torch.testing.assert_close(program.grads, mean(alone, WINDOW), rtol=1e-5, atol=1e-8)
            assert record.dropped == 1
            assert not record.finite
            assert not record.skipped
            counts = program.clipper.state_dict()["counts"]
            assert (counts["nonfinite"], counts["skipped"], counts["taken"]) == (1, 0, 1)
            assert all(p.isfinite().all() for p in program.params)
            if kernel == "cpu":
                [said] = caplog.messages
                assert f"1 of 4 micro-batches of a step were left out: number {bad + 1}" in said
                assert "0.weight" in said


@pytest.mark.parametrize(
    ("kernel", "fused"),
    [
        ("cpu", False),  # the host drops the sum
        ("accelerator", False),  # the same, after a read
        ("accelerator", True),  # by a flag that the step reads
    ],
)
def test_a_step_without_any_micro_batch_left_is_withheld(kernel, fused):
    config = config_of(SkipLarge(limit=1e3), ClipByNorm(max_norm=LIMIT))
    program = Program(config, partial(torch.optim.AdamW, fused=fused), kernel=kernel)
    program.step(range(2))
    before = program.params
    state = copy.deepcopy(program.optimizer.state_dict()["state"])
    record = program.step(range(2), [NAN, 1e9])
    assert record.skipped
    assert record.dropped == 2
    assert all(map(torch.equal, before, program.params))
    after = program.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, state, rtol=0, atol=0)
    program.step(range(2))
    assert not all(map(torch.equal, before, program.params))
    assert program.clipper.state_dict()["counts"]["taken"] == 2


def test_what_a_policy_withholds_is_left_out(caplog):
    program = Program(config_of(SkipLarge(limit=1e3)))
    alone = program.alone(1)
    program.step(range(2), [1e9, 1.0])
    torch.testing.assert_close(program.grads, mean([alone], 2), rtol=1e-6, atol=1e-9)
    assert "number 1 (a policy withholds it)" in caplog.text


def test_raise_names_the_micro_batch_and_keeps_the_sum_of_those_before():
    program = Program(config_of(ClipByNorm(max_norm=LIMIT), on_nonfinite="raise"))
    program.window(range(2))
    before = [g.clone() for g in program.grads]
    with pytest.raises(NonFiniteError, match=r"micro-batch 3 .* in 0\.weight"):
        program.window([2], [NAN])
    assert all(map(torch.equal, before, program.grads))
    program.window([3])
    program.clipper.clip()
    assert all(g.isfinite().all() for g in program.grads)


def test_a_backward_that_fails_leaves_the_sum():
    program = Program(config_of(ClipByNorm(max_norm=LIMIT)))
    program.window([0])
    before = [g.clone() for g in program.grads]
    handle = program.model[0].weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program.window([1])
    handle.remove()
    assert all(map(torch.equal, before, program.grads))
    program.window([1])
    assert program.clipper.clip().dropped == 0


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_adaptive_state_takes_each_micro_batch_as_one_sample(kernel):
    program = Program(config_of(ZClip(warmup_steps=6, max_norm=None)), kernel=kernel)
    norms = []
    for step in range(3):
        sizes = [1.0, NAN, 1.0, 1.0]
        norms += [norm(program.alone(10 * step + s)) for s in (0, 2, 3)]
        program.step(range(10 * step, 10 * step + 4), sizes)
    state = program.clipper.state_dict()["policies"][0]["state"]
    assert state["seen"] == 9
    lean = ZClip(warmup_steps=6, max_norm=None)
    weight = torch.nn.Parameter(torch.zeros(1))
    reference = GradientClipper(lean, [("w", weight)])
    for value in norms:
        weight.grad = torch.full((1,), value)
        reference.clip()
    for name, value in reference.state_dict()["policies"][0]["state"].items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-8)


def test_every_policy_ends_alike_on_both_kernels(subtests):
    for name, policy in POLICIES.items():
        if getattr(policy, "exclude", None):
            policy = policy.model_copy(update={"exclude": ["0.*"]})
        with subtests.test(name):
            ends = []
            for kernel in ("cpu", "accelerator"):
                program = Program(config_of(policy), torch.optim.AdamW, kernel=kernel)
                for step in range(3):
                    sizes = [1.0, NAN if step == 1 else 30.0, 2.0]
                    program.step(range(step * 3, step * 3 + 3), sizes)
                assert all(p.isfinite().all() for p in program.params)
                ends.append((program.params, program.clipper.state_dict()["counts"]))
            (params, counts), (others, other_counts) = ends
            torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)
            assert counts == other_counts


def test_elements_are_clamped_as_those_of_the_undivided_gradient():
    program = Program(config_of(ClipByValue(clip_value=0.01)))
    alone = [[g.clamp(-0.01, 0.01) for g in program.alone(seed)] for seed in range(WINDOW)]
    program.window(range(WINDOW))
    record = program.clipper.clip()
    torch.testing.assert_close(program.grads, mean(alone, WINDOW), rtol=1e-5, atol=1e-9)
    assert float(record.clipped_norm) == pytest.approx(norm(program.grads), rel=1e-6)


@pytest.mark.parametrize(("fused", "attached"), [(False, False), (True, True)])
def test_a_scaler_changes_nothing_and_still_backs_off(fused, attached):
    ends = []
    for scale in (1.0, 2.0**16):
        scaler = GradScaler("cpu", init_scale=scale)
        config = config_of(ZClip(warmup_steps=4), ClipByNorm(max_norm=LIMIT), on_nonfinite="raise")
        program = Program(config, partial(torch.optim.SGD, fused=fused), scaler=scaler)
        if attached:
            program.clipper.attach(program.optimizer)
        for step in range(4):
            program.optimizer.zero_grad()
            bad = step == 2
            before = program.params
            program.window(range(step * 2, step * 2 + 2), [1.0, INF if bad else 3.0])
            if not attached:
                program.clipper.clip()
            scaler.step(program.optimizer)
            scaler.update()
            assert bool(program.clipper.last_record.skipped) is bad
            if bad:
                assert scaler.get_scale() == scale / 2
                assert all(map(torch.equal, before, program.params))
        ends.append(program)
    torch.testing.assert_close(*(program.params for program in ends), rtol=1e-5, atol=1e-7)
    saved = ends[0].clipper.state_dict()
    assert saved["policies"][0]["state"]["seen"] == 7  # 8 without the overflow
    assert saved["counts"]["skipped"] == 1


def test_a_window_whose_gradients_were_zeroed_is_forgotten():
    program = Program(config_of(ClipByNorm(max_norm=LIMIT)))
    program.window(range(2), [1e6, NAN])
    record = program.step(range(2))
    assert record.dropped == 0
    assert float(record.grad_norm) < 1e3


def test_a_policy_watches_the_loss_of_each_micro_batch():
    config = config_of(SkipSpike(watch="loss", window=6, warmup_steps=3, z_threshold=4.0))
    program = Program(config)
    program.optimizer.param_groups[0]["lr"] = 0.0
    program.step(range(4))
    assert program.step(range(2), [1.0, 100.0]).dropped == 1


def test_an_attached_clipper_ends_the_step_by_itself():
    program = Program(config_of(ClipByNorm(max_norm=LIMIT)), torch.optim.AdamW)
    program.clipper.attach(program.optimizer)
    program.window(range(WINDOW), [1.0, NAN, 1.0, 1.0])
    program.optimizer.step()
    assert program.clipper.last_record.dropped == 1
    program.optimizer.zero_grad()
    program.optimizer.step()  # without a backward: a step like any other


def test_sparse_and_complex_gradients_join_the_sum():
    embed = torch.nn.Embedding(8, 3, sparse=True)
    wave = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    named = [("embed", embed.weight), ("wave", wave)]
    clipper = GradientClipper(config_of(ClipByNorm(max_norm=INF)), named)
    for rows in ([0, 1], [1, 2], [5, 5]):
        with clipper.micro_batch():
            (embed(torch.tensor(rows)).sum() + wave.abs().sum()).backward()
    record = clipper.clip()
    counted = embed.weight.grad.to_dense()[:, 0]
    assert counted.tolist() == [1, 2, 1, 0, 0, 2, 0, 0]
    whole = [embed.weight.grad.to_dense(), torch.view_as_real(wave.grad)]
    assert float(record.clipped_norm) == pytest.approx(norm(whole), rel=1e-6)


def test_a_bound_on_withheld_micro_batches_stops_the_run():
    program = Program(config_of(SkipNonfinite(max_consecutive=2)))
    program.window([0])
    with pytest.raises(NonFiniteError, match="max_consecutive 2"):
        program.window([1, 2, 3], [NAN, NAN, NAN])


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_logs_and_the_flight_record_are_of_the_worst_micro_batch(kernel, tmp_path):
    path = tmp_path / "run.jsonl"
    log = {"per_parameter": True, "every_n_steps": 1}
    recorder = {"file": str(path)}
    config = config_of(ClipByNorm(max_norm=LIMIT), log=log, recorder=recorder)
    program = Program(config, kernel=kernel)
    alone = [program.alone(seed, size) for seed, size in enumerate([1.0, 9.0])]
    program.step(range(2), [1.0, 9.0])
    metrics = program.clipper.flush()
    assert metrics["clip/grad_norm"] == pytest.approx(max(map(norm, alone)), rel=1e-5)
    largest = max(norm([grads[0]]) for grads in alone)
    assert metrics["clip/grad_norms/0.weight"] == pytest.approx(largest, rel=1e-5)
    assert metrics["clip/dropped"] == 0
    for _ in range(2):
        program.step(range(3), [1.0, NAN, NAN])
    metrics = program.clipper.flush()
    assert metrics["clip/dropped"] == 4
    assert metrics["clip/nonfinite"] == 2
    assert metrics["clip/skipped"] == 0
    program.clipper.recorder.write()
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["finite"] for row in rows] == [True, False, False]
    assert rows[0]["per_parameter"]["0.weight"] == pytest.approx(largest, rel=1e-5)


def test_nothing_keeps_a_clipper_that_nobody_uses():
    for debug in (False, True):
        program = Program(config_of(ClipByNorm(max_norm=LIMIT), debug=debug))
        program.step(range(2))
        gone = weakref.ref(program.clipper)
        program.clipper = None
        assert gone() is None, f"{debug=}"


def test_what_would_not_be_clipped_rightly_is_refused(subtests):
    def program(make=torch.optim.SGD, **options):
        return Program(config_of(ClipByNorm(max_norm=LIMIT), **options), make)

    def inside(call):
        clipper = program().clipper
        with clipper.micro_batch():
            call(clipper)

    def closure():
        of = program(torch.optim.LBFGS)
        of.clipper.attach(of.optimizer)
        of.optimizer.step(lambda: of.loss(0))

    def backward_outside():
        of = program()
        of.loss(0).backward()
        of.clipper.clip()

    fused, at_step = partial(torch.optim.AdamW, fused=True), Program(ClipByNorm(max_norm=LIMIT))
    for words, call in (
        ("made outside of micro_batch", backward_outside),
        ("scaler=scaler", lambda: program().clipper.clip(grad_scale=torch.ones(()))),
        (r"micro_batch\(loss=loss\)", lambda: program().clipper.clip(loss=1.0)),
        ("evaluates a closure", lambda: program().clipper.clip(repeat=True)),
        ("evaluates a closure", closure),
        ("share is 0.0", lambda: program().clipper.micro_batch(share=0.0).__enter__()),
        ("open already", lambda: inside(lambda clipper: clipper.micro_batch().__enter__())),
        ("a micro_batch is open", lambda: inside(GradientClipper.clip)),
        ("stage is 'step'", lambda: at_step.clipper.micro_batch().__enter__()),
        ("is 'after_backward', which clips before", lambda: program(fused, apply="fold")),
    ):
        with subtests.test(words), pytest.raises(ConfigError, match=words):
            call()
