"""Saved in the Trainer's checkpoint, and restored as if nothing had happened."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder
from support.lit import After, Pair, Small, inputs, trainer_of
from support.malformed import REFUSED, answer, malformed

from gradclip import ClipByNorm, ConfigError, SkipSpike, ZClip
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


class At(Callback):
    """Does something at the start of the second epoch."""

    def __init__(self, do):
        self.do = do

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.do(trainer, pl_module)


def in_mid_fit(do, clip, module, epochs=3, after=False):
    callbacks = [clip, At(do)] if after else [At(do), clip]
    trainer = trainer_of(*callbacks, max_epochs=epochs)
    trainer.fit(module, range(10))
    return trainer


def test_a_search_for_a_learning_rate_in_mid_fit_leaves_no_stale_state(tmp_path):
    """It saves a checkpoint, trains, and loads the checkpoint."""

    class Finder(LearningRateFinder):
        def on_fit_start(self, *_):
            pass

    finder = Finder(num_training_steps=4, update_attr=False)
    clip, module = GradientClip(POLICY), Small()
    module.lr = 0.01
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=module.lr)
    module.train_dataloader = lambda: range(10)
    at = At(finder.lr_find)
    trainer = trainer_of(at, clip, max_epochs=3, default_root_dir=tmp_path)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["GradientClip"]
    assert steps_of(clip) == 30
    assert repr(saved) == repr(clip.state_dict())
    assert (saved["steps"], saved["clippers"][0]["counts"]["steps"]) == ([30], 30)


def test_state_loaded_in_mid_fit_is_gone_on_from_at_once():
    """A rollback: everything after is as after the state that was loaded."""
    earlier = GradientClip(POLICY)
    trainer_of(earlier).fit(Small(), range(4))
    saved, seen = earlier.state_dict(), []

    def roll_back(trainer, module):
        clip.load_state_dict(saved)
        seen.append(repr(clip.state_dict()) == repr(saved))

    clip = GradientClip(POLICY)
    in_mid_fit(roll_back, clip, Small())
    assert seen == [True]
    assert steps_of(clip) == 4 + 20
    assert clip.state_dict()["steps"] == [24]
    clip = GradientClip(POLICY, restore=False)
    in_mid_fit(lambda *_: clip.load_state_dict(saved), clip, Small())
    assert steps_of(clip) == 30


def test_a_malformed_state_is_refused_in_mid_fit_and_changes_nothing():
    """In none of two optimizers."""
    found = {}

    def load(trainer, module):
        before = repr(clip.state_dict())
        for where, state in malformed(clip.state_dict()):
            found[where] = answer(clip.load_state_dict, state)
        for state in (None, [], 3, torch.nn.Identity()):
            assert answer(clip.load_state_dict, state).startswith("ConfigError: GradientClip.load")
        assert repr(clip.state_dict()) == before

    clip = GradientClip(POLICY)
    in_mid_fit(load, clip, Pair())
    top = {": list", ": none", ": object", ": module"}  # what isn't a mapping at all
    for where, said in found.items():
        if where not in top:
            assert said.startswith((REFUSED, "ConfigError: The saved clip state")), (where, said)
            assert said.endswith("restore=False)."), said
    assert len(found) > 200
    assert steps_of(clip) == 30


class Halves(Small):
    """Its first half is frozen at first; two optimizers, or one, as told."""

    def __init__(self, count=1):
        super().__init__()
        self.count = count
        self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        halves = [list(self.net[0].parameters()), list(self.net[2].parameters())]
        free = [[p for p in half if p.requires_grad] for half in halves]
        if self.count == 1:
            free = [free[0] + free[1]]
        else:
            self.automatic_optimization = False
        return [torch.optim.AdamW(own, lr=0.01) for own in free if own]

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return super().training_step(batch, index)
        return Pair.training_step(self, batch, index)


SLOTS = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")


def seen_by_name(clip):
    found = {}
    for clipper in clip.clippers:
        entry = clipper.state_dict()["policies"][0]
        found |= dict(zip(entry["slots"], entry["state"]["seen"].tolist(), strict=True))
    return found


@pytest.mark.parametrize("after", [False, True], ids=["before the clipper", "after it"])
@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_optimizers_made_anew_in_mid_fit_go_on_by_name(count, restore, after):
    """As after unfreezing: with more parameters, and with one optimizer in place of another."""

    def unfreeze(trainer, module):
        module.net[0].requires_grad_(True)
        module.count = count
        trainer.strategy.setup_optimizers(trainer)

    clip = GradientClip(ZClip(scope="parameter", warmup_steps=3), restore=restore)
    in_mid_fit(unfreeze, clip, Halves(), after=after)
    assert len(clip.clippers) == count
    assert seen_by_name(clip) == dict(zip(SLOTS, (20, 20, 30, 30), strict=True))
    # The clipper that shares no parameter with an earlier one begins to count.
    assert clip.state_dict()["steps"] == ([30] if count == 1 else [20, 30])


def test_a_rollback_finds_the_clipper_of_the_optimizer_that_was_just_made_anew():
    """To a state of fewer parameters, beside an optimizer that has as many."""
    policy = ZClip(scope="parameter", warmup_steps=3)
    earlier = GradientClip(policy)
    trainer_of(earlier).fit(Halves(), range(4))
    saved = earlier.state_dict()

    def roll_back(trainer, module):
        module.net[0].requires_grad_(False)
        trainer.strategy.setup_optimizers(trainer)
        clip.load_state_dict(saved)
        assert repr(clip.state_dict()) == repr(saved)

    module, clip = Halves(), GradientClip(policy)
    module.net[0].requires_grad_(True)
    in_mid_fit(roll_back, clip, module)
    assert seen_by_name(clip) == dict.fromkeys(SLOTS[2:], 24)


def test_optimizers_made_anew_with_fewer_parameters_go_on_by_name():
    def freeze(trainer, module):
        module.net[0].requires_grad_(False)
        trainer.strategy.setup_optimizers(trainer)

    module = Halves()
    module.net[0].requires_grad_(True)
    clip = GradientClip(ZClip(scope="parameter", warmup_steps=3))
    in_mid_fit(freeze, clip, module)
    assert seen_by_name(clip) == dict.fromkeys(SLOTS[2:], 30)


@pytest.mark.parametrize("late", [False, True])
def test_a_raw_step_of_an_optimizer_made_anew_is_noticed_at_once(late):
    class Raw(Small):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            if late and (self.trainer.current_epoch, index) == (1, 0):
                self.trainer.strategy.setup_optimizers(self.trainer)
            self.at = self.trainer.current_epoch, index
            loss = self.loss(inputs(batch))
            self.manual_backward(loss) if late else loss.backward()
            anew = self.trainer.current_epoch == 1
            self.optimizers(use_pl_optimizer=not anew).step()

    clip, module = GradientClip(POLICY), Raw()
    with pytest.raises(ConfigError, match="makes a step without"):
        in_mid_fit(lambda t, _: late or t.strategy.setup_optimizers(t), clip, module)
    assert module.at == (1, 0)


def test_an_optimizer_made_anew_after_the_clipper_s_hook_finds_the_loss():
    class Late(Callback):
        def on_train_batch_start(self, trainer, *given):
            if (trainer.current_epoch, given[-1]) == (1, 3):
                trainer.strategy.setup_optimizers(trainer)

    clip = GradientClip(SkipSpike(watch="loss", window=8))
    trainer_of(clip, Late(), max_epochs=2).fit(Small(), range(10))
    assert steps_of(clip) == 20


def test_a_second_fit_after_unfreezing_goes_on_by_name():
    clip, module = GradientClip(ZClip(scope="parameter", warmup_steps=3)), Halves()
    trainer_of(clip).fit(module, range(10))
    module.net[0].requires_grad_(True)
    trainer_of(clip).fit(module, range(5))
    assert seen_by_name(clip) == dict(zip(SLOTS, (5, 5, 15, 15), strict=True))
    assert clip.state_dict()["steps"] == [15]
