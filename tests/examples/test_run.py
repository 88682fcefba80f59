"""The examples, run as a user runs them, only smaller."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
COMMANDS = {
    "plain_loop": ["--small", "--steps", "4"],
    "lightning_gpt": ["--small", "--steps", "4", "--config", "fixed_norm"],
    "accelerate_gpt": ["--small", "--steps", "4"],
    "demo": ["--small", "--steps", "3"],
}
OUTPUT = {
    "lightning_gpt": ("--out", "run.json"),
    "accelerate_gpt": ("--out", "run.jsonl"),
    "demo": ("--folder", "demo"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What each example printed, by name, and the folder it wrote to; all run at once."""
    folder = tmp_path_factory.mktemp("examples")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    (folder / "configs").symlink_to(ROOT / "configs")
    started = {}
    for name, arguments in COMMANDS.items():
        option, file = OUTPUT.get(name, ("", ""))
        where = [option, str(folder / file)] if option else []
        started[name] = subprocess.Popen(
            [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, *where],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    printed = {}
    for name, process in started.items():
        printed[name], _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}:\n{printed[name]}"
    return printed, folder


def test_plain_loop_says_what_was_clipped(finished):
    assert re.search(r"\d+% of the steps were clipped", finished[0]["plain_loop"])


def test_lightning_leaves_every_step(finished):
    printed, folder = finished
    assert re.search(r"validation loss 4\.\d+, clipped 100% of steps", printed["lightning_gpt"])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert len(run["loss"]) == len(run["grad_norm"]) == 4
    assert max(run["clipped_norm"]) <= 1.0 < min(run["grad_norm"])
    logged = next((folder / "demo" / "lightning_logs").glob("*/metrics.csv"))
    assert "validation_loss" in logged.read_text(encoding="utf-8")


def test_accelerate_script_runs_without_us(finished):
    _, folder = finished
    lines = (folder / "run.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("step") for line in lines] == [0, 1, 2, 3, None]
    assert json.loads(lines[-1])["validation_loss"] > 4
    assert "clip" not in re.sub("clip_grad_norm_", "", code_of("accelerate_gpt"))


def code_of(name):
    """An example without its docstring."""
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""', 2)[2]


def test_demo_leaves_table_and_picture(finished):
    printed, folder = finished
    table = (folder / "demo" / "table.txt").read_text(encoding="utf-8")
    for name in ("no clipping", "fixed norm 1.0", "auto", "auto, Accelerate"):
        assert name in table
        assert name in printed["demo"]
    picture = (folder / "demo" / "clipping.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
    assert "<svg" in (folder / "demo" / "report.html").read_text(encoding="utf-8")
    [trace] = (folder / "demo" / "lightning_logs").rglob("gradclip.trace.jsonl")
    _, *steps = trace.read_text(encoding="utf-8").splitlines()
    assert [json.loads(step)["batch"] for step in steps] == [0, 1, 2]
    runs = json.loads((folder / "demo" / "runs.json").read_text(encoding="utf-8"))
    assert [len(run["loss"]) for run in runs.values()] == [3, 3, 3, 3]
    free, fixed, auto, accelerated = runs.values()
    assert (free["clip_rate"], fixed["clip_rate"]) == (0, 1)
    assert free["grad_norm"] == pytest.approx(auto["grad_norm"], rel=0.2)
    assert accelerated["grad_norm"] == pytest.approx(auto["grad_norm"], rel=1e-4)
    assert accelerated["validation_loss"] == pytest.approx(auto["validation_loss"], rel=1e-4)


def test_examples_are_short_and_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 100, path.name
        assert f"`{path.name}`" in listed, path.name
