"""The demo's data: the same in every run, cut alike for any number of processes, 3 % spoilt."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from text import CORRUPTED_LOSS_SCALE, HeldOutSamples, Text, TrainingSamples, is_corrupted  # noqa: E402


def test_three_of_every_hundred_steps_are_corrupted():
    spoilt = [step for step in range(1000) if is_corrupted(step)]
    assert spoilt == [step for step in range(1000) if is_corrupted(step)]
    for start in range(0, 1000, 100):
        assert sum(start <= step < start + 100 for step in spoilt) == 3
    assert len({step % 100 for step in spoilt}) > 3


def batches(steps=100, batch_size=4):
    return list(DataLoader(TrainingSamples(Text(), steps, batch_size, 32), batch_size=batch_size))


def test_corruption_is_in_the_batches_and_the_same_each_time():
    once, again = batches(), batches()
    for first, second in zip(once, again, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
    spoilt = [step for step, (_, _, scale) in enumerate(once) if (scale > 1).all()]
    assert spoilt == [step for step in range(100) if is_corrupted(step)]
    for step, (inputs, target, scale) in enumerate(once):
        continues = (inputs[:, 1:] == target[:, :-1]).float().mean()
        if step in spoilt:
            assert (scale == CORRUPTED_LOSS_SCALE).all()
            assert continues < 0.2
        else:
            assert (scale == 1).all()
            assert continues == 1


def test_held_out_text_is_clean_and_not_trained_on():
    text = Text()
    joined = torch.cat([text.training, text.held_out])
    assert abs(len(text.held_out) / len(joined) - 0.1) < 0.001
    assert len(text.characters) == len(joined.unique())
    for inputs, target, scale in DataLoader(HeldOutSamples(text, 32), batch_size=64):
        assert torch.equal(inputs[:, 1:], target[:, :-1])
        assert (scale == 1).all()
