"""Two optimizers, stepped by hand: each with its own limits, state and parameters."""

import pytest
import torch
from support.lit import After, Before, Small, inputs, norm_of, trainer_of
from torch import nn

from gradclip import ConfigError, ZClip
from lightning_clip import GradientClip

ZCLIP = ZClip(warmup_steps=5, max_norm=None)


def run(policy, batches, module):
    clip, before = GradientClip(policy), Before()
    after = After(clip)
    trainer_of(before, clip, after).fit(module, batches)
    return clip, before, after


def counts(clip, index):
    return {name: int(n) for name, n in clip.clippers[index].state_dict()["counts"].items()}


class Gan(Small):
    """Two optimizers, stepped by hand; the generator every second batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        maker, critic = self.optimizers()
        rows = inputs(batch)
        with self.toggled_optimizer(critic):
            self.manual_backward(self.loss(self.generator(rows).detach()) * 30)
            critic.step()
            critic.zero_grad()
        if batch_idx % 2:
            with self.toggled_optimizer(maker):
                self.manual_backward(-self.loss(self.generator(rows)))
                maker.step()
                maker.zero_grad()

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters()),
            torch.optim.SGD(self.net.parameters(), lr=1e-3),
        ]


def test_manual_optimisation_keeps_one_limit_per_optimizer():
    clip, before, after = run(ZCLIP, range(20), Gan())
    maker, critic = clip.clippers
    assert counts(clip, 0)["steps"] == 10
    assert counts(clip, 1)["steps"] == 20
    assert clip.last_record is after.records[-1]
    # With each optimizer's own norms, a clipper of its own comes to the same limits.
    own = {0: [], 1: []}
    for grads, record in zip(before.grads, after.records, strict=True):
        own[0 if len(grads) == 2 else 1].append((grads, float(record.limit)))
    for index, clipper in enumerate((maker, critic)):
        params = [nn.Parameter(torch.zeros_like(g)) for g in own[index][0][0]]
        alone = type(clipper)(ZCLIP, [(str(i), p) for i, p in enumerate(params)])
        for grads, limit in own[index]:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            assert float(alone.clip().limit) == limit
        assert min(limit for _, limit in own[index]) < float("inf")


class TogglesByHand(Gan):
    def training_step(self, batch, _):
        maker, critic = self.optimizers()
        rows = inputs(batch)
        for optimizer, sign in ((critic, 1), (maker, -1)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * 30 * self.loss(self.generator(rows)))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Untoggled(Gan):
    """One backward gives both gradients; only one of them is stepped on each batch."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(30 * self.loss(self.generator(inputs(batch))))
        self.optimizers()[batch_idx % 2].step()


class Others(Before):
    """Around the clipper: what the other optimizer's parameters and gradients were."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_before_optimizer_step(self, trainer, _module, optimizer):
        [other] = [opt for opt in trainer.optimizers if opt is not optimizer]
        held = [p for group in other.param_groups for p in group["params"]]
        self.kept.append([t.detach().clone() for p in held for t in (p, p.grad) if t is not None])


@pytest.mark.parametrize("module", [Gan, TogglesByHand, Untoggled])
def test_a_step_changes_only_its_own_gradients_and_parameters(module):
    before, clip, after = (
        Others(),
        GradientClip({"policies": [{"type": "norm", "max_norm": 0.1}]}),
        Others(),
    )
    trainer_of(before, clip, after).fit(module(), range(6))
    assert counts(clip, 0)["clipped"] > 0
    assert counts(clip, 1)["clipped"] > 0
    for first, second in zip(before.kept, after.kept, strict=True):
        assert all(map(torch.equal, first, second))


BY_NAME = {
    "policies": [{"type": "norm", "max_norm": 0.2}],
    "groups": [
        {"match": "generator.*", "policies": [{"type": "norm", "max_norm": 0.05}]},
        {"optimizer": "SGD", "policies": [{"type": "norm", "max_norm": 0.1}]},
    ],
}


def test_limits_by_name_and_by_kind_of_optimizer():
    clip, before, after = run(BY_NAME, range(6), TogglesByHand())
    for grads, left in zip(before.grads, after.grads, strict=True):
        limit = 0.05 if len(grads) == 2 else 0.1
        assert norm_of(grads) > limit
        assert norm_of(left) == pytest.approx(limit, rel=1e-4)
    assert counts(clip, 0)["steps"] == counts(clip, 1)["steps"] == 6


def test_a_group_that_matches_in_no_optimizer_is_an_error():
    wrong = BY_NAME | {"groups": [*BY_NAME["groups"], {"match": "generatr.*", "policies": []}]}
    with pytest.raises(ConfigError, match=r"groups\[2\]\.match is 'generatr\.\*' and matches no"):
        trainer_of(GradientClip(wrong)).fit(Gan(), [0])


def test_a_withheld_step_of_one_leaves_the_other_running():
    class Poisoned(TogglesByHand):
        def loss(self, rows):
            bad = self.trainer.global_step == 5  # the generator's third step
            return super().loss(rows) * (float("nan") if bad else 1.0)

    clip, _, after = run(ZCLIP, range(6), Poisoned())
    assert [counts(clip, index)["skipped"] for index in (0, 1)] == [1, 0]
    for now, then in zip(after.parameters[2], after.parameters[1], strict=True):
        assert torch.equal(now, then) == (now.shape in {(4, 4), (4,)})
