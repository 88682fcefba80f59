"""DeepSpeedStrategy: the engine clips inside its step, and the callback tells what it did."""

import functools
import shutil
import tempfile

import pytest
import torch
from lightning.pytorch import Callback
from support.lit import NAN, Small, trainer_of
from support.ranks import run_on_ranks

from gradclip import ConfigError, ZClip
from lightning_clip import GradientClip

pytest.importorskip("deepspeed")

from support.deepspeed_cpu import whole
from support.lit_deepspeed import strategy

POLICY = ZClip(warmup_steps=3, max_norm=None)
STEPS = 14
CASES = {
    "stage 0": (0, "32-true", {}),
    "stage 2": (2, "32-true", {}),
    "stage 3": (3, "32-true", {}),
    "stage 2 offload": (2, "32-true", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "bf16": (2, "bf16-mixed", {}),
    "fp16": (3, "16-mixed", {"fp16": {"enabled": True, "initial_scale_power": 8}}),
}


class Watch(Callback):
    """Stands after the clipper: its record, and what Lightning shows, after each batch."""

    def __init__(self, clip):
        self.clip = clip
        self.records, self.shown, self.parameters = [], [], []

    def on_train_batch_end(self, trainer, *_):
        self.records.append(self.clip.last_record)
        self.shown.append(float(trainer.callback_metrics.get("clip/limit", -1)))
        if engine := getattr(trainer.strategy, "deepspeed_engine", None):
            self.parameters.append(whole(engine))

    @property
    def numbers(self):
        return [r and (float(r.grad_norm), float(r.limit)) for r in self.records]


def trainer_with(world, how, precision="32-true", **options):
    clip = GradientClip(POLICY)
    watch = Watch(clip)
    quiet = {"strategy": how, "devices": world, "precision": precision}
    return trainer_of(clip, watch, **(quiet | options)), clip, watch


def compared(world, stage, precision, more):
    trainer, clip, watch = trainer_with(world, strategy(stage, world, **more), precision)
    trainer.fit(Small(by_step=True), range(STEPS))
    assert trainer.world_size == world
    assert watch.shown == [float(record.limit) for record in watch.records]
    return watch.numbers, watch.parameters[-1], clip.state_dict()["steps"]


def accumulated(world):
    trainer, clip, watch = trainer_with(world, strategy(2, world), accumulate_grad_batches=2)
    trainer.fit(Small(), range(6))
    return [record is None for record in watch.records], clip.state_dict()


def withheld(world):
    """The third batch's loss is NaN."""
    trainer, _, watch = trainer_with(world, strategy(3, world))
    trainer.fit(Small(), [0, 1, NAN, 3])
    same = all(map(torch.equal, *watch.parameters[1:3]))
    return [bool(record.skipped) for record in watch.records], same


def disagreeing(world):
    how = strategy(2, world, gradient_clipping=0.3)
    with pytest.raises(ConfigError, match=r"sets gradient_clipping to 0.3, .*'zclip'"):
        trainer_with(world, how)[0].fit(Small(), range(1))


def resumed(world, folder):
    trainer, _, whole_run = trainer_with(world, strategy(2, world))
    trainer.fit(Small(by_step=True), range(STEPS))
    for steps, path in ((6, None), (STEPS, folder)):
        trainer, clip, watch = trainer_with(
            world, strategy(2, world), max_steps=steps, max_epochs=-1
        )
        trainer.fit(Small(by_step=True), range(STEPS), ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(folder)
    return whole_run.numbers[6:], watch.numbers, clip.state_dict()["steps"]


def on_rank(rank, world, folder):
    found = {name: compared(world, *case) for name, case in CASES.items()}
    disagreeing(world)
    return found | {
        "accumulated": accumulated(world),
        "withheld": withheld(world),
        "resumed": resumed(world, folder),
    }


@functools.cache
def answers():
    folder = tempfile.mkdtemp()
    try:
        return run_on_ranks(on_rank, 2, f"{folder}/at.ckpt", timeout=150)
    finally:
        shutil.rmtree(folder)


@functools.cache
def alone():
    trainer, _, watch = trainer_with(1, "auto")
    module = Small(by_step=True)
    trainer.fit(module, range(STEPS))
    return watch.numbers, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name):
    (seen, left, steps), (other, right, _) = (answer[name] for answer in answers())
    want, parameters = alone()
    exact = 1e-5 if CASES[name][1] == "32-true" else 5e-2
    assert seen == other
    assert steps == [STEPS]
    assert any(norm > limit for norm, limit in want)
    for got, expected in zip(seen, want, strict=True):
        assert got == pytest.approx(expected, rel=exact)
    for got, same, expected in zip(left, right, parameters, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


def test_only_a_step_is_recorded_not_every_batch():
    for none_yet, state in (answer["accumulated"] for answer in answers()):
        assert none_yet == [True, False, False, False, False, False]
        assert state["steps"] == [3]
        assert state["clippers"][0]["counts"]["steps"] == 3


def test_a_step_that_is_not_finite_is_withheld():
    for skipped, same in (answer["withheld"] for answer in answers()):
        assert skipped == [False, False, True, False]
        assert same


def test_a_run_resumes_with_its_state():
    for whole_run, rest, steps in (answer["resumed"] for answer in answers()):
        assert rest == whole_run
        assert steps == [STEPS]
