"""Saved in the Trainer's checkpoint, and restored as if nothing had happened."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from support.lit import After, Pair, Small, trainer_of

from gradclip import ClipByNorm, ConfigError, ZClip
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)

POLICY = ZClip(warmup_steps=10, max_norm=None)


def run(steps, *, policy=POLICY, ckpt_path=None, module=None, others=(), **options):
    clip = GradientClip(policy, restore=options.pop("restore", True))
    after = After(clip)
    trainer = trainer_of(clip, after, *others, max_steps=steps, max_epochs=-1, **options)
    trainer.fit(module or Small(by_step=True), range(100), ckpt_path=ckpt_path, weights_only=True)
    return trainer, clip, after


@pytest.mark.parametrize("saved_at", [4, 30])  # during and after warm-up
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(saved_at, tmp_path):
    _, whole, expected = run(saved_at + 50)
    trainer, _, _ = run(saved_at)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    _, resumed, after = run(saved_at + 50, ckpt_path=tmp_path / "at.ckpt")

    assert len(after.limits) == 50
    assert len(set(expected.limits)) > 30
    assert after.limits == expected.limits[saved_at:]
    for got, want in zip(after.parameters, expected.parameters[saved_at:], strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert repr(resumed.state_dict()) == repr(whole.state_dict())


def test_the_checkpoint_loads_with_weights_only(tmp_path):
    trainer, clip, _ = run(12)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)["callbacks"]["GradientClip"]
    assert saved["steps"] == [12]
    assert repr(saved) == repr(clip.state_dict())


def test_a_second_fit_goes_on_and_another_module_starts_fresh():
    clip = GradientClip(POLICY)
    module = Small()
    trainer_of(clip).fit(module, range(12))
    before = clip.clippers[0]
    trainer_of(clip).fit(module, range(12, 15))
    assert clip.clippers[0] is not before
    state = clip.clippers[0].state_dict()
    assert state["counts"]["steps"] == 15
    assert state["policies"][0]["state"]["mean"] > 0
    trainer_of(clip).fit(Small(), range(3))
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 3


def test_state_is_kept_until_training_starts():
    clip = GradientClip(POLICY)
    trainer_of(clip).fit(Small(), range(12))
    saved = clip.state_dict()
    other = GradientClip(POLICY)
    assert other.state_dict() == {}
    other.load_state_dict(saved)
    assert repr(other.state_dict()) == repr(saved)


def test_a_change_of_policy_is_refused_with_the_way_out(tmp_path):
    trainer, _, _ = run(3)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    norm = ClipByNorm(max_norm=1.0)
    with pytest.raises(ConfigError, match=r"\['zclip'\].*\['norm'\].*restore=False"):
        run(6, policy=norm, ckpt_path=tmp_path / "at.ckpt")
    _, clip, _ = run(6, policy=norm, ckpt_path=tmp_path / "at.ckpt", restore=False)
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 3


def test_another_number_of_optimizers_is_refused(tmp_path):
    _, clip, _ = run(6, module=Pair())
    saved = clip.state_dict()
    assert len(saved["clippers"]) == 2
    other = GradientClip(POLICY)
    other.load_state_dict(saved)
    with pytest.raises(ConfigError, match=r"is of 2 optimizers, this run has 1.*restore=False"):
        trainer_of(other).fit(Small(), range(3))


class Tuned(Small):
    def __init__(self):
        super().__init__(by_step=True)
        self.backbone, self.net = self.net[0], self.net[1:]

    def loss(self, rows):
        return self.net(self.backbone(rows)).square().mean()


def test_parameters_that_another_callback_adds_on_resume_find_their_state(tmp_path):
    policy = ZClip(warmup_steps=5, max_norm=None, scope="parameter")

    def tune(steps, **options):
        tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        return run(steps, policy=policy, module=Tuned(), others=[tuning], **options)

    trainer, clip, _ = tune(120)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    # The clipper comes first in the list, so its on_fit_start runs before the other's.
    _, resumed, _ = tune(130, ckpt_path=tmp_path / "at.ckpt")
    before = clip.state_dict()["clippers"][0]["policies"][0]
    after = resumed.state_dict()["clippers"][0]["policies"][0]
    assert after["slots"] == before["slots"]
    assert len(after["slots"]) == 4
    # Lightning 2.6 adds the backbone to the optimizer again, but leaves it frozen: no gradients.
    assert after["state"]["seen"].tolist() == [130, 130, 20, 20]
    assert torch.equal(after["state"]["mean"][2:], before["state"]["mean"][2:])


def steps_of(clip):
    return clip.clippers[0].state_dict()["counts"]["steps"]


def test_state_loaded_to_validate_or_by_a_fit_without_a_step_is_no_start_for_others(tmp_path):
    class Validates(Small):
        def val_dataloader(self):
            return [0]

        def validation_step(self, *_):
            return None

    saved = tmp_path / "at.ckpt"
    done, _, _ = run(10)
    done.save_checkpoint(saved)
    clip, module = GradientClip(POLICY), Validates()
    options = {"ckpt_path": saved, "weights_only": True}
    trainer_of(clip).validate(module, verbose=False, **options)
    trainer_of(clip, limit_val_batches=0).fit(module, range(3))
    assert steps_of(clip) == 3
    trainer_of(clip).validate(module, verbose=False, **options)
    trainer_of(clip).fit(Small(), range(4))
    assert steps_of(clip) == 4

    clip, module = GradientClip(POLICY), Small()
    trainer_of(clip, max_steps=10, max_epochs=-1).fit(module, range(100), **options)
    trainer_of(clip).fit(module, range(2))  # the same module goes on
    assert steps_of(clip) == 12
    clip = GradientClip(POLICY)
    trainer_of(clip, max_steps=10, max_epochs=-1).fit(Small(), range(100), **options)
    trainer_of(clip).fit(Small(), range(3))
    assert steps_of(clip) == 3
    clip.load_state_dict(done.callbacks[0].state_dict())  # by hand: it is what the next fit gets
    trainer_of(clip).fit(Small(), range(3))
    assert steps_of(clip) == 13
