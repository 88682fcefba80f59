"""A report says what happened, whom to blame, and where it has that from."""

import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from support import spiky_run
from support.spiky_run import BOLD, BROKEN, MARKUP, NAMES, SCRIPT, SPIKE

from gradclip import GradientClipper
from gradclip.tools.main import main
from gradclip.tools.report import MOST_MARKS, summarize
from gradclip.tools.run import Run, open_run
from gradclip.tools.trace import Trace, TraceHeader, write_trace


class Source:
    """A trace that is read in another way."""

    def __init__(self, trace, read):
        self.path, self.header, self.size_hint = trace.path, trace.header, trace.size_hint
        self.chunks = lambda _: read()


COUNTS = ("steps", "clipped", "skipped", "nonfinite")


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, arguments)])
        found = capsys.readouterr()
        return stop.value.code or 0, found.out, found.err

    return run


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_json_names_counts_and_culprits(call, tmp_path, suffix):
    trace = spiky_run.write(tmp_path / f"run.{suffix}", first=1000)
    code, out, _ = call(trace, "--json", "--out", "sub/page.html")
    found = json.loads(out)
    assert code == 0
    assert (tmp_path / found["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert found["steps"] == 100
    assert (found["clipped"], found["clip_rate"], found["skipped"]) == (1, 0.01, 1)
    shown = {"first_step": 1000, "last_step": 1099, "steps": 100, "clipped": 1, "skipped": 1}
    assert found["shown"] == shown
    assert found["nonfinite"] == 1
    worst = found["worst"][0]
    assert (worst["step"], worst["batch"]) == (1000 + SPIKE, 2 * (1000 + SPIKE))
    assert (worst["grad_norm"], worst["limit"], worst["coef"]) == (10.0, 2.0, 0.2)
    shares = {one["parameter"]: one["share"] for one in worst["shares"]}
    assert shares == pytest.approx({MARKUP: 0.64, BOLD: 0.36, NAMES[0]: 0, SCRIPT: 0})
    assert len(found["worst"]) == 1
    (broken,) = found["not_finite"]
    assert broken["step"] == 1000 + BROKEN
    assert broken["grad_norm"] is None
    assert broken["not_finite"] == [SCRIPT, NAMES[0]]


def test_text_tells_the_same(call, tmp_path):
    trace = spiky_run.write(tmp_path / "run.jsonl")
    code, out, _ = call(trace)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "clipped 1.00% 1 step" in lines
    assert f"40 80 10 2 scaled by 0.2 64.0% {MARKUP}, 36.0% {BOLD}" in lines
    assert f"70 140 withheld {SCRIPT}, embed.weight" in lines
    assert lines[-1] == "Wrote report.html"
    assert (tmp_path / "report.html").exists()


def test_a_name_is_never_broken(call, tmp_path, monkeypatch):
    """In a narrow terminal it has a line of its own; a longer one is left to the terminal."""
    long = [f"transformer.h.{i}.attention.c_proj.{'weight' * i}" for i in range(9)]
    norms = dict.fromkeys(long, 1.0)
    rows = [
        {"step": 0, "grad_norm": 3.0, "limit": 1.0, "per_parameter": norms},
        {"step": 1, "grad_norm": math.nan, "per_parameter": dict.fromkeys(long, math.nan)},
    ]
    write_trace(tmp_path / "run.jsonl", TraceHeader(), rows)
    for columns in ("40", "80", "1000"):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, _ = call("run.jsonl")
        assert code == 0
        assert all(name in out for name in long)
        assert f"11.1% {long[0]}" in out
        lines = [line for line in out.splitlines() if "transformer" not in line]
        assert max(map(len, lines)) <= int(columns)


def test_a_part_of_the_steps_and_a_limit_known_from_elsewhere(call, tmp_path):
    trace = spiky_run.write(tmp_path / "run.jsonl", counts=dict.fromkeys(COUNTS, 999))
    _, out, _ = call(trace, "--steps", "30:60", "--json", "--plot", "run.png")
    found = json.loads(out)
    assert (found["steps"], found["clipped"], found["nonfinite"]) == (30, 1, 0)
    assert (found["shown"]["first_step"], found["shown"]["last_step"]) == (30, 59)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = call(trace, "--limit", "1.0")
    assert (code, "holds the limits of its steps already" in err) == (2, True)
    (tmp_path / "log.csv").write_text("step,grad_norm\n0,1.0\n1,2.0\n")
    _, out, _ = call("log.csv", "--limit", "1.5", "--json")
    assert json.loads(out)["clipped"] == 1


def test_names_are_no_markup_in_the_terminal_either(call, tmp_path):
    name = "[red]layer[/red]"
    rows = [{"step": 0, "grad_norm": 1.0, "per_parameter": {name: 1.0}}]
    write_trace(tmp_path / "[b]run[/b].jsonl", TraceHeader(), rows)
    _, out, _ = call("[b]run[/b].jsonl")
    assert name in out
    assert "[b]run[/b].jsonl" in out


def test_a_flight_record(call, tmp_path, monkeypatch):
    """The file of a real recorder: the last 20 of 60 steps, and earlier ones that stood out."""
    params = {name: torch.nn.Parameter(torch.zeros(1)) for name in NAMES}
    clipper = GradientClipper(
        {"policies": [{"type": "norm", "max_norm": 2.0}], "recorder": {"steps": 20, "worst": 2}},
        params.items(),
    )
    for step in range(60):
        norms = {5: (0, 8, 0, 6), 15: (math.nan, 1, 1, 1), 55: (0, 0, 3, 4)}.get(step, (1, 0, 0, 0))
        for parameter, norm in zip(params.values(), norms, strict=True):
            parameter.grad = torch.tensor([float(norm)])
        clipper.clip()
    clipper.recorder.write("run.jsonl")
    _, out, _ = call("run.jsonl", "--json")
    found = json.loads(out)
    assert (found["steps"], found["clipped"], found["nonfinite"]) == (60, 2, 1)
    shown = {"first_step": 40, "last_step": 59, "steps": 20, "clipped": 1, "skipped": 0}
    assert found["shown"] == shown
    assert [spike["step"] for spike in found["worst"]] == [5, 55]
    first = found["worst"][0]
    assert [one["parameter"] for one in first["shares"][:2]] == [MARKUP, BOLD]
    assert first["shares"][0]["share"] == pytest.approx(0.64)
    assert [(one["step"], one["not_finite"]) for one in found["not_finite"]] == [(15, [NAMES[0]])]
    report = summarize(open_run(tmp_path / "run.jsonl"))
    assert report.norm.step.tolist() == list(range(40, 60))
    _, out, _ = call("run.jsonl")
    assert "The chart shows the last 20, steps 40 to 59" in out


def test_shares_follow_the_norm_of_the_trace(tmp_path):
    trace = spiky_run.write(tmp_path / "run.jsonl", norm_type=math.inf)
    report = summarize(open_run(trace))
    assert report.worst[0].shares[:2] == ((MARKUP, 1.0), (BOLD, 0.75))


def test_the_newest_trace_of_a_folder_is_taken(call, tmp_path):
    for age, name in enumerate(("a/new.trace.jsonl", "b/old.jsonl", "b/older.parquet")):
        path = spiky_run.write(tmp_path / "runs" / name, steps=80 - age)
        os.utime(path, ns=(10**18 - age, 10**18 - age))
    (tmp_path / "runs" / "data.jsonl").write_text('{"text": "no trace"}\n')
    (tmp_path / "runs" / "data.parquet").write_bytes(b"PAR1 no trace PAR1")
    _, out, _ = call("runs", "--json")
    found = json.loads(out)
    assert found["run"] == os.path.join("runs", "a", "new.trace.jsonl")
    assert found["steps"] == 80
    assert found["notes"] == ["The newest of 3 traces in runs."]


@pytest.mark.parametrize("norm", ["clip/grad_norm", "grad_norm"])
def test_a_log_is_enough(call, tmp_path, norm):
    """Norms and limits, as another trainer logs them: those above were clipped."""
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", norm, "clip/limit"])
        writer.writerows([10 * i, 5.0 if i % 4 == 0 else 1.0, 2.0] for i in range(20))
    code, out, _ = call("logs", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["steps"], found["clipped"], found["shown"]["last_step"]) == (20, 5, 190)
    assert found["worst"][0]["shares"] == []


def test_a_log_of_norms_alone_leaves_the_clip_rate_open(call, tmp_path):
    (tmp_path / "log.csv").write_text("step,grad_norm\n0,1.0\n1,2.0\n")
    code, out, _ = call("log.csv", "--json")
    found = json.loads(out)
    assert (code, found["steps"]) == (0, 2)
    assert found["clipped"] is found["clip_rate"] is None
    _, out, _ = call("log.csv")
    assert "unknown" in out


def test_nothing_to_report_is_a_problem_and_the_wrong_file_a_mistake(call, tmp_path):
    write_trace(tmp_path / "empty.jsonl", TraceHeader(), [])
    code, _, err = call("empty.jsonl")
    assert (code, "no steps" in err) == (1, True)
    (tmp_path / "new.jsonl").write_text('{"format": "gradclip-trace", "version": 99}\n')
    code, _, err = call("new.jsonl")
    assert (code, "version is 99" in err) == (2, True)
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no trace PAR1")
    assert call("data.parquet")[0] == 2
    (tmp_path / "file").write_text("")
    code, _, err = call(spiky_run.write(tmp_path / "run.jsonl"), "--out", "file/page.html")
    assert (code, "Not a directory" in err or "exists" in err) == (2, True)


def test_worst_steps_do_not_depend_on_how_the_trace_is_read(tmp_path):
    random = np.random.default_rng(0)
    norms = random.lognormal(0, 1, 300)
    norms[[7, 150, 151]] = np.nan
    named = {int(step): {"a": norms[step]} for step in range(0, 300, 9)}
    rows = [
        {"step": i, "grad_norm": float(n), **({"per_parameter": named[i]} if i in named else {})}
        for i, n in enumerate(norms)
    ]
    write_trace(tmp_path / "run.jsonl", TraceHeader(), rows)
    trace = Trace.open(tmp_path / "run.jsonl")
    ranked = [int(i) for i in np.argsort(-norms) if np.isfinite(norms[i])]
    best = [i for i in ranked if i in named][:16]
    for size in (1, 7, 1000):
        report = summarize(Run(Source(trace, lambda size=size: trace.chunks(size))))
        assert [spike.step for spike in report.worst] == best
        assert report.largest.step == ranked[0]
        assert [spike.step for spike in report.broken] == [7, 150, 151]


def test_a_report_does_not_grow_with_the_run(tmp_path):
    trace = Trace.open(spiky_run.write(tmp_path / "run.jsonl"))
    chunk = trace.read()
    chunk.clipped[:] = True

    def chunks():
        for index in range(1000):
            chunk.step[:] = np.arange(100) + 100 * index
            yield chunk

    shares_read = []
    report = summarize(Run(Source(trace, chunks)), shares_read.append)
    assert report.clipping.counts == (100_000, 100_000, 1000)
    assert len(report.clipping.clipped) <= MOST_MARKS
    assert len(report.norm.step) <= 2000
    assert len(report.worst) <= 24
    assert len(shares_read) == 1000
    assert max(shares_read) == 1.0
