"""Half precision and the gradient scaler."""

import pytest
import torch
from support.lit import NOTHING, After, Before, Small, scaled, trainer_of

from gradclip import ClipByNorm, ZClip
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")


def run(policy, batches, **options):
    clip, before = GradientClip(policy), Before()
    after = After(clip)
    trainer_of(before, clip, after, **options).fit(Small(), batches)
    return clip, before, after


@pytest.mark.parametrize(
    ("precision", "dtype", "rtol"),
    [
        ("32-true", torch.float32, 1e-5),
        ("bf16-mixed", torch.float32, 1e-5),
        ("bf16-true", torch.bfloat16, 4e-3),  # each element is rounded to 8 bits
    ],
)
def test_gradients_are_held_to_the_limit(precision, dtype, rtol):
    _, before, after = run(ClipByNorm(max_norm=0.1), range(3), precision=precision)
    assert {g.dtype for g in before.grads[0]} == {dtype}
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=rtol)


def test_with_a_scaler_norms_are_those_of_the_unscaled_gradients():
    _, before, after = run(ClipByNorm(max_norm=0.1), range(3), plugins=[scaled(1024.0)])
    _, plain, _ = run(ClipByNorm(max_norm=0.1), range(3))
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=1e-5)
    assert before.norms == pytest.approx(plain.norms, rel=0.02)


def test_an_overflow_is_withheld_and_the_scaler_backs_off():
    plugin = scaled(2.0**24)
    clip, _, after = run(ZClip(warmup_steps=3), range(20), plugins=[plugin])
    skipped = [bool(record.skipped) for record in after.records]
    overflows = skipped.index(False)
    assert overflows > 0
    assert plugin.scaler.get_scale() == 2.0 ** (24 - sum(skipped))
    start = Small()
    for got, want in zip(after.parameters[overflows - 1], start.parameters(), strict=True):
        assert torch.equal(got, want)
    state = clip.clippers[0].state_dict()
    assert state["counts"]["skipped"] == sum(skipped)
    assert state["policies"][0]["state"]["seen"] == 20 - sum(skipped)


def test_scaled_gradients_that_lightning_drops_are_not_taken_in():
    # On the second and third micro-batch pairs there is no loss on the last batch, so Lightning
    # neither unscales the first one's gradients nor steps.
    batches = [0, 1, 2, NOTHING, 3, NOTHING, 4, 5]
    clip, _, _ = run(
        ZClip(warmup_steps=3), batches, plugins=[scaled(1024.0)], accumulate_grad_batches=2
    )
    state = clip.clippers[0].state_dict()["policies"][0]["state"]
    assert int(state["seen"]) == 2
    assert float(state["recent"].max()) < 50
