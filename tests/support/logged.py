"""What each logger wrote to its files, read back, and what it should have written."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Entries = dict[int, dict[str, float]]


def table_entries(folder: str | Path) -> Entries:
    """Of a CSVLogger."""
    with open(f"{folder}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    found: Entries = {}
    for row in rows:
        step = int(row.pop("step"))
        found.setdefault(step, {}).update({k: float(v) for k, v in row.items() if v})
    return found


def board_entries(folder: str | Path) -> tuple[Entries, Entries]:
    """Of a TensorBoardLogger: scalars, and how many values each histogram holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    scalars, histograms = {}, {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            scalars.setdefault(event.step, {})[key] = event.value
    for key in events.Tags()["histograms"]:
        for event in events.Histograms(key):
            histograms.setdefault(event.step, {})[key] = event.histogram_value.num
    return scalars, histograms


def wandb_entries(folder: str | Path) -> list[dict[str, Any]]:
    """Of an offline W&B run: its rows, a nested value under keys joined by `>`.

    The file is a LevelDB log (32 KiB blocks, chunks with a head of checksum, length and kind)
    after a head of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    records = map(Record.FromString, _chunks(path.read_bytes()))
    return [
        {
            ">".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def _chunks(data: bytes) -> Iterator[bytes]:
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        at += 7 + size
        whole += data[at - size : at]
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def mlflow_entries(folder: str | Path) -> Entries:
    """Of an MLFlowLogger with a file store: a file per metric, with time, value and step."""
    found: Entries = {}
    for path in Path(folder).glob("*/*/metrics/**/*"):
        if path.is_file():
            key = path.relative_to(next(p for p in path.parents if p.name == "metrics"))
            for line in path.read_text().splitlines():
                _, value, step = line.split()
                found.setdefault(int(step), {})[key.as_posix()] = float(value)
    return found


def expected_entries(
    grads: Sequence[Sequence[torch.Tensor]],
    ends: Sequence[int],
    max_norm: float,
    parts: dict[str, slice] | None = None,
    suffix: str = "",
) -> Entries:
    """Every metric of the steps between, from whole gradients alone, in float64.

    Args:
        grads: Per step, one tensor per parameter; none for a step without gradients.
        ends: The last step of each entry.
        max_norm: Of a ClipByNorm.
        parts: Which parameters are behind each further `clip/grad_norms/<name>`.
        suffix: Of every key.
    """
    some = np.array([len(step) > 0 for step in grads])
    width = max(map(len, grads))
    rows = [[float(g.double().square().sum()) for g in step] or [0.0] * width for step in grads]
    squares = np.array(rows)
    total = np.sqrt(squares.sum(1))
    clipped = np.isfinite(total) & (total > max_norm)
    coef = np.where(clipped, max_norm / (total + 1e-6), 1.0)
    found, start = {}, 0
    for end in ends:
        here = slice(start, end + 1)
        good = np.isfinite(total[here]) & some[here]
        norms, odd = total[here][good], float((~np.isfinite(total[here])).sum())
        metrics = {
            "grad_norm": norms.mean(),
            "grad_norm_max": norms.max(),
            "limit": max_norm,
            "coef": coef[here][good].mean(),
            "clipped_norm": (norms * coef[here][good]).mean(),
            "clipped": float(clipped[here].sum()),
            "skipped": odd,
            "nonfinite": odd,
            "clip_rate": clipped[: end + 1].sum() / some[: end + 1].sum(),
            "clip_rate_window": clipped[here].sum() / some[here].sum(),
        }
        for name, part in (parts or {}).items():
            metrics[f"grad_norms/{name}"] = np.sqrt(squares[here, part].sum(1))[good].mean()
        found[end] = {f"clip/{key}{suffix}": float(value) for key, value in metrics.items()}
        start = end + 1
    return found


def ours(entries: Entries) -> Entries:
    """Those metrics that are of clipping."""
    kept = {
        step: {key: value for key, value in row.items() if key.startswith("clip/")}
        for step, row in entries.items()
    }
    return {step: row for step, row in kept.items() if row}
