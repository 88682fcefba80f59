"""Kill a training process at random moments, resume it, and compare with the run that never died.

    make kill

The process is killed with SIGKILL once it has told a step that was drawn at random, so while it
makes the next one or writes a checkpoint. It goes on from its last whole checkpoint. At the end
parameters, optimizer, clip state and counts must be equal, bit by bit.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from support.program import Program, fused_adamw

CLIP = {
    "policies": [
        {"type": "skip_nonfinite", "max_consecutive": 3},
        {"type": "zclip", "warmup_steps": 5, "max_norm": None},
        {"type": "spam", "warmup_steps": 2, "save": True},
    ],
    "recorder": {"steps": 50},
}
STEPS = 60


def train(folder: str, line: Any) -> None:
    """Train from the last checkpoint in a folder, if there is one, to the end; tell each step."""
    program = Program(CLIP, fused_adamw, call="attached")
    program.clipper.recorder.folder = Path(folder)
    path, step = Path(folder, "last.pt"), 0
    if path.exists():
        saved = torch.load(path)
        program.model.load_state_dict(saved["model"])
        program.optimizer.load_state_dict(saved["optimizer"])
        program.clipper.load_state_dict(saved["clip"])
        step = saved["step"]
    torch.set_num_threads(1)
    for number in range(step, STEPS):
        program.step(number, {20: float("nan")}.get(number, 40.0 if number % 9 == 8 else 1.0))
        state = {
            "model": program.model.state_dict(),
            "optimizer": program.optimizer.state_dict(),
            "clip": program.clipper.state_dict(),
            "step": number + 1,
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        line.send(number)


def run(folder: str, kills: int = 0, seed: int = 0) -> tuple[dict[str, Any], int]:
    """The last checkpoint of a run that is killed so often, and how often it was started."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["support.warm"])
    moments = sorted(random.Random(seed).choices(range(STEPS - 1), k=kills))
    starts = 0
    while True:
        starts += 1
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(folder, theirs), daemon=True)
        process.start()
        theirs.close()
        told = -1
        try:
            while told < STEPS - 1:
                told = ours.recv()
                if moments and told >= moments[0]:
                    moments.pop(0)
                    process.kill()
                    break
        finally:
            process.join()
        if told == STEPS - 1:
            return torch.load(Path(folder, "last.pt")), starts


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested states differ in a bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = torch.equal(one.nan_to_num(nan=-7e7), other.nan_to_num(nan=-7e7))
        return [] if same else [where]
    return [] if one == other else [where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole, _ = run(one)
        resumed, starts = run(other, asked.kills, asked.seed)
        found = differences(whole, resumed)
        records = len(list(Path(other).glob("*.jsonl")))
    print(f"{starts - 1} kills in {STEPS} steps; flight records left: {records}")
    print(f"states differ in {found}" if found else "every bit of the state is equal")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
