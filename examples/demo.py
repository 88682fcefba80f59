"""Trains one small GPT four times on partly corrupted data and compares how it was clipped.

make demo
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import lightning_gpt
from picture import draw
from rich.console import Console
from rich.table import Table
from runs import Run
from setting import SMALL, Setting

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "no clipping": "measure_only",
    "fixed norm 1.0": "fixed_norm",
    "auto": "recorder",
}
ACCELERATE = "auto, Accelerate, 2 processes"


def run_accelerate(setting: Setting, small: bool, lines: Path) -> Run:
    """Launch the Accelerate script, which doesn't know of clipping, on two processes."""
    launch = [sys.executable, "-m", "accelerate_clip.launch", "launch", "--config_file"]
    config = ROOT / "configs" / "accelerate" / "two_processes.yaml"
    script = [ROOT / "examples" / "accelerate_gpt.py", "--steps", setting.steps, "--out", lines]
    any_port = ["--main_process_port", "0"]
    command = [*launch, config, *any_port, *script, *(["--small"] if small else [])]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)
    return Run.from_lines(lines)


def table_of(runs: Mapping[str, Run]) -> Table:
    """One row for each run."""
    table = Table(title="The same model, data and seed; 3 % of the batches are corrupted")
    table.add_column("run")
    for column in ("validation loss", "steps clipped", "worst gradient norm", "seconds"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        numbers = (
            f"{run.validation_loss:.3f}",
            f"{run.clip_rate:.1%}",
            f"{max(run.grad_norm):.1f}",
        )
        table.add_row(name, *numbers, f"{run.seconds:.0f}")
    return table


def report(runs: Mapping[str, Run], folder: Path) -> None:
    """Print the table; write it, all numbers and the picture."""
    table = table_of(runs)
    Console().print(table)
    with (folder / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=100).print(table)
    numbers = {name: vars(run) for name, run in runs.items()}
    (folder / "runs.json").write_text(json.dumps(numbers), encoding="utf-8")
    draw(runs, "auto", folder / "clipping.png")
    Console().print(f"Picture: {folder / 'clipping.png'}")
    page, logs = str(folder / "report.html"), "demo/lightning_logs"
    gradclip = [sys.executable, "-m", "gradclip.tools.main"]
    subprocess.run([*gradclip, "report", logs, "--out", page], check=True)


def main() -> None:
    """Train four times, then report."""
    options = argparse.ArgumentParser(description="Compare ways of clipping on one small GPT.")
    options.add_argument("--steps", type=int, default=Setting.steps, help="steps of each run")
    options.add_argument("--small", action="store_true", help="a tiny model, for a quick try")
    options.add_argument("--folder", type=Path, default=Path("demo"), help="where to write")
    arguments = options.parse_args()
    setting = replace(SMALL if arguments.small else Setting(), steps=arguments.steps)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    runs: dict[str, Run] = {}
    for name, config in RUNS.items():
        Console().rule(name)
        runs[name] = lightning_gpt.train(config, setting)
    Console().rule(ACCELERATE)
    lines = arguments.folder.resolve() / "accelerate.jsonl"
    runs[ACCELERATE] = run_accelerate(setting, arguments.small, lines)
    report(runs, arguments.folder)


if __name__ == "__main__":
    main()
