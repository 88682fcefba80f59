"""The flight record of a Trainer: where it is, when it is written, what it says."""

import math

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from support.lit import NAN, Before, Pair, Small, trainer_of
from support.lit_layouts import STRATEGIES, Plain
from support.logged import table_entries
from support.ranks import run_on_ranks
from support.spikes import blamed, flight, spike_in

from gradclip import NonFiniteError
from lightning_clip import GradientClip

pytestmark = pytest.mark.filterwarnings(
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning"
)

NAME = "gradclip.trace.jsonl"


def clip(**more):
    config = {"policies": [{"type": "norm", "max_norm": 6.0}], "recorder": {}}
    return GradientClip(config | more)


def files_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.jsonl")}


class Batches(Callback):
    """Placed first: how many batches there were before each step's last one."""

    def __init__(self):
        self.seen, self.of_steps = -1, []

    def on_train_batch_start(self, *_):
        self.seen += 1

    def on_before_optimizer_step(self, *_):
        self.of_steps.append(self.seen)


LOGGERS = {
    "none": (lambda _: False, "root"),
    "csv": (lambda folder: CSVLogger(folder / "logs"), "logs/lightning_logs/version_0"),
    "tensorboard": (
        lambda folder: [TensorBoardLogger(folder / "logs"), CSVLogger(folder / "others")],
        "logs/lightning_logs/version_0",
    ),
    "mlflow": (lambda folder: MLFlowLogger(tracking_uri=f"file:{folder}/mlruns"), "mlruns"),
}


