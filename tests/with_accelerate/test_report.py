"""What reaches a tracker, read back and compared with float64 arithmetic of its own."""

import json
import logging
import math
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from support.logged import board_entries, mlflow_entries, wandb_entries
from support.ranks import run_on_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import accelerate_clip
from gradclip import ClipByNorm, ClipConfig, GroupConfig, LogConfig, RecorderConfig, ZClip

RATE = 0.01


class FileTracker(GeneralTracker):
    name = "file"
    requires_logging_directory = False

    def __init__(self, path):
        super().__init__()
        self.path = path

    @property
    def tracker(self):
        return self.path

    def log(self, values, step=None, **_):
        assert all(type(value) is float for value in values.values())
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def gradient(model, inputs):
    x, w, b = inputs.double(), model.weight.detach().double(), model.bias.detach().double()
    error = 2 * (x @ w.T + b) / len(x)
    return math.hypot(float((error.T @ x).norm()), float(error.sum(0).norm()))


def run(tracker, config, steps, init=True, end=False, script=None, **options):
    """Train; after each batch `script(accelerator, batch)` logs what it likes."""
    accelerator = Accelerator(cpu=True, log_with=tracker, **options)
    clip = accelerate_clip.enable(accelerator, config)
    if init:
        accelerator.init_trackers("run")
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    norms = []
    script = script or (lambda *_: None)
    for step in range(steps):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
        norms.append(gradient(accelerator.unwrap_model(model), inputs))
        opt.zero_grad()
        accelerator.backward(model(inputs).square().mean())
        opt.step()
        script(accelerator, step)
    if end:
        accelerator.end_training()
    return clip, norms


def expected(norms, first, stop):
    """Every metric of the steps between two entries."""
    window = norms[first:stop]
    coefs = [1.5 / (norm + 1e-6) if norm > 1.5 else 1.0 for norm in window]
    clipped = sum(norm > 1.5 for norm in window)
    mean = len(window)
    return {
        "clip/grad_norm": sum(window) / mean,
        "clip/grad_norm_max": max(window),
        "clip/limit": 1.5,
        "clip/coef": sum(coefs) / mean,
        "clip/clipped_norm": sum(n * c for n, c in zip(window, coefs, strict=True)) / mean,
        "clip/clipped": clipped,
        "clip/skipped": 0.0,
        "clip/nonfinite": 0.0,
        "clip/clip_rate": sum(norm > 1.5 for norm in norms[:stop]) / stop,
        "clip/clip_rate_window": clipped / mean,
    }


CONFIG = ClipConfig(policies=[ClipByNorm(max_norm=1.5)], log=LogConfig(every_n_steps=3))


@pytest.mark.parametrize("end", [False, True])
def test_an_entry_holds_the_steps_since_the_last(tmp_path, end):
    file = tmp_path / "log"
    log = LogConfig(every_n_steps=3, update_norm_every=1)
    _, norms = run(FileTracker(file), CONFIG.model_copy(update={"log": log}), 100, end=end)
    assert min(norms) < 1.5 < max(norms)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(3, 100, 3), *([100] if end else [])]
    first = 0
    for line in lines:
        stop = line.pop("step")
        moved = line.pop("clip/update_norm")
        assert moved == pytest.approx(RATE * line["clip/clipped_norm"], rel=1e-4)
        assert 0 < moved / line.pop("clip/update_ratio") < 3  # the norm of the weights
        assert line == pytest.approx(expected(norms, first, stop), rel=1e-5)
        first = stop


LOGGED = CONFIG.model_copy(update={"log": LogConfig(every_n_steps=10, histograms=True)})
ENDS = range(10, 101, 10)


def test_tensorboard_reads_them_back_with_histograms_and_the_flight_record_beside(tmp_path):
    config = LOGGED.model_copy(update={"recorder": RecorderConfig()})
    _, norms = run("tensorboard", config, 100, end=True, project_dir=tmp_path)
    scalars, histograms = board_entries(tmp_path / "run")
    assert list(scalars) == list(ENDS)
    for end, row in scalars.items():
        assert row == pytest.approx(expected(norms, end - 10, end), rel=1e-5)
    assert histograms == {end: {"clip/grad_norm_histogram": 10} for end in ENDS}
    _, *rows = (tmp_path / "gradclip.trace.jsonl").read_text().splitlines()
    for row, norm in zip(map(json.loads, rows), norms, strict=True):
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["batch"] == row["step"]


