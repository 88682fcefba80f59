"""Policies that watch the loss see it as `training_step` gave it."""

import pytest
import torch
from support.lit import After, Pair, Small, scaled, trainer_of

from gradclip import ConfigError, SkipSpike
from lightning_clip import GradientClip

POLICY = SkipSpike(window=8, watch="loss", warmup_steps=4)


class Told(Small):
    """Its loss is 1 at first, and what `spikes` says at some batches; gradients stay small."""

    def __init__(self, spikes=None, **options):
        super().__init__(**options)
        self.spikes = spikes or {}

    def training_step(self, batch, _):
        size = self.spikes.get(batch, 1.0 + 0.01 * (batch % 3))
        loss = self.loss(self.share(torch.ones(2, 4)))
        return loss * 1e-3 + (size - loss.detach() * 1e-3)


def run(module, batches, **options):
    clip = GradientClip(POLICY)
    after = After(clip)
    trainer_of(clip, after, **options).fit(module, batches)
    return clip, after


def losses(clip, count):
    return clip.clippers[0].state_dict()["policies"][0]["state"]["losses"][-count:, 0].tolist()


def test_a_spike_of_the_loss_is_withheld():
    clip, after = run(Told({9: 50.0, 12: float("inf")}), range(16))
    assert [bool(record.skipped) for record in after.records] == [i in (9, 12) for i in range(16)]
    for batch in (9, 12):
        assert all(map(torch.equal, after.parameters[batch - 1], after.parameters[batch]))
    assert not all(map(torch.equal, after.parameters[10], after.parameters[11]))
    assert clip.clippers[0].state_dict()["counts"]["taken"] == 14


@pytest.mark.parametrize("batches", [4, 3], ids=["whole", "one batch short"])
def test_micro_batches_are_averaged(batches):
    clip, _ = run(Told({0: 1.0, 1: 3.0, 2: 5.0, 3: 7.0}), range(batches), accumulate_grad_batches=2)
    assert losses(clip, 2) == pytest.approx([2.0, 6.0 if batches == 4 else 5.0])


def test_the_factor_of_a_scaler_is_taken_out():
    plugin = scaled(1024.0, growth_interval=2)
    clip, _ = run(Told({i: 1.0 + i for i in range(6)}), range(6), plugins=[plugin])
    assert plugin.scaler.get_scale() > 1024.0
    assert losses(clip, 6) == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


class Skipping(Told):
    """A batch in the middle of a step gives no loss, so that a scaler leaves the step out."""

    def training_step(self, batch, index):
        return None if batch == 1 else super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_losses_of_a_step_that_never_came_are_forgotten():
    plugin = scaled(1024.0)
    module = Skipping({0: 100.0, 2: 1.0, 3: 2.0})
    clip, _ = run(module, range(4), plugins=[plugin], accumulate_grad_batches=2)
    assert losses(clip, 2) == pytest.approx([0.0, 1.5])


def test_several_optimizers_are_refused():
    with pytest.raises(ConfigError, match=r"which of 2 optimizers it is for.* Set watch to 'norm'"):
        trainer_of(GradientClip(POLICY)).fit(Pair(), [0])