@pytest.mark.parametrize("name", LOGGERS)
def test_it_is_in_the_first_loggers_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    make, folder = LOGGERS[name]
    before = Before()
    options = {"logger": make(tmp_path), "default_root_dir": tmp_path / "root"}
    trainer_of(before, clip(), log_every_n_steps=1, **options).fit(Small(), range(9))
    assert files_below(tmp_path) == {f"{folder}/{NAME}"}
    _, steps = flight(tmp_path / folder / NAME)
    assert [row["grad_norm"] for row in steps.values()] == pytest.approx(before.norms, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_steps_batch_is_the_trainers_total_index(tmp_path, accumulate):
    batches = Batches()
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    trainer_of(batches, clip(), default_root_dir=tmp_path, **options).fit(Small(), range(6))
    _, steps = flight(tmp_path / NAME)
    assert [row["batch"] for row in steps.values()] == batches.of_steps
    assert batches.of_steps[-1] == 11


class Raises(Small):
    def training_step(self, batch, batch_idx):
        if batch == 7:
            msg = "out of data"
            raise RuntimeError(msg)
        return super().training_step(batch, batch_idx)


def test_it_is_written_when_training_raises(tmp_path):
    trainer = trainer_of(clip(), default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="out of data"):
        trainer.fit(Raises(), range(12))
    header, steps = flight(tmp_path / NAME)
    assert list(steps) == list(range(7))
    assert header["counts"]["steps"] == 7


class Exists(Callback):
    def __init__(self, path):
        self.path, self.seen = path, []

    def on_train_batch_end(self, *_):
        self.seen.append(self.path.exists())


def test_it_is_written_at_a_nan_batch_and_again_at_the_end(tmp_path):
    exists = Exists(tmp_path / NAME)
    batches = [NAN if i == 4 else i for i in range(12)]
    trainer_of(clip(), exists, default_root_dir=tmp_path).fit(Small(), batches)
    assert exists.seen == [i >= 4 for i in range(12)]
    _, steps = flight(tmp_path / NAME)
    assert len(steps) == 12
    assert [step for step, row in steps.items() if row["skipped"]] == [4]
    assert all(norm is None for norm in steps[4]["per_parameter"].values())


def test_a_step_that_stops_the_run_is_in_it(tmp_path):
    batches = [NAN if i == 4 else i for i in range(12)]
    trainer = trainer_of(clip(on_nonfinite="raise"), default_root_dir=tmp_path)
    with pytest.raises(NonFiniteError):
        trainer.fit(Small(), batches)
    _, steps = flight(tmp_path / NAME)
    assert [row["finite"] for row in steps.values()] == [True] * 4 + [False]
    assert steps[4]["batch"] == 4


def test_several_optimizers_have_a_file_each(tmp_path):
    before = Before()
    trainer_of(before, clip(), default_root_dir=tmp_path).fit(Pair(), range(9))
    names = [f"gradclip.optimizer{index}.trace.jsonl" for index in (0, 1)]
    assert files_below(tmp_path) == set(names)
    for index, name in enumerate(names):
        header, steps = flight(tmp_path / name)
        wanted = before.norms[index::2]
        assert [row["grad_norm"] for row in steps.values()] == pytest.approx(wanted, rel=1e-6)
        assert [row["batch"] for row in steps.values()] == list(range(9))
        layer = 2 * index
        assert header["parameters"] == [f"net.{layer}.weight", f"net.{layer}.bias"]


def test_a_resumed_run_has_a_file_of_its_own_that_goes_on(tmp_path):
    first = trainer_of(clip(), default_root_dir=tmp_path)
    first.fit(Small(), range(6))
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer_of(clip(), default_root_dir=tmp_path, max_epochs=2)
    second.fit(Small(), range(6), ckpt_path=tmp_path / "last.ckpt")
    assert list(flight(tmp_path / NAME)[1]) == list(range(6))
    _, steps = flight(tmp_path / "gradclip-1.trace.jsonl")
    assert list(steps) == [row["batch"] for row in steps.values()] == list(range(6, 12))


def test_without_the_section_there_is_no_file(tmp_path):
    without = GradientClip({"policies": [{"type": "norm", "max_norm": 6.0}]})
    trainer_of(without, default_root_dir=tmp_path).fit(Small(), range(3))
    assert not files_below(tmp_path)


SPIKE, ODD = 6, 9


def on_rank(rank, world, name, folder):
    """Two layers go wrong on the last rank, each in a step of its own."""
    kind, strategy, _ = STRATEGIES[name]
    module = kind()

    def factor(at, by):
        fails = rank == world - 1
        return lambda: by if fails and module.trainer.global_step == at else 1.0

    spike_in(module.net[2], factor(SPIKE, 1000.0))
    spike_in(module.net[4], factor(ODD, math.nan))
    root = folder / name / str(rank)
    options = {"strategy": strategy(), "devices": world, "default_root_dir": root}
    trainer_of(clip(), **options).fit(module, range(12))


def logged(module, strategy, world, root):
    """A run without a fault, its log entries and its file in one folder."""
    logger = CSVLogger(root, name="", version="")
    options = {"logger": logger, "log_every_n_steps": 5, "strategy": strategy, "devices": world}
    log = {"per_parameter": True, "per_group": True}
    trainer_of(clip(log=log), **options).fit(module, range(12))


def on_rank_all(rank, world, names, folder):
    for name in names:
        on_rank(rank, world, name, folder)
    for name in WHOLE:
        module, strategy, _ = STRATEGIES[name]
        logged(module(), strategy(), world, folder / "logged" / name / str(rank))


NAMES = ("ddp", "fsdp1", "fsdp2")
WHOLE = [name for name, (*_, world) in STRATEGIES.items() if world == 2 and "flat" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(on_rank_all, 2, NAMES, folder, timeout=180)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_goes_wrong_on_one_rank_is_named_by_the_first(folder, name):
    root = folder / name
    assert files_below(root) == {f"0/{NAME}"}
    header, steps = flight(root / "0" / NAME)
    assert len(steps) == 12
    norms = {step: row["grad_norm"] for step, row in steps.items() if row["finite"]}
    assert max(norms, key=norms.get) == SPIKE
    share, odd = blamed(header, steps[SPIKE], "net.2")
    assert share > 0.99
    assert not odd
    assert set(steps) - set(norms) == {ODD}
    assert blamed(header, steps[ODD], "net.2")[1] == {"net.4.weight", "net.4.bias"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    logged(Plain(), "auto", 1, folder)
    return folder


def test_entries_and_file_are_those_of_one_process(folder, alone):
    reference = table_entries(alone)
    assert list(reference) == [4, 9, 11]
    for name in WHOLE:
        root = folder / "logged" / name
        assert files_below(root) == {f"0/{NAME}"}, name
        _, wanted = flight(alone / NAME)
        _, found = flight(root / "0" / NAME)
        assert list(found) == list(wanted), name
        for step, row in wanted.items():
            norms = pytest.approx(row.pop("per_parameter"), rel=1e-5)
            assert found[step].pop("per_parameter") == norms, name
            assert found[step] == pytest.approx(row, rel=1e-5), name
        entries = table_entries(root / "0")
        assert list(entries) == list(reference), name
        for step, row in reference.items():
            assert entries[step] == pytest.approx(row, rel=1e-5), name