def own_loss(accelerator, batch):
    accelerator.log({"loss": batch / 2}, step=batch)


def test_tensorboard_has_them_under_the_steps_of_a_script_that_logs(tmp_path):
    options = {"end": True, "script": own_loss, "project_dir": tmp_path}
    _, norms = run("tensorboard", LOGGED, 25, **options)
    scalars, histograms = board_entries(tmp_path / "run")
    assert {step: row.pop("loss") for step, row in scalars.items()} == {
        step: step / 2 for step in range(25)
    }
    wanted = {9: expected(norms, 0, 10), 19: expected(norms, 10, 20), 24: expected(norms, 20, 25)}
    for step, row in scalars.items():
        assert row == pytest.approx(wanted.get(step, {}), rel=1e-5)
    sizes = {step: row["clip/grad_norm_histogram"] for step, row in histograms.items()}
    assert sizes == {9: 10, 19: 10, 24: 5}


def into_wandb_and_mlflow(rank, world, folder, script):
    given = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns"}
    given |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    os.environ.update(given | {"WANDB_X_DISABLE_STATS": "true"})
    log = LOGGED.log.model_copy(update={"per_parameter": True})
    config = LOGGED.model_copy(update={"log": log})
    options = {"end": True, "script": script, "project_dir": folder}
    return run(["mlflow", "wandb"], config, 95, **options)[1]


def read_back(folder, script):
    """What W&B and MLflow hold, by step, and the norms."""
    # A process of their own: both keep what an earlier run in theirs was told.
    [norms] = run_on_ranks(into_wandb_and_mlflow, 1, str(folder), script)
    rows = wandb_entries(folder)
    sweep = {row["_step"]: row for row in rows}
    assert len(sweep) == len(rows)
    return mlflow_entries(folder / "mlruns"), sweep, norms


def test_wandb_and_mlflow_read_them_back_and_lose_no_row_of_the_script(tmp_path):
    flow, sweep, norms = read_back(tmp_path, own_loss)
    for rows in (flow, sweep):
        assert {step: row["loss"] for step, row in rows.items()} == {
            step: step / 2 for step in range(95)
        }
    ends = [*range(9, 90, 10), 94]
    first = 0
    for rows in (flow, sweep):
        assert sorted(step for step, row in rows.items() if "clip/limit" in row) == ends
    for end in ends:
        wanted = expected(norms, first, end + 1)
        for rows in (flow, sweep):
            found = {key: rows[end][key] for key in wanted}
            assert found == pytest.approx(wanted, rel=1e-5)
        assert flow[end]["clip/grad_norms/weight"] <= wanted["clip/grad_norm"]
        assert sum(sweep[end]["clip/grad_norm_histogram>values"]) == end + 1 - first
        first = end + 1


