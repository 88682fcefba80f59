"""What is kept of the last steps: metrics between log entries, warnings, the flight record."""

import gc
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.logged import expected_entries

from gradclip import ConfigError, GradientClipper, NonFiniteError, SkipLimitError

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
    """One step in which each parameter's gradient has this norm."""
    for parameter, norm in zip(params.values(), norms, strict=True):
        parameter.grad = torch.tensor([0.0, norm])
    clipper.batch = batch
    return clipper.clip()


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
    grads[9] = [0.0, 0.0, 0.0]
    norms = [[torch.tensor(norm) for norm in step] for step in grads]
    parts = {name: slice(i, i + 1) for i, name in enumerate(NAMES)}
    parts |= {"group/early": slice(0, 2), "group/late": slice(2, 3)}
    expected = expected_entries(norms, range(every - 1, len(grads), every), 1.0, parts)
    for index, norms in enumerate(grads):
        step(clipper, params, norms)
        if index in expected:
            assert clipper.flush() == pytest.approx(expected[index], rel=1e-6)
            assert clipper.flush() == {}


def test_metrics_of_one_step_that_has_no_norm_to_show():
    clipper, params = made()
    for value, nonfinite in ((math.nan, 1), (0.0, 0)):
        step(clipper, params, [value, 0.0, 0.0])
        metrics = clipper.flush()
        assert math.isnan(metrics["clip/grad_norm"])
        assert math.isnan(metrics["clip/grad_norm_max"])
        assert metrics["clip/limit"] == math.inf
        assert metrics["clip/nonfinite"] == metrics["clip/skipped"] == nonfinite
        assert metrics["clip/clip_rate_window"] == 0


def test_the_clip_rate_goes_on_after_a_resume_and_so_do_step_numbers(tmp_path):
    clipper, params = made()
    for norms in [[2.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]:
        step(clipper, params, norms)
    other, params = made(recorder={})
    other.load_state_dict(clipper.state_dict())
    step(other, params, [0.5, 0.0, 0.0])
    assert other.flush()["clip/clip_rate"] == pytest.approx(1 / 3)
    _, rows = lines(other.recorder.write())
    assert [row["step"] for row in rows] == [3]


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


def test_its_name_has_the_folder_and_the_tag(tmp_path):
    clipper, params = made(recorder={"file": "run.jsonl"})
    clipper.recorder.folder, clipper.recorder.tag = tmp_path / "deep" / "er", ".optimizer1"
    step(clipper, params, [1.0, 0.0, 0.0])
    assert clipper.recorder.write() == tmp_path / "deep" / "er" / "run.optimizer1.jsonl"


def test_parameters_that_are_added_are_followed():
    params = {name: torch.nn.Parameter(torch.zeros(2)) for name in "ab"}
    optimizer = torch.optim.SGD([params["a"]], lr=0.1)
    clipper = GradientClipper({"policies": FIXED, "recorder": {}}, params.items(), optimizer)
    step(clipper, params, [1.0, 0.0])
    optimizer.add_param_group({"params": [params["b"]]})
    step(clipper, params, [0.0, 3.0])
    header, rows = lines(clipper.recorder.write())
    assert header["parameters"] == ["a", "b"]
    assert rows[1]["per_parameter"]["b"] == 3.0


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
