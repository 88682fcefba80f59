"""What the Trainer's loggers wrote, read back, against norms that torch alone computed."""

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from support.lit import NAN, NOTHING, After, Before, Pair, Small, adamw, trainer_of
from support.logged import (
    board_entries,
    expected_entries,
    mlflow_entries,
    ours,
    table_entries,
    wandb_entries,
)
from torch.overrides import TorchFunctionMode

from gradclip import AlarmError, ConfigError
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning",
    "ignore:.*training_step. returned .None.:UserWarning",
)

MAX_NORM = 6.0
STEPS = 100
NAMES = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
PARTS = {name: slice(i, i + 1) for i, name in enumerate(NAMES)}
GROUPS = {"group/body": slice(0, 2), "group/head": slice(2, 4)}
HISTOGRAM = "clip/grad_norm_histogram"


def run(loggers, *, module=None, log=None, batches=range(12), ckpt_path=None, **options):
    config = {"policies": [{"type": "norm", "max_norm": MAX_NORM}], "log": log or {}}
    clip, before = GradientClip(config), Before()
    trainer = trainer_of(before, clip, logger=loggers, **options)
    trainer.fit(module or Small(), batches, ckpt_path=ckpt_path)
    return trainer, before


def grouped(parameters):
    held = list(parameters)
    return adamw([{"params": held[:2], "name": "body"}, {"params": held[2:], "name": "head"}])


CADENCES = {
    "the Trainer's": ({"log_every_n_steps": 10}, None, range(9, STEPS, 10)),
    "its own": ({"log_every_n_steps": 50}, 7, [*range(6, STEPS, 7), STEPS - 1]),
}