def each_forty(accelerator, batch):
    if batch % 40 == 39:
        accelerator.log({"loss": 0.5}, step=batch // 40)
        accelerator.log({"accuracy": 0.5}, step=batch // 40)


def each_forty_by_itself(accelerator, batch):
    if batch % 40 == 39:
        accelerator.log({"loss": 0.5})


@pytest.mark.parametrize("script", [each_forty, each_forty_by_itself])
def test_wandb_loses_no_row_of_a_script_that_logs_each_epoch(script, tmp_path):
    _, sweep, norms = read_back(tmp_path, script)
    assert [step for step, row in sweep.items() if "loss" in row] == [0, 1]
    for step, (first, stop) in enumerate([(0, 40), (40, 80), (80, 95)]):
        wanted = expected(norms, first, stop)
        assert {key: sweep[step][key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        assert sum(sweep[step]["clip/grad_norm_histogram>values"]) == stop - first


def test_wandb_has_one_row_of_a_script_that_logs_nothing(tmp_path):
    _, sweep, norms = read_back(tmp_path, None)
    wanted = expected(norms, 0, 95)
    assert list(sweep) == [95]
    assert {key: sweep[95][key] for key in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_an_entry_that_is_due_waits_for_the_script_and_its_keys_win(named, tmp_path):
    def script(accelerator, batch):
        if batch % 4 == 3:
            own = {"clip/limit": float(batch)}
            accelerator.log(own, **({"step": batch} if named else {}))

    file = tmp_path / "log"
    _, norms = run(FileTracker(file), ClipByNorm(max_norm=1.5), 30, end=True, script=script)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    ends = [3, 7, 11, 15, 19, 23, 27]
    steps = [line.pop("step") for line in lines]
    assert steps == ([*ends, 27] if named else [None] * 8)
    held = {11: expected(norms, 0, 12), 19: expected(norms, 12, 20)}
    for end, line in zip(ends, lines[:-1], strict=True):
        assert line == pytest.approx(held.get(end, {}) | {"clip/limit": end}, rel=1e-5)
    assert lines[-1] == pytest.approx(expected(norms, 20, 30), rel=1e-5)


def test_every_tenth_step_unless_told_otherwise(tmp_path):
    run(FileTracker(tmp_path / "log"), ClipByNorm(max_norm=1.5), 21)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_nothing_without_trackers(tmp_path):
    config = ClipConfig(policies=[ClipByNorm(max_norm=1.5)], log=LogConfig(every_n_steps=1))
    run(FileTracker(tmp_path / "log"), config, 2, init=False)
    assert not (tmp_path / "log").exists()


def test_several_optimizers_have_keys_of_their_own(tmp_path):
    accelerator = Accelerator(cpu=True, log_with=FileTracker(tmp_path / "log"))
    config = ClipConfig(policies=[ClipByNorm(max_norm=1.5)], log=LogConfig(every_n_steps=1))
    accelerate_clip.enable(accelerator, config)
    accelerator.init_trackers("run")
    models = [nn.Linear(4, 1), nn.Linear(4, 1)]
    opts = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    *models, first, second = accelerator.prepare(*models, *opts)
    inputs = torch.ones(2, 4)
    norms = [gradient(model, inputs) for model in models]
    accelerator.backward(sum(model(inputs).square().mean() for model in models))
    second.step()
    first.step()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[0]["clip/grad_norm/optimizer1"] == pytest.approx(norms[1], rel=1e-5)
    assert lines[1]["clip/grad_norm/optimizer0"] == pytest.approx(norms[0], rel=1e-5)


class Reads(TorchDispatchMode):
    """Counts scalar reads on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_record_between_log_entries():
    accelerator = Accelerator(cpu=True)
    clip = accelerate_clip.enable(
        accelerator, ClipConfig(policies=[ClipByNorm(max_norm=math.inf)], on_nonfinite="ignore")
    )
    model = nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    stock = torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.01)
    del stock
    accelerator.backward(model(torch.ones(2, 4)).square().mean())
    with Reads() as reads:
        clip.clippers[0].clip()
    alone = reads.count
    with Reads() as reads:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    assert reads.count == alone


def test_the_first_step_says_once_what_is_clipped_and_where_entries_go(tmp_path, caplog):
    caplog.set_level(logging.INFO, "gradclip")
    clip, _ = run(FileTracker(tmp_path / "log"), CONFIG, 3)
    what = "norm(max_norm=1.5) on 2 parameters of SGD, not sharded"
    said = [record.message for record in caplog.records if "Entries:" in record.message]
    assert said == [f"gradclip: {what}. Entries: file every 3 steps."]
    assert repr(clip) == f"AcceleratorClip({what})"


def test_a_configuration_in_one_line():
    config = ClipConfig(
        policies=[ZClip(z_threshold=3.0), ClipByNorm(max_norm=1.0)],
        groups=[GroupConfig(match="*", policies=[])],
    )
    assert config.summary == "zclip(z_threshold=3.0), norm(max_norm=1.0) and groups"
