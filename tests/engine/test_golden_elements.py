"""Element policies against recorded runs of the references (`tests/vectors/FORMAT.md`)."""

import pytest
import torch
from support.vectors import cases, checked, load, number, numbers, replay

from gradclip import Spam, SpikeMax


def flat(grads):
    return torch.cat([grad.double().reshape(-1) for grad in grads])


def check_grads(case, step, grads):
    want = number(case["outputs"]["post_norm"][step])
    assert float(flat(grads).norm()) == pytest.approx(want, rel=1e-5)
    for got, want in zip(grads, case["outputs"]["post_grads_at"].get(str(step), []), strict=False):
        want = torch.tensor(numbers(want)).reshape(got.shape)
        largest = float(want.abs().amax())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * largest)


def sum_of_squares(clipper):
    saved = clipper.state_dict()["policies"][0]["elements"]
    return sum(float(own["square"].double().sum()) for own in saved.values())


@pytest.mark.parametrize("kernel", ["cpu", "accelerator", "reference"])
@pytest.mark.parametrize("case", cases("spam_official"))
def test_spam(case, kernel):
    data, given = load("spam_official"), case["params"]
    policy = Spam(
        theta=given["threshold"],
        decay=given["betas"][1],
        warmup_steps=given["grad_accu_steps"],
        reset_every=given["DeltaT"],
        bias_correction=False,
        moment="own",
        floor=0.0,
    )
    seen = clipped = 0
    for step, record, grads, clipper in replay(data, case, policy, kernel=kernel):
        if not checked(case, step, data):
            continue
        check_grads(case, step, grads)
        assert bool(record.clipped) == (case["outputs"]["coef"][step] != 1)
        if step % 20 == 0:
            want = number(case["outputs"]["state"]["v_sum"][step])
            assert sum_of_squares(clipper) == pytest.approx(want, rel=1e-4)
        seen, clipped = seen + 1, clipped + bool(record.clipped)
    assert seen > 100
    assert clipped or given["threshold"] == 5000


CLIPPED_LATER = 153
"""Where the sequence has its first inf, which AdamWClip clamps and takes in and we leave out."""


@pytest.mark.parametrize("case", [c for c in cases("adamwclip") if c.id != "cfg0/clean"])
def test_elementwise_multiple_of_the_rms(case):
    data, given = load("adamwclip"), case["params"]
    policy = Spam(
        theta=given["clip_grad_adapt"] ** 2,
        decay=given["betas"][1],
        warmup_steps=given["clip_grad_warm_up"],
        moment="own",
    )
    seen = clipped = 0
    for step, record, grads, _ in replay(data, case, policy):
        until = case["conformance"]["mode"] == "match_until" and step >= CLIPPED_LATER
        if until or not checked(case, step, data):
            continue
        check_grads(case, step, grads)
        seen, clipped = seen + 1, clipped + bool(record.clipped)
    assert seen > 100
    assert clipped > 10


def test_the_first_gradient_that_adamwclip_clips_to_nothing_is_left_alone():
    data = load("adamwclip")
    case = next(c for c in data["cases"] if c["id"] == "cfg0/clean")
    given = case["params"]
    policy = Spam(theta=given["clip_grad_adapt"] ** 2, decay=given["betas"][1], warmup_steps=1)
    ratios = []
    sequence = data["inputs"]["sequences"]["clean"]["grads"]
    for step, _, grads, _ in replay(data, case, policy):
        before = flat([torch.tensor(numbers(grad)) for grad in sequence[step]]).norm()
        reference = number(case["outputs"]["post_norm"][step]) / float(before)
        ratios.append((reference, float(flat(grads).norm() / before)))
    assert ratios[0][0] < 1e-9
    assert ratios[0][1] == pytest.approx(1.0, rel=1e-6)
    assert sum(reference < 0.5 for reference, _ in ratios) > 20
    assert all(ours > 0.5 for _, ours in ratios[:50])


@pytest.mark.parametrize("name", ["stablespam_port", "stablespam_official"])
def test_largest_elements_of_stable_spam(name):
    """AdaGN, applied after it there, is one factor for each tensor, which is divided out."""
    data = load(name)
    for case in data["cases"]:
        given, outputs = case["params"], case["outputs"]
        policy = SpikeMax(decay=given["theta"])
        seen = clipped = 0
        for step, record, grads, clipper in replay(data, case, policy):
            if not checked(case, step, data):
                continue
            state = clipper.state_dict()["policies"][0]["state"]
            raw = state["mean"] * (1 - state["weight"])
            for i, grad in enumerate(grads):
                mean = number(outputs["state"][f"m_max_{i}"][step])
                assert float(raw[i]) == pytest.approx(mean, rel=1e-4)
                largest = number(outputs["state"][f"after_adaclip_max_{i}"][step])
                if largest is not None:  # the port doesn't show it
                    assert float(grad.abs().max()) == pytest.approx(largest, rel=1e-4)
            for got, want in zip(grads, outputs["post_grads_at"].get(str(step), []), strict=False):
                want = torch.tensor(numbers(want)).double().reshape(got.shape)
                got = got.double() * (want.norm() / got.double().norm())
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            seen, clipped = seen + 1, clipped + bool(record.clipped)
        assert seen > 90, case["id"]
        assert clipped > 30, case["id"]
