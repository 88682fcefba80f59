"""Windows of accumulation that end early: Lightning divides their loss by the full count."""

import pytest
import torch
from support.lit import NOTHING, After, Before, Small, trainer_of

from gradclip import ClipByNorm, ZClip
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")

FULL = 3.0
ZCLIP = ZClip(warmup_steps=3, max_norm=None)


class Steady(Small):
    """A whole window's gradient has the norm FULL, whatever the weights; batches say how large."""

    def __init__(self):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch, _):
        count = sum(p.numel() for p in self.parameters())
        size = FULL / count**0.5 * batch
        return None if batch == NOTHING else sum(p.sum() for p in self.parameters()) * size


def run(policy, batches, **options):
    clip, before = GradientClip(policy), Before()
    after = After(clip)
    options = {"accumulate_grad_batches": 3, "max_epochs": 6} | options
    trainer_of(before, clip, after, **options).fit(Steady(), batches)
    return clip, before, after


def state_of(clip):
    return clip.clippers[0].state_dict()["policies"][0]["state"]


@pytest.mark.parametrize("short", [[1] * 2, [1, NOTHING, 1]], ids=["short", "a batch without loss"])
def test_a_short_window_does_not_pull_the_statistics(short):
    clip, before, _ = run(ZCLIP, [1] * 3 + short)
    whole, _, _ = run(ZCLIP, [1] * 6)
    assert before.norms == pytest.approx([FULL, FULL * 2 / 3] * 6, rel=1e-5)
    found, want = state_of(clip), state_of(whole)
    assert found["seen"] == want["seen"] == 12
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=1e-6)


def test_a_spike_in_a_short_window_is_held_to_its_part_of_the_limit():
    whole, _, spiked = run(ZCLIP, [1] * 18 + [100] * 3, max_epochs=1)
    short, before, held = run(ZCLIP, [1] * 18 + [100] * 2, max_epochs=1)
    assert before.norms[-1] == pytest.approx(200 * FULL / 3, rel=1e-5)
    assert bool(held.records[-1].clipped)
    assert float(held.records[-1].limit) == pytest.approx(spiked.limits[-1] * 2 / 3, rel=1e-4)
    assert held.norms[-1] == pytest.approx(spiked.norms[-1] * 2 / 3, rel=1e-4)
    assert short.clippers[0].state_dict()["counts"] == whole.clippers[0].state_dict()["counts"]


def test_a_fixed_limit_is_of_the_gradient_as_it_is():
    _, before, after = run(ClipByNorm(max_norm=1.0), [1] * 5)
    assert before.norms == pytest.approx([FULL, FULL * 2 / 3] * 6, rel=1e-5)
    assert after.norms == pytest.approx([1.0] * 12, rel=1e-5)
    assert after.limits == [1.0] * 12
    norms = [float(record.grad_norm) for record in after.records]
    assert norms == pytest.approx(before.norms, rel=1e-6)
