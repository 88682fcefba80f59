"""What Lightning shows at the hook, and what the callback makes of it."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from support.lit import (
    NAN,
    NOTHING,
    After,
    Before,
    Small,
    grads_of,
    inputs,
    norm_of,
    small_net,
    trainer_of,
)
from support.sam import Sam
from torch import nn

from gradclip import ClipByNorm, ClipConfig, GradientClipper, NonFiniteError, ZClip
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")

ZCLIP = ZClip(warmup_steps=5, max_norm=None)


def run(policy, batches, module=None, **options):
    clip, before = GradientClip(policy), Before()
    after = After(clip)
    module = module or Small()
    trainer_of(before, clip, after, **options).fit(module, batches)
    return clip, before, after


def counts(clip, index=0):
    return {name: int(n) for name, n in clip.clippers[index].state_dict()["counts"].items()}


def test_every_way_to_write_a_policy(tmp_path):
    path = tmp_path / "norm.yaml"
    path.write_text("policies: [{type: norm, max_norm: 0.5}]")
    norm = ClipByNorm(max_norm=0.5)
    mapping = {"policies": [{"type": "norm", "max_norm": 0.5}]}
    ways = [norm, [norm], ClipConfig(policies=[norm]), mapping, path, str(path)]
    for way in ways:
        clip, _, after = run(way, [0])
        assert clip.config == ClipConfig(policies=[norm])
        assert after.norms == pytest.approx([0.5], rel=1e-5)
    assert GradientClip(norm).clippers == []
    assert GradientClip(norm).last_record is None


class Noting(Small):
    """Writes down the order of hooks, and the gradient norm each one sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, where):
        self.seen.append((where, norm_of(p.grad for p in self.parameters())))

    def on_before_optimizer_step(self, _):
        self.note("module hook")

    def configure_gradient_clipping(self, *_, **__):
        self.note("configure_gradient_clipping")


class Watch(Before):
    def on_before_optimizer_step(self, _trainer, pl_module, _optimizer):
        pl_module.note("callback hook")


def test_lightning_shows_averaged_gradients_to_callbacks_first():
    module = Noting()
    clip = GradientClip(ClipByNorm(max_norm=0.5))
    trainer_of(Watch(), clip, accumulate_grad_batches=2).fit(module, [0, 1])

    alone = Small()
    (sum(alone.loss(inputs(seed)) for seed in (0, 1)) / 2).backward()
    whole = norm_of(p.grad for p in alone.parameters())
    assert whole > 0.5
    assert [where for where, _ in module.seen] == [
        "callback hook",
        "module hook",
        "configure_gradient_clipping",
    ]
    assert [norm for _, norm in module.seen] == pytest.approx([whole, 0.5, 0.5], rel=1e-5)


def test_accumulation_clips_once_per_optimizer_step():
    clip, before, after = run(ClipByNorm(max_norm=0.1), range(10), accumulate_grad_batches=4)
    assert len(before.grads) == 3
    assert counts(clip) == {
        "steps": 3,
        "clipped": 3,
        "skipped": 0,
        "nonfinite": 0,
        "taken": 3,
    }
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert norm > 0.1
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("hole", [NOTHING, NAN])
def test_a_batch_without_usable_gradients_leaves_no_trace(hole):
    clip, _, after = run(ZCLIP, [*range(9), hole, *range(9, 20)])
    plain, _, expected = run(ZCLIP, range(20))
    assert after.limits[:9] + after.limits[10:] == expected.limits
    assert min(expected.limits) < float("inf")
    for got, want in zip(after.parameters[-1], expected.parameters[-1], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(after.parameters[8], after.parameters[9], strict=True):
        assert torch.equal(got, want)
    assert counts(clip)["skipped"] == (1 if hole == NAN else 0)
    assert counts(clip)["steps"] == counts(plain)["steps"] + (1 if hole == NAN else 0)


def test_the_schedule_and_global_step_advance_over_a_withheld_step():
    def with_schedule(parameters):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    clip = GradientClip(ZCLIP)
    trainer = trainer_of(clip)
    trainer.fit(Small(with_schedule), [NAN, 0])
    assert trainer.global_step == 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert counts(clip)["skipped"] == 1


def test_on_nonfinite_raise_stops_the_run():
    policy = {"policies": [{"type": "zclip"}], "on_nonfinite": "raise"}
    with pytest.raises(NonFiniteError, match=r"NaN or infinite, on this rank in net\.0\.weight"):
        trainer_of(GradientClip(policy)).fit(Small(), [0, NAN])


class Odd(Small):
    """A frozen layer, one that is never used, and a bias that two layers share."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.bias = self.first.bias
        self.net[0].requires_grad_(False)

    def loss(self, rows):
        return super().loss(self.second(self.first(rows)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_frozen_unused_and_shared_parameters():
    clip, before, after = run(ClipByNorm(max_norm=0.1), range(3), Odd())
    assert len(before.grads[0]) == 5
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=1e-5)
    assert counts(clip)["clipped"] == 3


class Tuned(Small):
    def __init__(self):
        super().__init__()
        self.backbone, self.net = self.net[0], self.net[1:]

    def loss(self, rows):
        return self.net(self.backbone(rows)).square().mean()


def test_parameters_added_during_training_are_clipped():
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    clip, before = GradientClip(ClipByNorm(max_norm=0.1)), Before()
    after = After(clip)
    trainer_of(tuning, before, clip, after, max_epochs=2).fit(Tuned(), range(3))
    assert [len(grads) for grads in before.grads] == [2] * 3 + [4] * 3
    for norm, record, left in zip(before.norms, after.records, after.norms, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert left == pytest.approx(0.1, rel=1e-5)


class NewOptimizer(Small):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


def test_new_optimizers_during_training_go_on_with_the_state():
    clip, before, after = run(ZCLIP, range(10), NewOptimizer(), max_epochs=2)
    assert clip.clippers[0].state_dict()["counts"]["steps"] == 20
    for norm, record in zip(before.norms, after.records, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert max(after.limits[10:]) < float("inf")
    assert norm_of(grads_of(clip._optimizers[0])) == after.norms[-1]


class ByHand(Small):
    """Closures of one's own, as manual optimisation hands them to LBFGS."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(inputs(batch))
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.05, max_iter=3, tolerance_change=0.0)


