"""`debug: true` in a Trainer: right programs pass, and a fault is an error."""

import pytest
import torch
from support.lit import Pair, Small, inputs, scaled, trainer_of

from gradclip import ClipByNorm, ClipConfig, DebugError, ZClip
from lightning_clip import GradientClip

POLICIES = [ZClip(warmup_steps=3), ClipByNorm(max_norm=0.3)]


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


WAYS = {
    "accumulated": (Small, {}, {"accumulate_grad_batches": 2}),
    "folded in 16-mixed": (lambda: Small(fused), {"apply": "fold"}, {"plugins": scaled}),
    "16-mixed": (Small, {}, {"plugins": scaled}),
    "two optimizers": (Pair, {}, {}),
    "LBFGS": (lambda: Small(torch.optim.LBFGS), {}, {}),
    "micro-batches": (Small, {"stage": "after_backward"}, {"accumulate_grad_batches": 3}),
}


@pytest.mark.parametrize(("module", "config", "options"), WAYS.values(), ids=WAYS.keys())
def test_right_programs_pass_and_end_as_without_it(module, config, options):
    ends = []
    for debug in (False, True):
        given = {k: v(2.0**10) if callable(v) else v for k, v in options.items()}
        clip = GradientClip(ClipConfig(policies=POLICIES, debug=debug, **config))
        made = module()
        trainer_of(clip, **given).fit(made, range(8))
        ends.append([p.detach() for p in made.parameters()])
        assert clip.clippers[0].state_dict()["counts"]["clipped"] > 0
    assert all(map(torch.equal, *ends))


class Twice(Small):
    """Steps once more upon the same gradients."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(inputs(batch)))
        optimizer.step()
        optimizer.step()


def test_a_step_without_a_backward_is_found():
    clip = GradientClip(ClipConfig(policies=POLICIES, debug=True))
    with pytest.raises(DebugError, match="a backward is missing"):
        trainer_of(clip).fit(Twice(), range(2))
