"""What reaches a tracker, read back and compared with float64 arithmetic of its own."""

import json
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
from accelerate_clip.report import describe
from gradclip import ClipByNorm, ClipConfig, GroupConfig, LogConfig, RecorderConfig, ZClip


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


def run(tracker, config, steps, init=True, end=False, **options):
    accelerator = Accelerator(cpu=True, log_with=tracker, **options)
    clip = accelerate_clip.enable(accelerator, config)
    if init:
        accelerator.init_trackers("run")
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    norms = []
    for step in range(steps):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
        norms.append(gradient(accelerator.unwrap_model(model), inputs))
        opt.zero_grad()
        accelerator.backward(model(inputs).square().mean())
        opt.step()
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
    _, norms = run(FileTracker(file), CONFIG, 100, end=end)
    assert min(norms) < 1.5 < max(norms)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(3, 100, 3), *([100] if end else [])]
    first = 0
    for line in lines:
        stop = line.pop("step")
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


def into_wandb_and_mlflow(rank, world, folder):
    given = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns"}
    given |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true"}
    os.environ.update(given | {"WANDB_X_DISABLE_STATS": "true"})
    log = LOGGED.log.model_copy(update={"per_parameter": True})
    config = LOGGED.model_copy(update={"log": log})
    return run(["mlflow", "wandb"], config, 100, end=True, project_dir=folder)[1]


def test_wandb_and_mlflow_read_them_back(tmp_path):
    # A process of their own: both keep what an earlier run in theirs was told.
    [norms] = run_on_ranks(into_wandb_and_mlflow, 1, str(tmp_path))
    flow, sweep = mlflow_entries(tmp_path / "mlruns"), wandb_entries(tmp_path)
    assert sorted(flow) == [row["_step"] for row in sweep] == list(ENDS)
    for end, row in zip(ENDS, sweep, strict=True):
        wanted = expected(norms, end - 10, end)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        assert {key: flow[end][key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        assert flow[end]["clip/grad_norms/weight"] <= wanted["clip/grad_norm"]
        assert sum(row["clip/grad_norm_histogram>values"]) == 10


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
        clip.clippers[0].expect_new()
        clip.clippers[0].clip()
    alone = reads.count
    clip.clippers[0].expect_new()
    with Reads() as reads:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    assert reads.count == alone


def test_a_configuration_in_one_line():
    config = ClipConfig(
        policies=[ZClip(z_threshold=3.0), ClipByNorm(max_norm=1.0)],
        groups=[GroupConfig(match="*", policies=[])],
    )
    assert describe(config) == "zclip(z_threshold=3.0), norm(max_norm=1.0) and groups"
