"""The logs that training frameworks write, as rows of named values."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import rich.progress
from pydantic_core import from_json
from rich.console import Console

from gradclip.errors import ConfigError
from gradclip.records.trace_file import FORMAT
from gradclip.tools.plain import as_markup

__all__ = ["Log", "open_log"]

Rows = Iterator[tuple[str, Mapping[str, Any]]]

_READABLE = (
    "a CSV file (Lightning's metrics.csv, an export of W&B or of anything else), TensorBoard event "
    "files or a folder of them, trainer_state.json of transformers, JSON Lines (a W&B history), or "
    "the metrics folder of an MLflow run"
)
_LINE_OF_MLFLOW = re.compile(r"-?\d+ \S+ -?\d+(?: .*)?\s*")


@dataclass(frozen=True)
class Log:
    """A log, not yet read.

    Attributes:
        kind: csv, jsonl, transformers, tensorboard or mlflow.
        path: The file or folder.
        names: The logged names, in the order found.
        rows: Called with wanted names; yields, in the order of the log, where a row stands (for
            errors) and its values by name. An absent value, None and "" all mean not logged.
    """

    kind: str
    path: Path
    names: tuple[str, ...]
    rows: Callable[[Collection[str]], Rows]


def open_log(path: str | Path) -> Log:
    """Find out which kind of log a file or folder is, and what was logged in it.

    Raises:
        ConfigError: If it can't be read, isn't a known kind of log, or a folder holds several.
    """
    path = Path(path)
    try:
        path = _find(path) if path.is_dir() else path
        if path.is_dir():
            return _open_mlflow(path) if path.name == "metrics" else _open_tensorboard(path)
        if "tfevents" in path.name:
            return _open_tensorboard(path)
        start = _first_line(path)
        if FORMAT in start:
            msg = f"{path}: this is a trace already; give it to the other commands as it is."
            raise ConfigError(msg)
        if path.suffix in (".csv", ".tsv", ".txt"):
            return _open_csv(path, start)
        if path.suffix == ".json":
            return _open_trainer_state(path)
        if path.suffix in (".jsonl", ".ndjson"):
            return _open_json_lines(path)
        if _LINE_OF_MLFLOW.fullmatch(start):
            return _open_mlflow(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: the log can't be read ({error}). Give {_READABLE}."
        raise ConfigError(msg) from None
    msg = f"{path}: this isn't a log that can be read; allowed: {_READABLE}."
    if path.suffix == ".wandb":
        msg = (
            f"{path}: a .wandb file is read only by wandb itself. Export the run's history: in its "
            "workspace as CSV, or run.scan_history() of wandb's API as JSON Lines."
        )
    raise ConfigError(msg)


def _find(folder: Path) -> Path:
    """The only log in a folder."""
    found = {
        *(file.parent for file in folder.rglob("*tfevents*")),
        *folder.rglob("metrics.csv"),
        *folder.rglob("trainer_state.json"),
        *(f for f in [folder, *folder.rglob("metrics")] if f.name == "metrics" and _has_mlflow(f)),
    }
    if len(found) == 1:
        return found.pop()
    if not found:
        msg = f"{folder}: there is no log in this folder; allowed: {_READABLE}."
        raise ConfigError(msg)
    listed = [f"  {path}" for path in sorted(found)]
    more = [f"  and {len(listed) - 20} more"] if len(listed) > 20 else []
    msg = f"{folder} holds {len(found)} logs. Give one of them:\n"
    raise ConfigError(msg + "\n".join(listed[:20] + more))


def _has_mlflow(folder: Path) -> bool:
    files = (file for file in folder.rglob("*") if file.is_file())
    first = next(files, None)
    return first is not None and _LINE_OF_MLFLOW.fullmatch(_first_line(first)) is not None


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(4096).decode("utf-8", errors="replace")


def _open_text(path: Path) -> AbstractContextManager[TextIO]:
    """The file as text, with a progress bar if standard error is a terminal."""
    console = Console(stderr=True)
    return rich.progress.open(
        path,
        "r",
        encoding="utf-8-sig",
        errors="replace",
        newline="",
        description=as_markup(f"Reading {path.name}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _open_csv(path: Path, start: str) -> Log:
    delimiter = max(",;\t", key=start.count)

    def rows(wanted: Collection[str]) -> Rows:
        with _open_text(path) as file:
            reader = csv.reader(file, delimiter=delimiter)
            places = [(i, name) for i, name in enumerate(next(reader)) if name in wanted]
            try:
                for row in reader:
                    values = {name: row[i].strip() for i, name in places if i < len(row)}
                    yield f"line {reader.line_num}", values
            except csv.Error as error:
                msg = f"{path}, line {reader.line_num}: this isn't CSV: {error}."
                raise ConfigError(msg) from None

    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        msg = f"{path}, line 1: several columns are named {', '.join(map(repr, twice))}. Rename."
        raise ConfigError(msg)
    return Log("csv", path, tuple(names), rows)


def _open_json_lines(path: Path) -> Log:
    def entries() -> Rows:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _object(line, path, f"line {number}")

    # Lines may have different keys.
    names = dict.fromkeys(name for _, row in entries() for name in row)
    return Log("jsonl", path, tuple(names), lambda _: entries())


def _open_trainer_state(path: Path) -> Log:
    content = _object(path.read_text(encoding="utf-8"), path, "")
    history = content.get("log_history")
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        msg = f"{path}: a list 'log_history' is missing; allowed: {_READABLE}."
        raise ConfigError(msg)
    names = dict.fromkeys(name for row in history for name in row)

    def rows(wanted: Collection[str]) -> Rows:
        del wanted
        for index, row in enumerate(history):
            yield f"log_history[{index}]", row

    return Log("transformers", path, tuple(names), rows)


def _object(text: str, path: Path, where: str) -> Mapping[str, Any]:
    place = f"{path}, {where}" if where else f"{path}"
    try:
        content = from_json(text)
    except ValueError as error:
        msg = f"{place}: this isn't JSON: {error}."
        raise ConfigError(msg) from None
    if not isinstance(content, dict):
        msg = f"{place}: found {content!r:.80}; allowed: a JSON object with names and values."
        raise ConfigError(msg)
    return content


def _open_tensorboard(path: Path) -> Log:
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.util import tensor_util
    except ImportError:
        msg = (
            f"{path}: reading event files needs tensorboard, which isn't installed. Install it: "
            "pip install 'gradclip[tools]'"
        )
        raise ConfigError(msg) from None
    # 0 keeps all events, and purging is off: the caller sees the repeated steps of a resumed run.
    sizes = {**event_accumulator.DEFAULT_SIZE_GUIDANCE, "scalars": 0, "tensors": 0}
    sizes |= {"histograms": 1, "images": 1, "audio": 1, "compressedHistograms": 1}
    events = event_accumulator.EventAccumulator(str(path), sizes, purge_orphaned_data=False)
    with Console(stderr=True).status(as_markup(f"Reading {path.name}")):
        events.Reload()
    tags = events.Tags()

    def rows(wanted: Collection[str]) -> Rows:
        for tag in tags["scalars"]:
            for event in events.Scalars(tag) if tag in wanted else ():
                yield f"tag {tag}", {"step": event.step, tag: event.value}
        for tag in tags["tensors"]:
            for event in events.Tensors(tag) if tag in wanted else ():
                value = tensor_util.make_ndarray(event.tensor_proto)
                yield f"tag {tag}", {"step": event.step, tag: value.item()}

    return Log("tensorboard", path, ("step", *tags["scalars"], *tags["tensors"]), rows)


def _open_mlflow(path: Path) -> Log:
    """A metrics folder, or one file in it; a key with slashes is a path in that folder."""
    above = [folder for folder in path.parents if folder.name == "metrics"]
    top = path if path.is_dir() else above[0] if above else path.parent
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    keys = {file.relative_to(top).as_posix(): file for file in files}

    def rows(wanted: Collection[str]) -> Rows:
        for key in (key for key in keys if key in wanted):
            with _open_text(keys[key]) as file:
                for number, line in enumerate(file, 1):
                    where = f"{key}, line {number}"
                    if not _LINE_OF_MLFLOW.fullmatch(line):
                        msg = f"{path}, {where}: found {line!r:.80}; allowed: time, value and step."
                        raise ConfigError(msg)
                    _, value, step = line.split()[:3]
                    yield where, {"step": step, key: value}

    return Log("mlflow", path, ("step", *keys), rows)
