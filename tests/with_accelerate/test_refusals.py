"""What can't be clipped rightly is refused by name, and leaves everything as it was."""

import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from support.prepared import batch, grads_of, net, norm_of, prepared

import accelerate_clip
from gradclip import (
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GroupConfig,
    LayoutError,
    ZClip,
)


def test_groups_need_the_model_before_its_optimizer():
    accelerator = Accelerator(cpu=True)
    groups = [GroupConfig(match="2.*", policies=[])]
    config = ClipConfig(policies=[ClipByNorm(max_norm=9.0)], groups=groups)
    accelerate_clip.enable(accelerator, config)
    with pytest.raises(ConfigError, match="prepare the model before its optimizer"):
        accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))


def test_foreign_parameters_are_refused():
    accelerator, _, _, _ = prepared(ClipByNorm(max_norm=1.0))
    message = "got 4 parameters, none of which belongs to one of the 1 optimizers prepared"
    with pytest.raises(ConfigError, match=message):
        accelerator.clip_grad_norm_(net().parameters(), 1.0)
    with pytest.raises(ConfigError, match=r"accelerator\.clip_grad_value_ got 4 parameters"):
        accelerator.clip_grad_value_(net().parameters(), 1.0)


def test_a_call_that_asks_for_nothing_is_accelerates_own():
    """An iterator that was used up, or a frozen model: the step is clipped all the same."""
    for steps_first in (False, True):
        accelerator, clip, model, optimizer = prepared(ClipByNorm(max_norm=0.1))
        used_up = filter(lambda p: p.requires_grad, model.parameters())
        list(used_up)
        frozen = net().requires_grad_(requires_grad=False)
        if not steps_first:
            accelerator.backward(model(batch(0)).square().mean())
        for parameters in (used_up, [], frozen.parameters()):
            norm = accelerator.clip_grad_norm_(parameters, 1.0)
            assert (norm.shape, float(norm)) == ((), 0.0)
            accelerator.clip_grad_value_(parameters, 1.0)
        assert clip.last_record is None
        if not steps_first:
            optimizer.step()
            assert norm_of(grads_of(model)) == pytest.approx(0.1, rel=1e-5)


def test_enabling_twice_is_refused():
    accelerator, _, _, _ = prepared(ZClip())
    with pytest.raises(ConfigError, match="clipping is enabled on this Accelerator already"):
        accelerate_clip.enable(accelerator, ZClip())


def test_a_wrong_policy_is_refused_before_anything_is_changed():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"policies\[0\]\.max_norm"):
        accelerate_clip.enable(accelerator, {"policies": [{"type": "norm", "max_norm": -1.0}]})
    assert accelerator.clip_grad_norm_.__func__ is Accelerator.clip_grad_norm_
    accelerate_clip.enable(accelerator, ClipByNorm(max_norm=1.0))


def test_a_refused_optimizer_leaves_the_others_without_hooks():
    accelerator = Accelerator(cpu=True)
    model = net()
    good = torch.optim.SGD(model.parameters(), 0.1)
    bad = torch.optim.SGD(model.parameters(), 0.1, differentiable=True)
    model, good, bad = accelerator.prepare(model, good, bad)
    with pytest.raises(ConfigError, match="differentiable"):
        accelerate_clip.enable(accelerator, ClipByNorm(max_norm=0.3))
    accelerator.backward(model(batch()).square().mean())
    raw = grads_of(model)
    good.step()
    assert all(map(torch.equal, raw, grads_of(model)))


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        (DistributedType.MEGATRON_LM, "Let Megatron-LM clip"),
        (DistributedType.XLA, "Run without accelerate_clip"),
    ],
)
def test_frameworks_that_step_by_themselves_are_refused(kind, way_out):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(LayoutError, match=f"supported: one process, DDP, .*, DeepSpeed. {way_out}"):
        accelerate_clip.enable(accelerator, ZClip())


def test_lomo_is_refused():
    accelerator = Accelerator(cpu=True)
    accelerate_clip.enable(accelerator, ZClip())
    accelerator.has_lomo_optimizer = True
    with pytest.raises(ConfigError, match="update parameters during backward"):
        accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))


def test_processes_that_do_not_join_are_told(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    accelerator = Accelerator(cpu=False)
    caplog.set_level(logging.WARNING)
    accelerate_clip.enable(accelerator, ZClip())
    assert "2 processes were started, but Accelerate joins none" in caplog.text
