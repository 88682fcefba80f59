"""StochasticWeightAveraging, whose last epoch runs without a backward for batch norm's sake."""

import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging
from support.lit import Small, trainer_of
from torch import nn

from lightning_clip import GradientClip


class Normed(Small):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8))

    def train_dataloader(self):
        return range(10)


@pytest.mark.parametrize("debug", [False, True])
def test_an_epoch_without_backward_is_no_step(debug):
    clip = GradientClip({"policies": [{"type": "norm", "max_norm": 0.5}], "debug": debug})
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer_of(clip, averaging, max_epochs=4).fit(Normed())
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 40