@pytest.mark.parametrize(("optimizer", "times"), [(lbfgs, 3), (Sam, 2)])
def test_a_step_is_one_however_often_it_evaluates_its_closure(optimizer, times):
    clip, before, after = run(ZCLIP, range(12), Small(optimizer))
    assert len(before.grads) == 12 * times
    assert counts(clip)["steps"] == 12
    assert clip.clippers[0].state_dict()["policies"][0]["state"]["seen"] == 12
    first = after.records[::times]
    for number in range(1, times):
        again = after.records[number::times]
        assert all(a is b for a, b in zip(again, first, strict=True))
    for norm, record in zip(before.norms[::times], first, strict=True):
        assert float(record.grad_norm) == pytest.approx(norm, rel=1e-6)


def test_lbfgs_steps_as_in_a_plain_loop():
    policy = ClipByNorm(max_norm=0.5)
    _, before, after = run(policy, range(6), Small(lbfgs))
    assert min(before.norms) > 0.5
    assert after.norms == pytest.approx([0.5] * 18, rel=1e-5)
    net = small_net()
    optimizer = lbfgs(net.parameters())
    GradientClipper(policy, net.named_parameters(), optimizer).attach(optimizer)
    for seed in range(6):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = net(inputs(seed)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    for got, want in zip(after.parameters[-1], net.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("module", [Small, ByHand], ids=["automatic", "manual"])
def test_lbfgs_logs_each_step_once(module, tmp_path):
    logger = CSVLogger(tmp_path)
    policy = {"policies": [{"type": "norm", "max_norm": 0.5}], "log": {"every_n_steps": 2}}
    clip = GradientClip(policy)
    trainer_of(clip, logger=logger, log_every_n_steps=1).fit(module(lbfgs), range(6))
    assert counts(clip)["steps"] == 6
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3


class Searched(Small):
    """Notes the norm that reached each step, also of a finder's trials."""

    def __init__(self):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=self.lr))
        self.lr, self.batch_size, self.norms = 1e-3, 1, []

    def train_dataloader(self):
        return torch.utils.data.DataLoader(list(range(12)), batch_size=self.batch_size)

    def training_step(self, batch, _):
        return self.loss(inputs(int(batch[0])))

    def on_train_batch_end(self, *_):
        self.norms.append(norm_of(grads_of(self.trainer.optimizers[0])))


class FindInTheMiddle(LearningRateFinder):
    """As Lightning's own docs search again at milestones."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, module):
        self.lr_find(trainer, module)


SEARCH = {"num_training_steps": 5, "update_attr": False, "early_stop_threshold": None}
FINDERS = {
    "learning rate": lambda: LearningRateFinder(**SEARCH),
    "learning rate, later": lambda: FindInTheMiddle(**SEARCH),
    "batch size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["step", "after_backward"])
def test_the_steps_of_a_finder_are_clipped_and_leave_no_trace(stage, tmp_path, subtests):
    """Finders replace the Trainer's callbacks while they train."""
    config = {"policies": [ZClip(warmup_steps=5, max_norm=0.1)], "stage": stage}
    alone = GradientClip(config)
    trainer_of(alone, max_epochs=1).fit(Searched())
    for name, make in FINDERS.items():
        for finder_first in (False, True):
            with subtests.test(name, finder_first=finder_first):
                clip, module = GradientClip(config), Searched()
                order = [make(), clip] if finder_first else [clip, make()]
                options = {"max_epochs": 1, "default_root_dir": tmp_path}
                trainer = trainer_of(*order, **options)
                trainer.fit(module)
                assert len(module.norms) > counts(clip)["steps"]
                assert max(module.norms) == pytest.approx(0.1, rel=1e-4)
                # Lightning 2.4 trains on where a search in the middle left the data: 7 batches.
                assert counts(clip)["steps"] == trainer.global_step
                if trainer.global_step == counts(alone)["steps"]:
                    assert counts(clip) == counts(alone)
                assert "on_train_start" not in vars(module)


@pytest.mark.filterwarnings("ignore")
def test_a_tuner_by_itself_clips_too(tmp_path):
    clip, module = GradientClip(ClipByNorm(0.1)), Searched()
    trainer = trainer_of(clip, max_epochs=1, default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, num_training=5, update_attr=False, early_stop_threshold=None)
    assert len(module.norms) == 5
    assert max(module.norms) == pytest.approx(0.1, rel=1e-4)
    assert clip.state_dict() == {}
    trainer.fit(module)
    assert counts(clip)["steps"] == 12
