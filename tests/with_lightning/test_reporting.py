"""What the Trainer's loggers wrote, read back, against norms that torch alone computed."""

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.lit import After, Before, Pair, Small, trainer_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_clip import GradientClip
from lightning_clip.framework import logger_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning"
)

MAX_NORM = 6.0
KEYS = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")


def run(loggers, *, every=None, module=None, log=None, batches=range(12), **options):
    config = {"policies": [{"type": "norm", "max_norm": MAX_NORM}], "log": log or {}}
    config["log"]["every_n_steps"] = every
    clip = GradientClip(config, progress_bar=options.pop("progress_bar", False))
    before, after = Before(), After(clip)
    trainer = trainer_of(before, clip, after, logger=loggers, **options)
    trainer.fit(module or Small(), batches)
    return trainer, before, after


def rows_of(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def expected(before, after, step):
    """Every metric of a step, from the captured gradients alone."""
    norms = before.norms[: step + 1]
    norm = norms[-1]
    clipped = norm > MAX_NORM
    return {
        "clip/grad_norm": norm,
        "clip/limit": MAX_NORM,
        "clip/coef": MAX_NORM / (norm + 1e-6) if clipped else 1.0,
        "clip/clipped_norm": after.norms[step],
        "clip/clipped": float(clipped),
        "clip/skipped": 0.0,
        "clip/clip_rate": sum(n > MAX_NORM for n in norms) / (step + 1),
    }


def test_both_loggers_have_every_metric(tmp_path):
    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    _, before, after = run([table, board], log_every_n_steps=3)
    rows = rows_of(table)
    assert [row["step"] for row in rows] == [2, 5, 8, 11]
    assert 0 < rows[-1]["clip/clip_rate"] < 1
    events = EventAccumulator(board.log_dir)
    events.Reload()
    for row in rows:
        step = int(row["step"])
        wanted = expected(before, after, step)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        for key, value in wanted.items():
            [written] = [e.value for e in events.Scalars(key) if e.step == step]
            assert written == pytest.approx(value, rel=1e-6)


def test_an_interval_of_its_own_is_kept_exactly(tmp_path):
    table = CSVLogger(tmp_path)
    trainer, before, after = run(table, every=5, log_every_n_steps=2)
    rows = [row for row in rows_of(table) if "clip/grad_norm" in row]
    assert [row["step"] for row in rows] == [4, 9]
    for row in rows:
        wanted = expected(before, after, int(row["step"]))
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert float(trainer.callback_metrics["clip/grad_norm"]) == pytest.approx(before.norms[-1])


class LogsToo(Small):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss)
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interval_of_its_own_files_under_the_trainers_steps(tmp_path, accumulate):
    table = CSVLogger(tmp_path)
    run(
        table,
        every=2,
        module=LogsToo(),
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
    )
    rows = rows_of(table)
    ours = [row["step"] for row in rows if "clip/grad_norm" in row]
    assert ours == [row["step"] for row in rows if "own" in row]
    assert len(ours) == 6 // accumulate


def test_the_step_read_from_the_trainer_is_the_one_it_logs_under(tmp_path):
    class Step(After):
        def on_before_optimizer_step(self, trainer, pl_module, _):
            pl_module.log("step_seen", float(logger_step(trainer)))

    table = CSVLogger(tmp_path)
    trainer_of(Step(None), logger=table, log_every_n_steps=1).fit(Small(), range(3))
    assert [row["step_seen"] for row in rows_of(table)] == [row["step"] for row in rows_of(table)]


def test_per_parameter_norms(tmp_path):
    table = CSVLogger(tmp_path)
    _, before, _ = run(table, log={"per_parameter": True}, log_every_n_steps=4)
    row = rows_of(table)[0]
    names = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    for name, grad in zip(names, before.grads[3], strict=True):
        norm = math.sqrt(float(grad.double().square().sum()))
        assert row[f"clip/grad_norm/{name}"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("every", [None, 4])
def test_keys_of_several_optimizers_are_distinct(tmp_path, every):
    table = CSVLogger(tmp_path)
    _, before, _ = run(table, module=Pair(), every=every, log_every_n_steps=4)
    rows = [row for row in rows_of(table) if any(key.startswith("clip/") for key in row)]
    merged = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    assert list(merged) == [3, 7, 11]
    for step, row in merged.items():
        assert "clip/grad_norm" not in row
        for index in (0, 1):
            norm = before.norms[2 * int(step) + index]
            assert row[f"clip/grad_norm/optimizer{index}"] == pytest.approx(norm, rel=1e-6)


class Bar(TQDMProgressBar):
    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.shown.append(self.get_metrics(trainer, pl_module))
        super().on_train_batch_end(trainer, pl_module, *args)


@pytest.mark.parametrize("asked", [True, False])
def test_progress_bar_on_request(asked):
    clip = GradientClip({"policies": [{"type": "zclip"}]}, progress_bar=asked)
    before, bar = Before(), Bar()
    trainer_of(before, clip, bar, enable_progress_bar=True).fit(Small(), range(3))
    clips = {key for shown in bar.shown for key in shown if key.startswith("clip/")}
    assert clips == ({"clip/grad_norm", "clip/limit", "clip/clip_rate"} if asked else set())
    if asked:
        assert bar.shown[2]["clip/grad_norm"] == pytest.approx(before.norms[2], rel=1e-6)


class HostReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class WithoutClipper(GradientClip):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


def reads(kind, tmp_path, **options):
    """Host reads of a run whose clipper itself reads nothing (the accelerator path)."""
    clip = kind({"policies": [{"type": "norm", "max_norm": 1.0}], "on_nonfinite": "ignore"})
    table = CSVLogger(tmp_path)
    with HostReads() as spy:
        trainer_of(ForceAccelerator(clip), clip, logger=table, **options).fit(Small(), range(12))
    return spy.count


class ForceAccelerator(After):
    """Gives the clipper the kernel that accelerators get."""

    def on_train_start(self, trainer, _):
        for clipper in self.clip.clippers:
            clipper.__init__(clipper.config, None, trainer.optimizers[0], kernel="accelerator")


def test_logging_reads_the_host_only_when_the_trainer_logs(tmp_path):
    options = {"log_every_n_steps": 12}
    own = reads(GradientClip, tmp_path, **options) - reads(WithoutClipper, tmp_path, **options)
    assert own == len(KEYS)
    options = {"log_every_n_steps": 4}
    own = reads(GradientClip, tmp_path, **options) - reads(WithoutClipper, tmp_path, **options)
    assert own == 3 * len(KEYS)


def test_barebones_logs_nothing_and_warns_of_nothing():
    clip = GradientClip({"policies": [{"type": "norm", "max_norm": 0.1}]})
    trainer = trainer_of(
        clip,
        barebones=True,
        logger=None,
        enable_checkpointing=None,
        enable_progress_bar=None,
        enable_model_summary=None,
    )
    trainer.fit(Small(), range(3))
    assert bool(clip.last_record.clipped)
