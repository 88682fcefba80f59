"""The logs that training frameworks write, as rows of named values."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from rich.console import Console

from gradclip.errors import ConfigError
from gradclip.records.trace_file import FORMAT
from gradclip.tools.console import read_console
from gradclip.tools.files import (
    first_line,
    is_text,
    is_whole,
    open_text,
    refuse_pointer,
    suffix_of,
    warn_of_cut,
)
from gradclip.tools.plain import as_markup

__all__ = ["Log", "open_log"]

Rows = Iterator[tuple[str, Mapping[str, Any]]]

_READABLE = (
    "a CSV file (Lightning's metrics.csv, an export of W&B or of anything else), TensorBoard event "
    "files or a folder of them, trainer_state.json or an output folder of transformers, JSON or "
    "JSON Lines (a W&B history, RLlib's result.json), what was printed to the console, or the "
    "metrics folder of an MLflow run; CSV, JSON and text also as .gz"
)
_LINE_OF_MLFLOW = re.compile(r"-?\d+ \S+ -?\d+(?: .*)?\s*")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_NAMED = {
    "metrics.csv": "",  # Lightning
    "metrics.jsonl": "{",  # dreamer
    "result.json": "training_iteration",  # RLlib
}
"""Names of logs, and what the first line of one has."""


@dataclass(frozen=True)
class Log:
    """A log, not yet read.

    Attributes:
        kind: csv, json, jsonl, transformers, console, tensorboard or mlflow.
        path: The file or folder.
        names: The logged names, in the order found.
        rows: Called with wanted names; yields, in the order of the log, where a row stands (for
            errors) and its values by name. An absent value, None and "" all mean not logged.
    """

    kind: str
    path: Path
    names: tuple[str, ...]
    rows: Callable[[Collection[str]], Rows]

    @property
    def in_order(self) -> bool:
        """Whether rows come as they were logged, and not one name after the other."""
        return self.kind not in ("tensorboard", "mlflow")


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
        refuse_pointer(path)
        if "tfevents" in path.name:
            return _open_tensorboard(path)
        start, suffix = first_line(path), suffix_of(path)
        if FORMAT in start:
            msg = f"{path}: this is a trace already; give it to the other commands as it is."
            raise ConfigError(msg)
        if suffix in (".csv", ".tsv") or (suffix == ".txt" and _is_table(path)):
            return _open_csv(path, start)
        if suffix in (".json", ".jsonl", ".ndjson"):
            return _open_json(path, lines=suffix != ".json")
        if _LINE_OF_MLFLOW.fullmatch(start):
            return _open_mlflow(path)
        if path.suffix != ".wandb" and is_text(path):
            names = dict.fromkeys(name for _, row in read_console(path) for name in row)
            if names:
                return Log("console", path, tuple(names), lambda _: read_console(path))
    except (OSError, csv.Error) as error:
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
    named = {
        path
        for name, sign in _NAMED.items()
        for path in folder.rglob(name)
        if sign in first_line(path)
    }
    events = {file.parent for file in folder.rglob("*tfevents*")}
    metrics = {f for f in [folder, *folder.rglob("metrics")] if f.name == "metrics"}
    found = {
        *named,
        *_last_states(folder),
        *(metrics & {f for f in metrics if _has_mlflow(f)}),
        # RLlib and dreamer write their events beside, once more.
        *(events - {path.parent for path in named if path.suffix != ".csv"}),
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


def _last_states(folder: Path) -> Iterator[Path]:
    """Of each output folder of a Trainer, the trainer_state.json that was written last.

    A checkpoint holds the log of all steps before it.
    """
    states: dict[Path, list[Path]] = {}
    for path in folder.rglob("trainer_state.json"):
        above = path.parent
        run = above.parent if _CHECKPOINT.fullmatch(above.name) and above != folder else above
        states.setdefault(run, []).append(path)
    for run, paths in states.items():
        # At the end of training, the output folder's own holds the summary too.
        yield max(paths, key=lambda path: (_global_step(path, paths), path.parent == run))


def _global_step(path: Path, among: Collection[Path]) -> float:
    if len(among) == 1:
        return 0
    refuse_pointer(path)
    with open_text(path) as file:
        step = _object(file.read(), path, "").get("global_step")
    return step if isinstance(step, int | float) else -1


def _has_mlflow(folder: Path) -> bool:
    files = (file for file in folder.rglob("*") if file.is_file())
    first = next(files, None)
    return first is not None and _LINE_OF_MLFLOW.fullmatch(first_line(first)) is not None


def _is_table(path: Path) -> bool:
    """Whether a text file is CSV: two lines with equally many delimiters, the first of names."""
    with open_text(path) as file:
        first, second = file.readline(1 << 20), file.readline(1 << 20)
    delimiter = _delimiter(first)
    count = first.count(delimiter)
    return count == second.count(delimiter) and not set(":={") & set(first) and bool(second)


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _open_csv(path: Path, start: str) -> Log:
    delimiter = _delimiter(start)

    def rows(wanted: Collection[str]) -> Rows:
        whole = [True]

        def lines(file: Iterator[str]) -> Iterator[str]:
            for line in file:
                whole[0] = is_whole(line)
                yield line

        with open_text(path) as file:
            reader = csv.reader(lines(file), delimiter=delimiter)
            header = next(reader)
            places = [(i, name) for i, name in enumerate(header) if name in wanted]
            try:
                for row in reader:
                    where = f"line {reader.line_num}"
                    if len(row) < len(header) and not whole[0]:
                        warn_of_cut(path, where)
                        return
                    yield where, {name: row[i].strip() for i, name in places if i < len(row)}
            except csv.Error as error:
                msg = f"{path}, line {reader.line_num}: this isn't CSV: {error}."
                raise ConfigError(msg) from None

    with open_text(path) as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        msg = f"{path}, line 1: several columns are named {', '.join(map(repr, twice))}. Rename."
        raise ConfigError(msg)
    return Log("csv", path, tuple(names), rows)


def _open_json(path: Path, *, lines: bool) -> Log:
    """JSON Lines, which RLlib calls `.json` too, or one JSON text."""
    with open_text(path) as file:
        first, second = file.readline(), file.readline()
    if lines or (second.lstrip().startswith("{") and first.rstrip().endswith("}")):
        return _open_json_lines(path)
    return _open_json_text(path)


def _open_json_lines(path: Path) -> Log:
    def entries(*, warn: bool) -> Rows:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                where = f"line {number}"
                try:
                    if line.strip():
                        yield where, _flat(_object(line, path, where))
                except ConfigError:
                    if number == 1 or is_whole(line):
                        raise
                    if warn:
                        warn_of_cut(path, where)

    # Lines may have different keys.
    names = dict.fromkeys(name for _, row in entries(warn=False) for name in row)
    return Log("jsonl", path, tuple(names), lambda _: entries(warn=True))


def _open_json_text(path: Path) -> Log:
    with open_text(path) as file:
        content = _parsed(file.read(), path, "")
    history = content.get("log_history") if isinstance(content, dict) else None
    kind = "json" if history is None else "transformers"
    found = max(_tables(content if history is None else {"log_history": history}, ""), key=_length)
    if not _length(found):
        what = "a list 'log_history'" if kind == "transformers" else "a list of entries"
        msg = f"{path}: {what} with names and values is missing; allowed: {_READABLE}."
        raise ConfigError(msg)
    place, table = found
    entries = [_flat(row) for row in table]
    names = dict.fromkeys(name for row in entries for name in row)

    def rows(wanted: Collection[str]) -> Rows:
        del wanted
        for index, row in enumerate(entries):
            yield f"{place}[{index}]", row

    return Log(kind, path, tuple(names), rows)


_Table = tuple[str, list[Mapping[str, Any]]]


def _tables(content: Any, place: str) -> Iterator[_Table]:
    """Each list of objects in a JSON text, and each object of lists; and an empty one."""
    yield place, []
    if isinstance(content, list):
        if content and all(isinstance(row, dict) for row in content):
            yield place, content
    elif isinstance(content, dict):
        columns = {
            name: values
            for name, values in content.items()
            if isinstance(values, list) and not any(isinstance(v, dict | list) for v in values)
        }
        most = max(map(len, columns.values()), default=0)
        columns = {name: values for name, values in columns.items() if len(values) == most}
        if len(columns) > 1:
            rows = zip(*columns.values(), strict=True)
            yield place, [dict(zip(columns, row, strict=True)) for row in rows]
        for name, inside in content.items():
            yield from _tables(inside, f"{place}.{name}" if place else name)


def _length(table: _Table) -> int:
    return len(table[1])


def _flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with values of objects within as `name/inner name`, as RLlib's CSV has them."""
    if not any(isinstance(value, dict) for value in row.values()):
        return row
    flat: dict[str, Any] = {}
    for name, value in row.items():
        inside = _flat(value).items() if isinstance(value, dict) else ()
        flat |= {f"{name}/{inner}": v for inner, v in inside} or {name: value}
    return flat


def _object(text: str, path: Path, where: str) -> Mapping[str, Any]:
    content = _parsed(text, path, where)
    if not isinstance(content, dict):
        place = f"{path}, {where}" if where else f"{path}"
        msg = f"{place}: found {content!r:.80}; allowed: a JSON object with names and values."
        raise ConfigError(msg)
    return content


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        place = f"{path}, {where}" if where else f"{path}"
        msg = f"{place}: this isn't JSON: {error}."
        raise ConfigError(msg) from None


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
            with open_text(keys[key]) as file:
                for number, line in enumerate(file, 1):
                    where = f"{key}, line {number}"
                    if _LINE_OF_MLFLOW.fullmatch(line):
                        _, value, step = line.split()[:3]
                        yield where, {"step": step, key: value}
                    elif is_whole(line):
                        msg = f"{path}, {where}: found {line!r:.80}; allowed: time, value and step."
                        raise ConfigError(msg)
                    else:
                        warn_of_cut(path, where)

    return Log("mlflow", path, ("step", *keys), rows)