@pytest.fixture(scope="module", params=CADENCES)
def written(request, tmp_path_factory):
    """One run of 100 steps into four loggers, two of its gradients not finite, one nothing."""
    options, every, ends = CADENCES[request.param]
    folder = tmp_path_factory.mktemp("run")
    batches = [NAN if i in (30, 31) else NOTHING if i == 44 else i for i in range(STEPS)]
    log = dict.fromkeys(("per_parameter", "per_group", "histograms"), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_X_DISABLE_STATS", "true")
        table, board = CSVLogger(folder), TensorBoardLogger(folder)
        flow = MLFlowLogger(tracking_uri=f"file:{folder}/mlruns")
        sweep = WandbLogger(save_dir=folder, offline=True)
        log["every_n_steps"] = every
        try:
            loggers = [table, board, flow, sweep]
            _, before = run(loggers, module=Small(grouped), log=log, batches=batches, **options)
        finally:
            sweep.experiment.finish()
    wanted = expected_entries(before.grads, ends, MAX_NORM, PARTS | GROUPS)
    return SimpleNamespace(folder=folder, table=table, board=board, ends=list(ends), wanted=wanted)


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for step, row in wanted.items():
        assert found[step] == pytest.approx(row, rel=1e-6), step


def test_each_logger_holds_what_torch_alone_computed(written):
    rows = written.wanted.values()
    assert sum(row["clip/nonfinite"] for row in rows) == 2
    assert 10 < sum(row["clip/clipped"] for row in rows) < 90
    assert written.wanted[STEPS - 1]["clip/clip_rate"] < 1

    entries = table_entries(written.table.log_dir)
    assert_same(ours(entries), written.wanted)
    assert not any("histogram" in key for row in entries.values() for key in row)

    scalars, histograms = board_entries(written.board.log_dir)
    assert_same(ours(scalars), written.wanted)
    assert histograms == {step: {HISTOGRAM: n} for step, n in steps_of(written).items()}

    rows = [row for row in wandb_entries(written.folder) if "clip/grad_norm" in row]
    by_step = {row["trainer/global_step"]: row for row in rows}
    numbers = {
        step: {k: v for k, v in row.items() if not k.startswith(HISTOGRAM)}
        for step, row in by_step.items()
    }
    assert_same(ours(numbers), written.wanted)
    counts = {step: sum(row[f"{HISTOGRAM}>values"]) for step, row in by_step.items()}
    assert counts == steps_of(written)

    found = dict(sorted(mlflow_entries(written.folder / "mlruns").items()))
    assert_same(found, written.wanted)


def steps_of(written):
    """How many finite steps with a gradient each entry is of: all but 30, 31 and 44."""
    starts = [0, *(end + 1 for end in written.ends)]
    spans = zip(starts, written.ends, strict=False)
    return {end: len(set(range(start, end + 1)) - {30, 31, 44}) for start, end in spans}


def test_an_interval_of_its_own_is_kept_exactly(tmp_path):
    table = CSVLogger(tmp_path)
    trainer, before = run(table, log={"every_n_steps": 5}, log_every_n_steps=2)
    wanted = expected_entries(before.grads, [4, 9, 11], MAX_NORM)
    assert_same(ours(table_entries(table.log_dir)), wanted)
    last = expected_entries(before.grads[-1:], [0], MAX_NORM)[0]
    for key in ("clip/grad_norm", "clip/clipped", "clip/coef"):
        assert float(trainer.callback_metrics[key]) == pytest.approx(last[key], rel=1e-6)


def test_updates_are_logged_with_the_steps_that_were_measured(tmp_path):
    table, rate = CSVLogger(tmp_path), 0.1
    module = Small(lambda parameters: torch.optim.SGD(parameters, lr=rate))
    log = {"update_norm_every": 2}
    _, before = run(table, module=module, log=log, log_every_n_steps=4)
    entries = ours(table_entries(table.log_dir))
    assert list(entries) == [3, 7, 11]
    for end, row in entries.items():
        seen = expected_entries(before.grads, range(end + 1), MAX_NORM)
        clipped = [seen[step]["clip/clipped_norm"] for step in (end - 3, end - 1)]
        assert row["clip/update_norm"] == pytest.approx(rate * sum(clipped) / 2, rel=1e-4)
        assert 0 < row["clip/update_ratio"] < row["clip/update_norm"]


class LogsToo(Small):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("own", loss)
        return loss


@pytest.mark.parametrize(("accumulate", "every"), [(1, 2), (2, None)])
def test_entries_are_filed_under_the_trainers_steps(tmp_path, accumulate, every):
    table = CSVLogger(tmp_path)
    _, before = run(
        table,
        log={"every_n_steps": every},
        module=LogsToo(),
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
    )
    entries = table_entries(table.log_dir)
    wanted = expected_entries(before.grads, range(1, 12 // accumulate, 2), MAX_NORM)
    assert_same(ours(entries), wanted)
    assert [step for step, row in entries.items() if "own" in row] == list(wanted)


class NowAndThen(Small):
    """Steps by hand in one batch of `every`."""

    def __init__(self, every, at):
        super().__init__()
        self.automatic_optimization = False
        self.every, self.at = every, at

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % self.every == self.at:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("every", "at", "ends"),
    [
        (2, 0, [9, 19, 29, 39]),
        (4, 1, [9, 19, 29, 39]),
        (8, 7, [9, 19, 29, 39]),
        (16, 3, [9, 19, 39]),
    ],
)
def test_entries_come_in_time_whichever_batches_step(tmp_path, every, at, ends):
    table = CSVLogger(tmp_path)
    module = NowAndThen(every, at)
    _, before = run(table, module=module, batches=range(40), log_every_n_steps=10)
    entries = ours(table_entries(table.log_dir))
    taken = [sum(b % every == at for b in range(end + 1)) for end in ends]
    kept = [i for i in range(len(ends)) if taken[i] > (taken[i - 1] if i else 0)]
    assert list(entries) == [ends[i] for i in kept]
    wanted = expected_entries(before.grads, [taken[i] - 1 for i in kept], MAX_NORM)
    assert list(entries.values()) == [pytest.approx(row, rel=1e-6) for row in wanted.values()]


def test_a_resumed_run_goes_on_with_clip_rate_and_interval(tmp_path):
    first, second = CSVLogger(tmp_path / "first"), CSVLogger(tmp_path / "second")
    log = {"every_n_steps": 5}
    trainer, before = run(first, log=log, log_every_n_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, after = run(
        second, log=log, max_epochs=2, log_every_n_steps=3, ckpt_path=tmp_path / "last.ckpt"
    )
    wanted = expected_entries(before.grads + after.grads, [4, 9, 11, 14, 19, 23], MAX_NORM)
    rows = ours(table_entries(first.log_dir)) | ours(table_entries(second.log_dir))
    assert_same(rows, wanted)


class NewOptimizer(Small):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


def test_no_step_before_a_new_optimizer_is_lost(tmp_path):
    table = CSVLogger(tmp_path)
    options = {"log": {"every_n_steps": 7}, "log_every_n_steps": 2, "max_epochs": 2}
    _, before = run(table, module=NewOptimizer(), **options)
    wanted = expected_entries(before.grads, [6, 13, 20, 23], MAX_NORM)
    assert_same(ours(table_entries(table.log_dir)), wanted)


@pytest.mark.parametrize("every", [None, 5])
def test_several_optimizers_have_keys_of_their_own(tmp_path, every):
    table = CSVLogger(tmp_path)
    log = {"every_n_steps": every, "per_parameter": True}
    _, before = run(table, module=Pair(), log=log, log_every_n_steps=4)
    ends = [3, 7, 11] if every is None else [4, 9, 11]
    wanted = {end: {} for end in ends}
    for index, names in enumerate((NAMES[:2], NAMES[2:])):
        parts = {name: slice(i, i + 1) for i, name in enumerate(names)}
        suffix = f"/optimizer{index}"
        own = expected_entries(before.grads[index::2], ends, MAX_NORM, parts, suffix)
        for end in ends:
            wanted[end] |= own[end]
    assert_same(ours(table_entries(table.log_dir)), wanted)


def test_a_warning_says_which_optimizer_it_is_of(caplog):
    clip = GradientClip(
        {"policies": [{"type": "norm", "max_norm": 1e-3}], "log": {"warn_after": 3}}
    )
    trainer_of(clip).fit(Pair(), range(4))
    said = [r.message.split(":")[0] for r in caplog.records if "bound in each" in r.message]
    assert said == ["clip.optimizer0", "clip.optimizer1"]


class Rising(Small):
    """Whose norms are a million times as high from the 40th batch on."""

    def training_step(self, batch, index):
        return super().training_step(batch, index) * (1e6 if index >= 40 else 1)


class Saves(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (20, 30, 35, 41):
            path = self.folder / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=trainer.global_step == 35)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_an_alarm_ends_a_fit_and_names_the_last_good_checkpoint(tmp_path):
    config = {"policies": [{"type": "norm", "max_norm": MAX_NORM}], "log": {"every_n_steps": 5}}
    config["alarm"] = {"warmup_steps": 10, "stop": "rise"}
    for resumed_from in (None, tmp_path / "30.ckpt"):
        told = []
        clip = GradientClip(config)
        clip.on_spike(told.append)
        trainer = trainer_of(clip, *([] if resumed_from else [Saves(tmp_path)]))
        with pytest.raises(AlarmError, match=r"risen since step 40 .*exit code 76") as error:
            trainer.fit(Rising(), [0] * 60, ckpt_path=resumed_from)
        assert [(spike.kind, spike.step) for spike in told] == [("rise", 40)]
        assert error.value.checkpoint == told[0].checkpoint == str(tmp_path / "30.ckpt")
        assert trainer.global_step == 45
    clip = GradientClip(config | {"alarm": None})
    clip.on_spike(told.append)
    with pytest.raises(ConfigError, match="no section alarm"):
        trainer_of(clip).fit(Small(), range(2))


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


class HostReads(TorchFunctionMode):
    """Notes every way to a value on the host; of a clipper's flush only until rows are there."""

    WAYS = frozenset(
        {"cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}
    )

    def __init__(self):
        super().__init__()
        self.between, self.flushes = 0, []
        self._inside = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.WAYS and self._inside:
            self.flushes[-1].append(name)
        self.between += name in self.WAYS and not self._inside
        return func(*args, **(kwargs or {}))

    def watch(self, clipper):
        flush = clipper.flush

        def watched():
            self.flushes.append([])
            self._inside = True
            try:
                return flush()
            finally:
                self._inside = False

        clipper.flush = watched


class WithoutClipper(GradientClip):
    def on_before_optimizer_step(self, *_):
        self._steps.announce(0)


class ForceAccelerator(After):
    """Gives the clipper the kernel that accelerators get."""

    def __init__(self, clip, spy):
        super().__init__(clip)
        self.spy = spy

    def on_train_start(self, trainer, module):
        named = list(module.named_parameters())
        for clipper in self.clip.clippers:
            clipper.__init__(clipper.config, named, trainer.optimizers[0], kernel="accelerator")
            self.spy.watch(clipper)


def reads(kind, logger, **options):
    """What a run reads whose policy itself reads nothing."""
    log = {"per_parameter": True, "histograms": True}
    policies = [{"type": "norm", "max_norm": 1.0}]
    clip = kind({"policies": policies, "on_nonfinite": "ignore", "log": log})
    spy = HostReads()
    with spy:
        trainer = trainer_of(clip, ForceAccelerator(clip, spy), logger=logger, **options)
        trainer.fit(Small(), range(12))
    return spy


@pytest.mark.parametrize(("every", "flushes"), [(12, 1), (4, 3), (5, 3)])
def test_the_host_is_read_once_an_entry_and_never_between(tmp_path, every, flushes):
    of_trainer = reads(WithoutClipper, CSVLogger(tmp_path), log_every_n_steps=every)
    with_clips = reads(GradientClip, CSVLogger(tmp_path), log_every_n_steps=every)
    assert with_clips.between == of_trainer.between
    full = [names for names in with_clips.flushes if names]
    assert len(full) == flushes
    assert all(names[0] == "cpu" and names.count("cpu") == 1 for names in full)


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


class ByName(Logger):
    """Takes what Lightning itself passes: metrics by name; its folder is a Path."""

    name, version = "own", 0

    def __init__(self, folder):
        super().__init__()
        self.save_dir, self.rows = folder, []

    save_dir = None

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, *, metrics, step=None):
        self.rows.append((step, metrics))


def test_a_logger_of_ones_own_needs_no_more_than_lightning_asks_of_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "gradclip")
    logger = ByName(tmp_path)
    trainer, _ = run(logger, log_every_n_steps=5)
    assert any("clip/grad_norm" in row for _, row in logger.rows)
    [said] = [record.message for record in caplog.records if "Entries:" in record.message]
    assert said == (
        "gradclip: norm(max_norm=6.0) on 4 parameters of AdamW, not sharded. "
        "Entries: ByName every 5 steps."
    )
    [clip] = [callback for callback in trainer.callbacks if isinstance(callback, GradientClip)]
    assert repr(clip) == "GradientClip(norm(max_norm=6.0) on 4 parameters of AdamW, not sharded)"
    assert repr(GradientClip("auto")) == "GradientClip(auto)"
