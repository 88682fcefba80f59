"""Two models that train each other: each optimizer with its own limit, state and unscaling."""

import pytest
import torch
from accelerate import Accelerator
from support.accelerate_cpu import with_scaler
from support.prepared import batch, grads_of, net, norm_of
from torch import nn

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, ConfigError, GroupConfig, LogConfig, ZClip

# Accelerate replaces the optimizer's step while a scaler is on, and silences this itself.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like .optimizer.step.* has been overridden")


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = net(0), net(1)


def only(match, max_norm):
    return GroupConfig(match=match, policies=[ClipByNorm(max_norm=max_norm)])


def clipped_norms(config, make, optimizers=(torch.optim.SGD, torch.optim.SGD), accelerator=None):
    """Norms that two optimizers step with, each after a backward of its own."""
    accelerator = accelerator or Accelerator(cpu=True)
    clip = accelerate_clip.enable(accelerator, config)
    models, parts = make()
    opts = [kind(part.parameters(), lr=0.1) for kind, part in zip(optimizers, parts, strict=True)]
    *_, first, second = accelerator.prepare(*models, *opts)
    norms = []
    for part, opt in zip(parts, (first, second), strict=True):
        accelerator.backward(part(batch(size=8) * 9).float().square().mean())
        opt.step()
        norms.append(norm_of(grads_of(part)))
        opt.zero_grad()
    assert clip.steps == [1, 1]
    return norms


def one_module():
    pair = Pair()
    return [pair], [pair.generator, pair.critic]


def two_modules():
    models = [net(0), net(1)]
    return models, models


MAIN = [ClipByNorm(max_norm=9.0)]


@pytest.mark.parametrize(
    ("make", "first", "second", "accelerator"),
    [
        (one_module, "generator.*", "critic.*", None),
        (two_modules, "model0.*", "model1.*", with_scaler),
    ],
)
def test_a_group_for_each_optimizer(make, first, second, accelerator):
    config = ClipConfig(policies=MAIN, groups=[only(first, 0.5), only(second, 0.25)])
    accelerator = accelerator and accelerator()
    norms = clipped_norms(config, make, accelerator=accelerator)
    assert norms == pytest.approx([0.5, 0.25], rel=1e-4)


def test_a_group_for_the_class_of_one_optimizer():
    own = GroupConfig(optimizer="Adam*", policies=[ClipByNorm(max_norm=0.25)])
    config = ClipConfig(policies=[ClipByNorm(max_norm=0.5)], groups=[own])
    norms = clipped_norms(config, two_modules, (torch.optim.SGD, torch.optim.AdamW))
    assert norms == pytest.approx([0.5, 0.25], rel=1e-4)


@pytest.mark.parametrize("match", ["critc.*", "model7.*"])
def test_a_group_of_no_optimizer_is_refused(match):
    config = ClipConfig(policies=MAIN, groups=[only("generator.*", 0.5), only(match, 0.2)])
    make = one_module if match != "model7.*" else two_modules
    with pytest.raises(ConfigError, match="matches no parameter; nearest names"):
        clipped_norms(config, make)


def test_state_and_measurements_are_each_optimizers_own():
    accelerator = Accelerator(cpu=True)
    config = ClipConfig(policies=[ZClip(warmup_steps=2)], log=LogConfig(per_parameter=True))
    clip = accelerate_clip.enable(accelerator, config)
    pair = Pair()
    opts = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (pair.generator, pair.critic)]
    _, first, second = accelerator.prepare(pair, *opts)
    for step in range(4):
        accelerator.backward(pair.critic(batch(step)).square().mean())
        second.step()
        # The generator's backward fills the critic's gradients too, which it doesn't step.
        accelerator.backward(pair.critic(pair.generator(batch(step)) * batch(1)).square().mean())
        left = grads_of(pair.critic)
        if step % 2:
            first.step()
        assert all(map(torch.equal, left, grads_of(pair.critic)))
        first.zero_grad()
        second.zero_grad()
    assert clip.steps == [2, 4]
    names = [set(clipper.last_record.per_parameter) for clipper in clip.clippers]
    assert all(name.startswith("generator.") for name in names[0])
    assert all(name.startswith("critic.") for name in names[1])


@pytest.mark.parametrize("fused", [False, True], ids=["ordinary", "fused"])
def test_one_backward_of_two_losses_is_unscaled_once_for_each(fused):
    """Accelerate's step of the first makes the scaler forget that the second's was unscaled."""
    accelerator = with_scaler()
    accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.3))
    models = [net(0), net(1)]
    opts = [torch.optim.SGD(m.parameters(), lr=0.1, fused=fused) for m in models]
    *models, first, second = accelerator.prepare(*models, *opts)
    for step in range(2):
        accelerator.backward(sum(m(batch(step) * 4).float().square().mean() for m in models))
        scaled = [norm_of(grads_of(m)) for m in models]
        norms = []
        for index, model in enumerate(models):
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.3)))
            assert norms[index] == pytest.approx(scaled[index] / 1024, rel=1e-5)
            others = [norm_of(grads_of(m)) for m in models[index + 1 :]]
            assert others == scaled[index + 1 :]
        for opt in (first, second):
            opt.step()
            assert not accelerator.optimizer_step_was_skipped
        for model in models:
            assert norm_of(grads_of(model)) == pytest.approx(0.3, rel=1e-4)
        first.zero_grad()
        second.zero_grad()
    assert accelerator.scaler.get_scale() == 1024.0


def test_an_update_of_the_scale_waits_for_no_longer_than_the_next_backward():
    """Also where an optimizer that was clipped never steps."""
    accelerator = with_scaler()
    accelerator.scaler.set_growth_interval(1)
    clip = accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.3))
    models = [net(0), net(1)]
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    *models, first, second = accelerator.prepare(*models, *opts)

    def losses():
        return sum(m(batch() * 4).float().square().mean() for m in models)

    def clip_both_step_first():
        for model in models:
            accelerator.clip_grad_norm_(model.parameters(), 0.3)
        first.step()
        first.zero_grad()
        second.zero_grad()
        return accelerator.scaler.get_scale()

    accelerator.backward(losses())
    assert clip_both_step_first() == 1024
    accelerator.backward(losses())
    assert accelerator.scaler.get_scale() == 2048
    assert clip_both_step_first() == 2048
    accelerator.scaler.scale(losses()).backward()  # by the script itself
    first.step()
    assert norm_of(grads_of(models[0])) == pytest.approx(0.3, rel=1e-4)
    assert clip.steps == [3, 0]
    clip.detach()
    assert accelerator.scaler.get_scale() == 8192
    assert "update" not in vars(accelerator.scaler)
