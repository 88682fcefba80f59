"""`gradclip replay` and `gradclip recommend` as a user calls them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from gradclip import load_yaml
from gradclip.config import parse_mapping
from gradclip.tools.main import main
from gradclip.tools.trace import TraceHeader, write_trace


@pytest.fixture
def trace(tmp_path):
    norms = np.random.default_rng(0).lognormal(sigma=0.4, size=400)
    rows = [{"step": step, "grad_norm": float(norm)} for step, norm in enumerate(norms)]
    write_trace(tmp_path / "run.jsonl", TraceHeader(), rows)
    return tmp_path / "run.jsonl"


@pytest.fixture
def config(tmp_path):
    def write(name, *policies, **more):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"policies": list(policies), **more}))
        return str(path)

    return write


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_configurations_side_by_side(trace, config, capsys):
    tight = config("tight.yaml", {"type": "norm", "max_norm": 0.5})
    strict = config(
        "strict.yaml",
        {"type": "skip_large", "limit": 0.4, "max_consecutive": 2, "fallback": "raise"},
    )
    assert call("replay", trace, "-c", tight, "--config", strict) == 0
    shown = capsys.readouterr()
    (line,) = [line.split() for line in shown.out.splitlines() if line.startswith("tight ")]
    assert line[1].endswith("%")
    assert line[3:6] == ["0.5"] * 3
    assert "strict: training would have ended at step" in shown.out
    assert "max_consecutive 2" in " ".join(shown.out.split())
    assert "another way" in " ".join(shown.out.split())
    assert shown.err == ""


def test_replay_as_json_with_pictures(trace, config, tmp_path, capsys):
    here = config("a/clip.yaml", {"type": "norm", "max_norm": 0.5})
    there = config("b/clip.yaml", {"type": "zclip", "max_norm": None})
    png, html = tmp_path / "out.png", tmp_path / "out.html"
    files = ("--plot", png, "--out", html)
    assert (
        call("replay", trace, "-c", here, "-c", there, *files, "--steps", "10:110", "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["first_step"], found["last_step"], found["steps"]) == (10, 109, 100)
    fixed, adaptive = found["outcomes"]
    assert (fixed["name"], adaptive["name"]) == (here, there), "alike but for their folders"
    assert fixed["limit_median"] == 0.5
    assert fixed["clipped"] == round(100 * fixed["clip_rate"]) > 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<html" in html.read_text()


def test_a_log_is_enough_and_a_long_name_is_not_broken(trace, config, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    log = trace.with_name("log.csv")
    log.write_text("gnorm\n" + "".join(f"{i % 7}\n" for i in range(300)))
    long = config(f"{'long' * 20}.yaml", {"type": "norm", "max_norm": 5.0})
    assert call("replay", log, "-c", long) == 0
    shown = capsys.readouterr().out
    assert "long" * 20 in shown
    assert "Note: no column names the step: rows with a norm are counted from 0." in shown
    assert call("recommend", log) == 0
    assert "257 steps with a norm" in capsys.readouterr().out


def test_recommended_settings_are_ready_to_use(trace, tmp_path, capsys):
    out = tmp_path / "clip.yaml"
    assert call("recommend", trace, "--clip-rate", "0.2", "--out", out) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"Wrote {out}\n")
    documents = list(yaml.safe_load_all(text[text.index("---") : text.index("Wrote")]))
    assert [parse_mapping(d).policies[0].type for d in documents] == ["autoclip", "norm"]
    assert "skip_spike" not in text, "its rate is never sure"
    assert load_yaml(out) == parse_mapping(documents[0])
    assert "To clip 20 % of the steps take autoclip" in text
    assert call("recommend", trace, "--clip-rate", "0.2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["taken"] == "autoclip"
    assert yaml.safe_load(found["options"][1]["yaml"]) == documents[0]


WRONG = [
    (["replay", "run.jsonl"], "--config"),
    (["replay", "gone.jsonl", "-c", "agc.yaml"], "gone.jsonl"),
    (["replay", "run.jsonl", "-c", "agc.yaml"], "agc: policies[0], 'agc', can't be replayed"),
    (["replay", "run.jsonl", "-c", "norm.yaml", "--steps", "5"], "--steps is '5'"),
    (["replay", "run.jsonl", "-c", "norm.yaml", "--steps", "900:"], "no step from 900"),
    (["replay", "run.jsonl", "-c", "norm.yaml", "--plot", "no/a.png"], "no/a.png"),
    (
        ["replay", "norm.yaml", "-c", "norm.yaml", "--plot", "a.svg"],
        "a.svg: a picture is a PNG",
    ),
    (["replay", "run.jsonl", "-c", "norm.yaml", "--plot", "a"], "such as a.png"),
    (["replay", "norm.yaml", "-c", "norm.yaml"], "norm.yaml: no column is named like a gradient"),
    (["report", "run.jsonl", "--plot", "a.svg"], "a.svg: a picture is a PNG"),
    (["report", "run.jsonl", "--plot", "no/a.png"], "no/a.png"),
    (["recommend", "run.jsonl", "--clip-rate", "5"], "clip rate is 5"),
    (["recommend", "run.jsonl", "--steps", ":100"], "100 steps have a norm"),
    (["recommend", "run.jsonl", "--out", "no/clip.yaml"], "no/clip.yaml"),
]


def test_what_is_called_wrongly_is_told(trace, config, monkeypatch, capsys, subtests):
    config("agc.yaml", {"type": "agc"})
    config("norm.yaml", {"type": "norm", "max_norm": 1.0})
    monkeypatch.chdir(trace.parent)
    for arguments, words in WRONG:
        with subtests.test(words):
            assert call(*arguments) == 2
            shown = capsys.readouterr()
            assert words in " ".join(shown.err.split())
            assert shown.out == ""


OWN_INPUTS = [
    ["import", "log.csv", "--overwrite", "-o", "log.csv"],
    ["import", "logs", "--overwrite", "-o", "logs/metrics.csv"],
    ["report", "run.jsonl", "-o", "run.jsonl"],
    ["report", ".", "-o", "./link.html"],
    ["replay", "run.jsonl", "-c", "norm.yaml", "--out", "run.jsonl"],
    ["replay", "run.jsonl", "-c", "norm.yaml", "--out", "norm.yaml"],
    ["replay", "run.jsonl", "-c", "norm.yaml", "--plot", "link.png"],
    ["report", "run.jsonl", "--plot", "link.png"],
    ["recommend", "run.jsonl", "-o", "run.jsonl"],
]


def test_what_is_read_is_never_written_over(trace, config, monkeypatch, capsys, subtests):
    monkeypatch.chdir(trace.parent)
    Path("link.png").symlink_to(trace)
    Path("link.html").hardlink_to(trace)
    Path("logs").mkdir()
    for log in (Path("log.csv"), Path("logs/metrics.csv")):
        log.write_text("step,grad_norm\n0,1\n")
    config("norm.yaml", {"type": "norm", "max_norm": 1.0})
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    for arguments in OWN_INPUTS:
        with subtests.test(" ".join(arguments)):
            assert call(*arguments) == 2
            assert f"{Path(arguments[-1])} is what is read here" in capsys.readouterr().err
            assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before
