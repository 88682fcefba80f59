"""What is kept of the last steps: metrics between log entries, warnings, the flight record."""

import copy
import gc
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from support.logged import expected_entries

from gradclip import ConfigError, GradientClipper, NonFiniteError, SkipLimitError
from gradclip.adapters import ClipperSet

NAMES = ("a", "b", "c")
FIXED = [{"type": "norm", "max_norm": 1.0}]


def made(kernel=None, **config):
    """A clipper of three parameters, two of them in the first group, and the parameters."""
    params = {name: torch.nn.Parameter(torch.zeros(2)) for name in NAMES}
    values = list(params.values())
    groups = [{"params": values[:2], "name": "early"}, {"params": values[2:], "name": "late"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    config = {"policies": FIXED} | config
    return GradientClipper(config, params.items(), optimizer, kernel=kernel), params


def step(clipper, params, norms, batch=None):
    """One step in which each parameter's gradient has this norm; None for no gradient."""
    for parameter, norm in zip(params.values(), norms, strict=True):
        parameter.grad = None if norm is None else torch.tensor([0.0, norm])
    clipper.batch = batch
    return clipper.clip()


NOTHING = [None] * 3


def noise(steps, seed=0):
    return np.random.default_rng(seed).lognormal(-1.0, 0.7, (steps, 3)).tolist()


def lines(path):
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return header, rows


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("every", "kernel"),
    [(7, "cpu"), (7, "accelerator"), (600, "accelerator")],  # 600: rows are reused
)
def test_metrics_are_those_of_the_steps_between(every, kernel):
    clipper, params = made(log={"per_parameter": True, "per_group": True}, kernel=kernel)
    grads = noise(max(100, 2 * every))
    grads[3] = [0.1, math.nan, 0.1]
    grads[9], grads[11] = [0.0, 0.0, 0.0], NOTHING
    norms = [[torch.tensor(norm) for norm in step if norm is not None] for step in grads]
    parts = {name: slice(i, i + 1) for i, name in enumerate(NAMES)}
    parts |= {"group/early": slice(0, 2), "group/late": slice(2, 3)}
    expected = expected_entries(norms, range(every - 1, len(grads), every), 1.0, parts)
    for index, norms in enumerate(grads):
        step(clipper, params, norms)
        if index in expected:
            assert clipper.flush() == pytest.approx(expected[index], rel=1e-6)
            assert clipper.flush() == {}


def test_what_a_notebook_shows(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    clipper, params = made()
    assert (
        repr(clipper) == "GradientClipper(norm(max_norm=1.0) on 3 parameters of SGD, not sharded)"
    )
    with pytest.raises(ConfigError, match="plot: no step with a finite norm was made yet"):
        clipper.plot()
    for norms in ([0.3, 0, 0.4], [3.0, 0, 4.0], [math.nan, 0, 0], NOTHING):
        record = step(clipper, params, norms)
        assert repr(record).startswith("ClipRecord(grad_norm=")
    lines = {line.get_label(): line.get_xydata().tolist() for line in clipper.plot().lines}
    assert lines["gradient norm"] == pytest.approx(np.array([[0, 0.5], [1, 5.0]]))
    assert lines["limit"] == [[0, 1.0], [1, 1.0]]
    assert lines["clipped"] == [[1, 5.0]]
    matplotlib.pyplot.close("all")
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'gradclip\[tools\]'"):
        clipper.plot()


def test_what_is_clipped_is_said_as_the_program_logs(capsys, caplog, monkeypatch):
    """A line at INFO; on standard error where nobody set up logging, as Python's warnings."""
    clippers, logger = ClipperSet([made()[0]]), logging.getLogger("gradclip")
    line = "gradclip: norm(max_norm=1.0) on 3 parameters of SGD, not sharded. Entries: nowhere."
    caplog.set_level(logging.INFO, "gradclip")
    clippers.announce("nowhere")
    assert caplog.messages == [line]
    monkeypatch.setattr(logger, "hasHandlers", lambda: False)
    for level, shown in ((logging.NOTSET, f"{line}\n"), (logging.WARNING, "")):
        caplog.set_level(level, "gradclip")
        clippers.announce("nowhere")
        assert capsys.readouterr().err == shown
    assert caplog.messages == [line]


def test_metrics_of_one_step_that_has_no_norm_to_show():
    clipper, params = made()
    for norms, nonfinite in (([math.nan, 0.0, 0.0], 1), (NOTHING, 0)):
        step(clipper, params, norms)
        metrics = clipper.flush()
        assert math.isnan(metrics["clip/grad_norm"])
        assert math.isnan(metrics["clip/grad_norm_max"])
        assert metrics["clip/limit"] == math.inf
        assert metrics["clip/nonfinite"] == metrics["clip/skipped"] == nonfinite
        assert metrics["clip/clip_rate_window"] == 0


def test_the_clip_rate_goes_on_after_a_resume_and_so_do_step_numbers(tmp_path):
    clipper, params = made()
    for norms in [[2.0, 0.0, 0.0], [0.5, 0.0, 0.0], NOTHING]:
        step(clipper, params, norms)
    other, params = made(recorder={})
    other.load_state_dict(clipper.state_dict())
    step(other, params, [0.5, 0.0, 0.0])
    assert other.flush()["clip/clip_rate"] == pytest.approx(1 / 3)
    _, rows = lines(other.recorder.write())
    assert [row["step"] for row in rows] == [3]


def sgd():
    """What SGD with momentum changes, by its formula."""
    momentum = 0.0

    def change(value, grad):
        nonlocal momentum
        del value
        momentum = 0.9 * momentum + grad
        return -0.1 * momentum

    return change


def adamw():
    """The same for AdamW."""
    first, second, steps = 0.0, 0.0, 0

    def change(value, grad):
        nonlocal first, second, steps
        steps += 1
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        root = np.sqrt(second / (1 - 0.999**steps)) + 1e-8
        return -0.1 * (0.01 * value + first / (1 - 0.9**steps) / root)

    return change


STEPPED = {
    "SGD": (sgd, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
    "AdamW": (adamw, lambda parameters: torch.optim.AdamW(parameters, lr=0.1)),
}


@pytest.mark.parametrize("stepped", STEPPED)
@pytest.mark.parametrize(("is_attached", "kernel"), [(True, "cpu"), (False, "accelerator")])
def test_updates_are_what_the_optimizers_formula_says(stepped, is_attached, kernel):
    formula, make = STEPPED[stepped]
    change, value = formula(), np.array([3.0, -4.0, 0.5])
    parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
    optimizer = make([parameter])
    config = {"policies": FIXED, "log": {"update_norm_every": 3}}

    def begin(state=None):
        clipper = GradientClipper(config, {"p": parameter}.items(), optimizer, kernel=kernel)
        if state is not None:
            clipper.load_state_dict(state)
        return clipper, clipper.attach(optimizer) if is_attached else None

    clipper, handle = begin()
    grads, measured = np.array(noise(14)), []
    grads[3, 1] = math.nan  # the step is withheld, though it was to be measured
    for step, grad in enumerate(grads):
        if step == 5:  # another run goes on from here: steps are counted on
            state = clipper.state_dict()
            if handle is not None:
                handle.remove()
            del clipper, handle
            clipper, handle = begin(state)
            assert len(optimizer._optimizer_step_post_hooks) == (2 if is_attached else 1)
        parameter.grad = torch.tensor(grad)
        if not is_attached:
            clipper.clip()
        optimizer.step()
        if np.isfinite(grad).all():
            moved = change(value, grad * min(1.0, 1.0 / (np.linalg.norm(grad) + 1e-6)))
            if step % 3 == 0:
                measured.append((np.linalg.norm(moved), np.linalg.norm(value)))
            value = value + moved
        if step in (1, 4, 13):  # nothing was measured between the first two
            metrics = clipper.flush()
            assert ("clip/update_norm" in metrics) == (len(measured) > 0)
            if measured:
                sizes, weights = np.array(measured).sum(0)
                assert metrics["clip/update_norm"] == pytest.approx(sizes / len(measured))
                assert metrics["clip/update_ratio"] == pytest.approx(sizes / weights)
            measured = []
    np.testing.assert_allclose(parameter.detach().numpy(), value)


class Stepped:
    """An optimizer of its own, without torch's hooks."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]


@pytest.mark.parametrize(
    ("make", "found"), [(lambda _: None, "without an optimizer"), (Stepped, "no step hooks")]
)
def test_updates_without_steps_that_are_seen_are_refused(make, found):
    params = {"p": torch.nn.Parameter(torch.zeros(2))}
    config = {"policies": FIXED, "log": {"update_norm_every": 1}}
    with pytest.raises(ConfigError, match=f"log.update_norm_every is set, and .*{found}.*allowed"):
        GradientClipper(config, params.items(), make(params.values()))


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_gradient_of_zeros_is_a_step_and_no_gradient_is_none(kernel):
    limit = {"schedule": "linear", "start": 1.0, "end": 0.5, "steps": 5}
    policies = [{"type": "norm", "max_norm": limit}]
    clipper, params = made(policies=policies, recorder={"worst": 1}, kernel=kernel)
    made_of = ([2.0, 0.0, 0.0], NOTHING, [0.0, 0.0, None], [0.0, 4.0, 0.0])
    limits = [float(step(clipper, params, norms).limit) for norms in made_of]
    assert limits == pytest.approx([1.0, 0.9, 0.9, 0.8])  # a schedule over steps that were taken
    metrics = clipper.flush()
    assert metrics["clip/grad_norm"] == 2.0
    assert metrics["clip/limit"] == pytest.approx(0.9)
    assert metrics["clip/clip_rate"] == metrics["clip/clip_rate_window"] == pytest.approx(2 / 3)
    header, rows = lines(clipper.recorder.write())
    assert header["counts"] == {"steps": 3, "clipped": 2, "skipped": 0, "nonfinite": 0}
    assert [row.get("grad_norm") for row in rows] == [2.0, None, 0.0, 4.0]
    assert rows[1] == {"step": 1, "clipped": False, "skipped": False, "finite": True}
    assert [row["step"] for row in rows if "per_parameter" in row] == [3]


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_file_holds_the_last_steps_and_who_made_the_worst(kernel):
    clipper, params = made(recorder={"steps": 20, "worst": 2}, kernel=kernel)
    grads = noise(100)
    grads[30][1] = 500.0
    grads[60][2] = 90.0
    for i, norms in enumerate(grads):
        step(clipper, params, norms, batch=3 * i)
    header, rows = lines(clipper.recorder.write())
    assert header["format"] == "gradclip-trace"
    assert header["parameters"] == list(NAMES)
    assert header["config"]["policies"][0]["max_norm"] == 1.0
    assert header["counts"]["steps"] == 100
    assert [row["step"] for row in rows] == [30, 60, *range(80, 100)]
    assert [row["batch"] for row in rows] == [3 * row["step"] for row in rows]
    for row in rows:
        norms = grads[row["step"]]
        total = math.hypot(*norms)
        assert row["grad_norm"] == pytest.approx(total, rel=1e-6)
        assert row["clipped"] == (total > 1)
        assert row["limit"] == 1.0
        assert row["clipped_norm"] == pytest.approx(min(total, 1.0), rel=1e-5)
    named = {row["step"]: row["per_parameter"] for row in rows if "per_parameter" in row}
    assert list(named) == [30, 60]
    assert named[30] == pytest.approx(dict(zip(NAMES, grads[30], strict=True)), rel=1e-6)


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_spike_is_told_from_the_large_norms_that_a_run_begins_with(kernel):
    clipper, params = made(recorder={"worst": 8}, kernel=kernel)
    for i in range(300):
        level = 0.5 + 50 * 0.95**i
        step(clipper, params, [level, 0.0, 6.0 if i == 200 else 0.0])
    _, rows = lines(clipper.recorder.write())
    assert rows[200]["per_parameter"]["c"] == 6.0
    assert rows[200]["grad_norm"] < rows[40]["grad_norm"]


def test_the_worst_steps_are_of_the_run_that_goes_on():
    clipper, params = made(recorder={})
    saved = clipper.state_dict()
    step(clipper, params, [900.0, 0.0, 0.0])
    clipper.load_state_dict(saved)
    step(clipper, params, [1.0, 0.0, 0.0])
    _, rows = lines(clipper.recorder.write())
    assert [row["grad_norm"] for row in rows] == [1.0]
    assert rows[0]["per_parameter"]["a"] == 1.0


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_the_first_steps_that_are_not_finite_are_kept_and_written(tmp_path, kernel):
    clipper, params = made(recorder={"worst": 1}, kernel=kernel)
    path = tmp_path / "gradclip.trace.jsonl"
    for i in range(30):
        norms = [1.0, math.inf if i in (4, 5) else 1.0, 1.0]
        step(clipper, params, norms)
        # where reading is free at once, else at the next look
        assert path.exists() == (i >= (4 if kernel == "cpu" else 9))
    _, rows = lines(path)
    assert rows[4]["grad_norm"] is None
    assert not rows[4]["finite"]
    assert rows[4]["per_parameter"] == {"a": 1.0, "b": None, "c": 1.0}
    assert rows[5]["per_parameter"]["b"] is None


def test_a_run_that_stays_not_finite_is_not_written_at_every_step(tmp_path, monkeypatch):
    clipper, params = made(recorder={}, on_nonfinite="ignore")
    written, write = [], clipper.recorder.write
    monkeypatch.setattr(clipper.recorder, "write", lambda: written.append(write()))
    for _ in range(200):
        step(clipper, params, [math.nan, 1.0, 1.0])
    assert 10 < len(written) < 25
    clipper.recorder.close()
    assert len(lines(tmp_path / "gradclip.trace.jsonl")[1]) == 200


def test_an_error_of_ours_leaves_the_step_on_file(tmp_path):
    clipper, params = made(recorder={}, on_nonfinite="raise")
    step(clipper, params, [1.0, 0.0, 0.0], batch=0)
    with pytest.raises(NonFiniteError):
        step(clipper, params, [1.0, 0.0, math.nan], batch=1)
    header, rows = lines(tmp_path / "gradclip.trace.jsonl")
    assert [row["batch"] for row in rows] == [0, 1]
    assert rows[1]["per_parameter"] == {"a": 1.0, "b": 0.0, "c": None}
    assert header["counts"] == {"steps": 2, "clipped": 0, "skipped": 1, "nonfinite": 1}
    assert clipper.state_dict()["counts"]["steps"] == 1


def test_a_bound_that_is_reached_leaves_the_step_on_file(tmp_path):
    policies = [{"type": "skip_large", "limit": 5.0, "max_consecutive": 1, "fallback": "raise"}]
    clipper, params = made(recorder={}, policies=policies)
    step(clipper, params, [9.0, 0.0, 0.0])
    with pytest.raises(SkipLimitError):
        step(clipper, params, [90.0, 0.0, 0.0])
    assert lines(tmp_path / "gradclip.trace.jsonl")[1][-1]["grad_norm"] == 90.0


def test_it_is_written_when_the_clipper_ends_and_never_over_another_runs(tmp_path):
    for name in ("gradclip.trace.jsonl", "gradclip-1.trace.jsonl"):
        clipper, params = made(recorder={})
        step(clipper, params, [1.0, 0.0, 0.0])
        assert not (tmp_path / name).exists()
        del clipper
        gc.collect()
        assert (tmp_path / name).exists()


def test_it_is_written_before_another_runs_state_is_taken_in(tmp_path):
    clipper, params = made(recorder={})
    step(clipper, params, [3.0, 0.0, 0.0])
    saved = clipper.state_dict()
    step(clipper, params, [0.0, 0.5, 0.0])
    with pytest.raises(ConfigError):
        clipper.load_state_dict(saved | {"policies": []})
    assert not list(tmp_path.iterdir())
    clipper.load_state_dict(saved)
    clipper.load_state_dict(saved)
    [file] = tmp_path.iterdir()
    header, rows = lines(file)
    assert header["counts"] == {"steps": 2, "clipped": 1, "skipped": 0, "nonfinite": 0}
    assert [(row["step"], row["grad_norm"]) for row in rows] == [(0, 3.0), (1, 0.5)]
    step(clipper, params, [0.0, 0.0, 7.0])
    clipper.recorder.close()
    assert lines(file)[1] == rows
    _, [row] = lines(tmp_path / "gradclip-1.trace.jsonl")
    assert (row["step"], row["grad_norm"]) == (1, 7.0)


@pytest.mark.parametrize("same_run", [True, False])
def test_the_clipper_of_a_new_optimizer_goes_on_in_the_file_of_its_run(tmp_path, same_run):
    clipper, params = made(recorder={})
    step(clipper, params, [3.0, 0.0, 0.0])
    again, params = made(recorder={})
    again.go_on_from([clipper], same_run=same_run)
    del clipper
    gc.collect()
    step(again, params, [0.0, 5.0, 0.0])
    del again
    gc.collect()
    found = {}
    for file in tmp_path.iterdir():
        found[file.name] = [(row["step"], row["grad_norm"]) for row in lines(file)[1]]
    first, second = (0, 3.0), (1, 5.0)
    apart = {"gradclip.trace.jsonl": [first], "gradclip-1.trace.jsonl": [second]}
    assert found == ({"gradclip.trace.jsonl": [first, second]} if same_run else apart)


def test_a_resumed_run_that_made_no_step_writes_no_file(tmp_path):
    before, params = made(recorder=None)
    step(before, params, [3.0, 0.0, 0.0])
    clipper, _ = made(recorder={})
    clipper.load_state_dict(before.state_dict())
    clipper.recorder.close()
    assert not list(tmp_path.iterdir())


def test_it_is_written_when_training_raises(tmp_path):
    code = """
import torch
from gradclip import GradientClipper

weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
config = {"policies": [{"type": "norm", "max_norm": 1.0}], "recorder": {}}
clipper = GradientClipper(config, [("weight", weight)], optimizer)
clipper.attach(optimizer)
for i in range(3):
    weight.grad = torch.full((2,), float(i))
    optimizer.step()
raise RuntimeError("out of data")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert b"out of data" in ran.stderr
    assert len(lines(tmp_path / "gradclip.trace.jsonl")[1]) == 3


def test_it_is_written_to_any_path_on_request_and_not_without_one(tmp_path):
    clipper, params = made()
    assert clipper.recorder.write(tmp_path / "none.jsonl") is None
    step(clipper, params, [1.0, 0.0, 0.0])
    assert clipper.recorder.write(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match=r"give a path, or add `recorder: \{\}`"):
        clipper.recorder.write()
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


PATHS = {
    "a folder of that name": "folder",
    "a file in the way": "file/deep/run.jsonl",
    "a file in the way of a Parquet file": "file/run.parquet",
    "a name that is too long": "n" * 300,
    "a name that no file can have": "a\0b.jsonl",
}


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
def test_a_path_that_cannot_be_written_is_refused_when_built(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for file in (name, str(tmp_path / name)):
        with pytest.raises(ConfigError, match=r"^recorder\.file: .* can't be written") as info:
            made(recorder={"file": file})
        assert "allowed: a file in a folder that is there or can be made" in str(info.value)
    clippers = ClipperSet([made(recorder={"file": "new/run.jsonl"})[0]])
    with pytest.raises(ConfigError, match=r"^recorder\.file: .* can't be written"):
        clippers.place_records(tmp_path / "file")
    clippers.place_records(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_parquet_without_pyarrow_is_refused_when_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'gradclip\[parquet\]'"):
        made(recorder={"file": "run.parquet"})


def test_what_cannot_be_written_later_is_one_warning_and_training_goes_on(tmp_path, caplog):
    clipper, params = made(recorder={"file": "sub/run.jsonl"}, on_nonfinite="raise")
    step(clipper, params, [3.0, 0.0, 4.0])
    (tmp_path / "sub").touch()  # a file where the folder would be made
    for _ in range(3):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):  # not the file's error
            step(clipper, params, [math.nan, 0.0, 0.0])
    ClipperSet([clipper]).close()  # as adapters do, with an error of the user's on its way
    assert float(step(clipper, params, [0.0, 3.0, 4.0]).clipped_norm) == pytest.approx(1.0)
    [said] = caplog.records
    assert said.levelname == "WARNING"
    for part in ("wasn't written to", str(tmp_path / "sub/run.jsonl"), "Training goes on"):
        assert part in said.getMessage()
    for path in (None, "sub/x.jsonl"):  # who asks for it is told
        with pytest.raises(OSError, match="sub"):
            clipper.recorder.write(path)
    (tmp_path / "sub").unlink()
    clipper.recorder.close()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["run.jsonl"]
    assert len(lines(tmp_path / "sub" / "run.jsonl")[1]) == 5


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_a_nan_is_withheld_though_its_record_cannot_be_written(tmp_path, caplog, kernel):
    clipper, params = made(recorder={"file": "sub/run.jsonl"}, kernel=kernel)
    (tmp_path / "sub").touch()
    for i in range(40):
        record = step(clipper, params, [math.nan if i % 20 == 10 else 1.0, 0.0, 0.0])
        assert bool(record.skipped) == (i % 20 == 10)
    counts = clipper.state_dict()["counts"]
    clipper.load_state_dict(clipper.state_dict())  # writes the file of the steps before
    assert counts["skipped"] == counts["nonfinite"] == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def in_a_worker(work):
    """Run this in a forked worker of multiprocessing, which ends by os._exit; its exit code."""
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    return worker.exitcode


def test_a_full_disk_ends_no_run_and_leaves_nothing_behind(tmp_path):
    def fills_it():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        clipper, params = made(recorder={})
        for i in range(20):
            record = step(clipper, params, [math.nan if i == 10 else 1.0, 0.0, 0.0])
            assert bool(record.skipped) == (i == 10)

    assert in_a_worker(fills_it) == 0
    assert not list(tmp_path.iterdir())


ALIVE = []


def five_steps():
    clipper, params = made(recorder={})
    ALIVE.append(clipper)  # so that only the end of its process ends it
    for _ in range(5):
        step(clipper, params, [1.0, 0.0, 0.0])
    return clipper, params


def returns():
    five_steps()


def raises():
    five_steps()
    raise RuntimeError


def is_terminated():
    five_steps()
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError


@pytest.mark.parametrize(
    ("work", "code"), [(returns, 0), (raises, 1), (is_terminated, -signal.SIGTERM)]
)
def test_it_is_written_however_a_worker_process_ends(tmp_path, work, code):
    clipper, params = made(recorder={})
    step(clipper, params, [1.0, 0.0, 0.0])  # the parent's own, which stays with it
    assert in_a_worker(work) == code
    [file] = tmp_path.iterdir()
    assert len(lines(file)[1]) == 5


def test_a_forked_process_and_a_copy_have_files_of_their_own(tmp_path):
    clipper, params = made(recorder={})
    step(clipper, params, [1.0, 0.0, 0.0])
    assert in_a_worker(lambda: None) == 0
    assert not list(tmp_path.iterdir())
    first = clipper.recorder.write()

    def goes_on():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        step(clipper, params, [2.0, 0.0, 0.0])

    assert in_a_worker(goes_on) == 0
    copied = copy.deepcopy(clipper.recorder)
    copied.close()
    assert [row["grad_norm"] for row in lines(first)[1]] == [1.0]
    [second] = set(tmp_path.iterdir()) - {first}
    assert [row["grad_norm"] for row in lines(second)[1]] == [1.0, 2.0]
    third = copied.write()
    assert third not in (first, second)


def mine(*_):
    os._exit(7)


def test_sigterm_is_left_to_whoever_waits_for_it(tmp_path):
    def before():
        signal.signal(signal.SIGTERM, mine)
        five_steps()
        os.kill(os.getpid(), signal.SIGTERM)

    def after_and_chained():
        kept = five_steps()
        ours = signal.getsignal(signal.SIGTERM)

        def theirs(*args):
            ours(*args)  # as Lightning calls the handlers that it finds
            step(*kept, [1.0, 0.0, 0.0])
            mine()

        signal.signal(signal.SIGTERM, theirs)
        os.kill(os.getpid(), signal.SIGTERM)

    def in_a_thread():
        thread = threading.Thread(target=five_steps)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def without_a_recorder():
        clipper, params = made()
        step(clipper, params, [1.0, 0.0, 0.0])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert [in_a_worker(work) for work in (before, in_a_thread, without_a_recorder)] == [7, 0, 0]
    for path in tmp_path.iterdir():
        path.unlink()
    assert in_a_worker(after_and_chained) == 7
    [file] = tmp_path.iterdir()
    assert len(lines(file)[1]) == 5


def test_its_name_has_the_folder_and_the_tag(tmp_path):
    clipper, params = made(recorder={"file": "run.jsonl"})
    clipper.recorder.folder, clipper.recorder.tag = tmp_path / "deep" / "er", ".optimizer1"
    step(clipper, params, [1.0, 0.0, 0.0])
    assert clipper.recorder.write() == tmp_path / "deep" / "er" / "run.optimizer1.jsonl"


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
def test_parameters_that_come_and_go_are_followed_and_no_step_is_lost(kernel):
    params = {name: torch.nn.Parameter(torch.zeros(2)) for name in "abc"}
    optimizer = torch.optim.SGD([params["a"], params["c"]], lr=0.1)
    log = {"per_parameter": True, "per_group": True, "histograms": True}
    config = {"policies": FIXED, "recorder": {"worst": 2}, "log": log}
    clipper = GradientClipper(config, params.items(), optimizer, kernel=kernel)
    step(clipper, params, [3.0, None, 4.0])
    step(clipper, params, [math.nan, None, 4.0])
    optimizer.add_param_group({"params": [params["b"]]})
    step(clipper, params, [0.0, 2.0, 0.0])
    optimizer.param_groups[0]["params"] = [params["a"]]
    step(clipper, params, [60.0, 80.0, None])
    metrics = clipper.flush()
    wanted = {"grad_norm": 107 / 3, "grad_norm_max": 100, "clipped": 3, "nonfinite": 1}
    wanted |= {"clip_rate": 3 / 4, "clip_rate_window": 3 / 4}
    wanted |= {"grad_norms/a": 63 / 3, "grad_norms/b": 82 / 2, "grad_norms/c": 4 / 2}
    wanted |= {"grad_norms/group/group0": 65 / 3, "grad_norms/group/group1": 82 / 2}
    assert {key: metrics[f"clip/{key}"] for key in wanted} == pytest.approx(wanted)
    assert clipper.recorder.norms == pytest.approx([5.0, 2.0, 100.0])
    header, rows = lines(clipper.recorder.write())
    assert header["parameters"] == ["a", "b"]
    named = {row["step"]: row["per_parameter"] for row in rows if "per_parameter" in row}
    assert named == {
        0: {"a": 3.0, "c": 4.0},
        1: {"a": None, "c": 4.0},
        3: {"a": 60.0, "b": 80.0},
    }
    step(clipper, params, [0.0, 1.0, None])
    assert [key for key in clipper.flush() if "grad_norms" in key] == [
        *("clip/grad_norms/a", "clip/grad_norms/b"),
        *("clip/grad_norms/group/group0", "clip/grad_norms/group/group1"),
    ]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "gradclip"]


def test_a_limit_that_never_or_always_binds_is_said_once(caplog):
    for norm, word in ((0.5, "none"), (2.0, "each")):
        caplog.clear()
        clipper, params = made(log={"warn_after": 20})
        with caplog.at_level(logging.WARNING, "gradclip"):
            for i in range(100):
                step(clipper, params, [norm, 0.0, 0.0])
                if i % 10 == 9:
                    clipper.flush()
                assert len(warnings_of(caplog)) == (i >= 19)
        assert f"in {word} of the last 20 steps" in warnings_of(caplog)[0]


def test_a_limit_that_sometimes_binds_or_is_infinite_is_not_worth_a_word(caplog):
    for policies, norms in (
        (FIXED, (0.5, 2.0)),
        ([{"type": "norm", "max_norm": math.inf}], (1.0,)),
    ):
        clipper, params = made(policies=policies, log={"warn_after": 5})
        for i in range(40):
            step(clipper, params, [norms[i % len(norms)], 0.0, 0.0])
        clipper.flush()
    assert not warnings_of(caplog)


def test_withheld_steps_in_a_row_are_said_once(caplog):
    clipper, params = made(log={"warn_skips": 3})
    for i in range(20):
        step(clipper, params, [math.nan if i % 4 else 1.0, 0.0, 0.0])
    clipper.flush()
    [said] = warnings_of(caplog)
    assert "3 steps in a row were withheld" in said
