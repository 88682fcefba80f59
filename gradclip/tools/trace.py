"""Reading a trace in chunks, so that memory doesn't grow with its length."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from gradclip.errors import ConfigError
from gradclip.records.trace_file import (
    FLAGS,
    FORMAT,
    NUMBERS,
    VERSION,
    TraceHeader,
    import_pyarrow,
    write_trace,
)
from gradclip.tools.curves import Bools, Floats, Steps
from gradclip.tools.files import refuse_pointer, warn_of_cut

__all__ = ["Chunk", "StepSource", "Trace", "TraceHeader", "write_trace"]

Row = Mapping[str, Any]


class _Column(NamedTuple):
    """How a column is read: its value where absent or null, and the types JSON may hold there."""

    dtype: str
    absent: Any
    null: Any
    kinds: set[type]
    allowed: str

    def blank(self, length: int) -> NDArray[Any]:
        return np.full(length, self.absent or 0, dtype=self.dtype)


_A_STEP = 'a step as one JSON object, {"step": 0, ...}'
_NUMBER = _Column("float64", math.nan, math.nan, {float, int, NoneType}, "a number or null")
_FLAG = _Column("bool", False, False, {bool, NoneType}, "true, false or null")
_COLUMNS = {
    "step": _Column("int64", None, None, {int}, "a whole number on each step"),
    "batch": _Column("int64", -1, -1, {int, NoneType}, "a whole number or null"),
    **dict.fromkeys(NUMBERS, _NUMBER),
    "limit": _NUMBER._replace(null=math.inf),
    **dict.fromkeys(FLAGS, _FLAG),
    "finite": _FLAG._replace(absent=True, null=True),
}


@dataclass(frozen=True)
class Chunk:
    """Some steps of a trace in order, as arrays of one length `n`.

    Attributes:
        step: Int64, rising.
        batch: Int64; -1 where unknown.
        grad_norm: Float64, before clipping; NaN where unknown or not finite.
        limit: Float64; infinity where there was none, NaN where unknown.
        coef: Float64; NaN where unknown.
        clipped_norm: Float64; NaN where unknown.
        loss: Float64; NaN where unknown.
        clipped: Bool; false where unknown.
        skipped: Bool; false where unknown.
        finite: Bool; true unless the trace says otherwise.
        per_parameter: By step, then by parameter: norm before clipping, NaN if not finite.
        columns: Names of the above that the trace gives for at least one of these steps.
        bytes_read: Bytes of the file read so far, for progress bars.
    """

    step: Steps
    batch: Steps
    grad_norm: Floats
    limit: Floats
    coef: Floats
    clipped_norm: Floats
    loss: Floats
    clipped: Bools
    skipped: Bools
    finite: Bools
    per_parameter: dict[int, dict[str, float]]
    columns: frozenset[str] = frozenset()
    bytes_read: int = 0

    def __len__(self) -> int:
        return len(self.step)

    def take(self, which: slice | Bools) -> Chunk:
        """Some of the steps."""
        return replace(self, **{name: getattr(self, name)[which] for name in _COLUMNS})

    def with_limit(self, limit: float, where: str) -> Chunk:
        """The same with one limit on all steps, known from elsewhere.

        Args:
            limit: Above 0.
            where: What errors name.

        Raises:
            ConfigError: If it isn't above 0, or the steps have limits.
        """
        if not limit > 0:
            msg = f"--limit is {limit:g}; allowed: a number above 0."
            raise ConfigError(msg)
        if "limit" in self.columns:
            msg = f"{where}: it holds the limits of its steps already. Leave --limit out."
            raise ConfigError(msg)
        limits = np.full(len(self), float(limit))
        return replace(self, limit=limits, columns=self.columns | {"limit"})

    def last_gap(self, before: int) -> int | None:
        """The index of the last step that doesn't follow directly on the one before.

        Args:
            before: The step before the first of these.
        """
        gaps = np.flatnonzero(np.diff(self.step, prepend=before) > 1)
        return int(gaps[-1]) if len(gaps) else None


class StepSource(Protocol):
    """Steps in order, to be read any number of times: a trace, or what a log gives.

    Attributes:
        path: The file.
        header: That of the trace.
        size_hint: What `Chunk.bytes_read` counts up to.
    """

    @property
    def path(self) -> Path: ...  # noqa: D102  above

    @property
    def header(self) -> TraceHeader: ...  # noqa: D102

    @property
    def size_hint(self) -> int: ...  # noqa: D102

    def chunks(self, size: int = ...) -> Iterator[Chunk]:
        """The steps in order, at most `size` in a chunk."""


@dataclass(frozen=True)
class Trace:
    """A trace file. Each call of `chunks` reads it again, in bounded memory.

    Attributes:
        path: The file.
        header: Its first line.
        size_hint: Its size in bytes.
    """

    path: Path
    header: TraceHeader
    size_hint: int

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Read the header.

        Raises:
            ConfigError: If the file can't be read, isn't a trace, or is of an unknown version.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            refuse_pointer(path)
            line = _parquet_header(path) if path.suffix == ".parquet" else _first_line(path)
        except OSError as error:
            reason = error.strerror or error  # pyarrow's have none
            msg = f"{path}: the file can't be read ({reason}). Give the path of a trace."
            raise ConfigError(msg) from None
        return cls(path, _parse_header(line, path), size)

    def chunks(self, size: int = 16384) -> Iterator[Chunk]:
        """The steps in order, at most `size` in a chunk.

        A last line that was cut off is left out with a warning.

        Raises:
            ConfigError: If a line is broken. The message names the line.
        """
        read = _parquet_chunks if self.path.suffix == ".parquet" else _line_chunks
        return read(self.path, size)

    def read(self) -> Chunk:
        """Everything at once, for traces that fit into memory."""
        parts = list(self.chunks()) or [_chunk_of_rows([], self.path, 2, self.size_hint)]
        arrays = {n: np.concatenate([getattr(part, n) for part in parts]) for n in _COLUMNS}
        norms = {step: given for part in parts for step, given in part.per_parameter.items()}
        columns = {name for part in parts for name in part.columns}
        return Chunk(
            **arrays,
            per_parameter=norms,
            columns=frozenset(columns),
            bytes_read=parts[-1].bytes_read,
        )


def _parse_header(line: bytes, path: Path) -> TraceHeader:
    try:
        content = from_json(line)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        msg = (
            f'{path}, line 1: this isn\'t the header of a trace, {{"format": "{FORMAT}", ...}}. '
            "Give a file of the flight recorder, or make one from a log: gradclip import LOG."
        )
        raise ConfigError(msg)
    if content.get("version") != VERSION:
        msg = (
            f"{path}, line 1: version is {content.get('version')!r}; this gradclip reads "
            f"{VERSION}. Use the gradclip that wrote it, or a newer one."
        )
        raise ConfigError(msg)
    try:
        return TraceHeader.model_validate_json(line)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        allowed = TraceHeader.model_fields[name].description or ""
        _refuse(path, "line 1", f"{name} is {content[name]!r:.80}", allowed)


def _refuse(path: Path, where: str, found: str, allowed: str) -> NoReturn:
    msg = f"{path}, {where}: {found}; allowed: {allowed}."
    raise ConfigError(msg)


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(1 << 26)


def _line_chunks(path: Path, size: int) -> Iterator[Chunk]:
    with path.open("rb") as file:
        read = len(file.readline())
        number, last = 2, -1
        while lines := list(islice(file, size)):
            read += sum(map(len, lines))
            rows = _parse_lines(lines, path, number, read == path.stat().st_size)
            chunk = _chunk_of_rows(rows, path, number, read)
            last = _check_order(chunk.step, last, path, "line", number)
            number += len(lines)
            if len(chunk):
                yield chunk


def _parse_lines(lines: Sequence[bytes], path: Path, number: int, at_end: bool) -> list[Row]:
    """Lines as mappings; `number` is the number of the first line."""
    # One call for all lines is several times faster than a call for each. It is right if each line
    # is one object: no object on two lines, and no line with two objects.
    joined = b",".join(lines)
    if joined.count(b"}\n,{") == len(lines) - 1:
        with contextlib.suppress(ValueError):
            rows: list[Row] = from_json(b"[" + joined + b"]", allow_inf_nan=False)
            if len(rows) == len(lines) and set(map(type, rows)) == {dict}:
                return rows
    rows = []
    for index, line in enumerate(lines):
        where = f"line {number + index}"
        try:
            row = from_json(line, allow_inf_nan=False)
        except ValueError as error:
            if at_end and index == len(lines) - 1 and not line.endswith(b"\n"):
                warn_of_cut(path, where)
                break
            _refuse(path, where, f"this isn't JSON ({error})", _A_STEP)
        if not isinstance(row, dict):
            _refuse(path, where, f"found {row!r:.80}", _A_STEP)
        rows.append(row)
    return rows


def _chunk_of_rows(rows: Sequence[Row], path: Path, number: int, read: int) -> Chunk:
    """Rows as arrays; `number` is the line of the first row."""
    given = {name for name in _COLUMNS if any(name in row for row in rows)} | {"step"}
    arrays = {name: column.blank(len(rows)) for name, column in _COLUMNS.items()}
    for name in given:
        column = _COLUMNS[name]
        values = [row.get(name, column.absent) for row in rows]
        kinds = set(map(type, values))
        if not kinds <= column.kinds:
            index = next(i for i, value in enumerate(values) if type(value) not in column.kinds)
            found = f"{name} is {values[index]!r:.80}"
            _refuse(path, f"line {number + index}", found, column.allowed)
        if NoneType in kinds:
            values = [column.null if value is None else value for value in values]
        try:
            arrays[name] = np.array(values, dtype=column.dtype)
        except OverflowError:
            lines = f"lines {number} to {number + len(rows) - 1}"
            _refuse(path, lines, f"{name} is too large for 64 bits", column.allowed)
    norms = {}
    for index, row in enumerate(rows):
        if "per_parameter" in row:
            where = f"line {number + index}"
            norms[row["step"]] = _norms(row["per_parameter"], path, where)
    return _chunk(arrays, norms, given, read)


def _chunk(
    arrays: Mapping[str, NDArray[Any]],
    norms: dict[int, dict[str, float]],
    given: set[str],
    read: int,
) -> Chunk:
    columns = frozenset(given | {"per_parameter"} if norms else given)
    return Chunk(**arrays, per_parameter=norms, columns=columns, bytes_read=read)


def _norms(content: Any, path: Path, where: str) -> dict[str, float]:
    allowed = _COLUMNS["grad_norm"].kinds
    if not isinstance(content, dict) or not set(map(type, content.values())) <= allowed:
        found = f"per_parameter is {content!r:.80}"
        _refuse(path, where, found, "a mapping of names to numbers or null")
    try:
        return {name: math.nan if norm is None else float(norm) for name, norm in content.items()}
    except OverflowError:
        _refuse(path, where, "per_parameter has a norm too large for 64 bits", "a number or null")


def _content(text: Any) -> Any:
    """The content of a JSON text; anything else stays as it is."""
    try:
        return from_json(text)
    except (ValueError, TypeError):
        return text


def _check_order(step: Steps, last: int, path: Path, unit: str, number: int) -> int:
    """Return the last step; refuse a step that isn't larger than the one before."""
    before = np.concatenate([np.array([last]), step[:-1]])
    if np.any(step <= before):
        index = int(np.argmax(step <= before))
        found = f"step is {step[index]}" + (f" after {before[index]}" if before[index] >= 0 else "")
        _refuse(path, f"{unit} {number + index}", found, "steps from 0, each larger than the last")
    return int(step[-1]) if len(step) else last


def _parquet_header(path: Path) -> bytes:
    pyarrow, parquet = import_pyarrow()
    try:
        metadata = parquet.read_metadata(path).metadata or {}
    except pyarrow.ArrowInvalid:
        msg = f"{path}: this isn't a Parquet file, though its name ends in .parquet. Rename it."
        raise ConfigError(msg) from None
    return bytes(metadata.get(FORMAT.encode(), b""))


def _parquet_chunks(path: Path, size: int) -> Iterator[Chunk]:
    pyarrow, parquet = import_pyarrow()
    read, last = 0, -1
    try:
        # By default pyarrow reads the whole file into memory first.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            total, in_all = file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=size):
                done = in_all * (read + len(batch)) // total
                chunk = _chunk_of_batch(batch, path, read + 1, done)
                last = _check_order(chunk.step, last, path, "row", read + 1)
                read += len(batch)
                yield chunk
    except (OSError, pyarrow.ArrowException) as error:
        msg = f"{path}, after row {read}: the file can't be read ({error}). Make or copy it anew."
        raise ConfigError(msg) from None


def _chunk_of_batch(batch: Any, path: Path, number: int, read: int) -> Chunk:
    """A Parquet batch as arrays; `number` is its first row, and null was not recorded."""
    pyarrow, _ = import_pyarrow()
    given = {name for name in batch.schema.names if batch.column(name).null_count < len(batch)}
    if "step" not in given:
        _refuse(path, "column step", "it is missing", _COLUMNS["step"].allowed)
    arrays = {name: column.blank(len(batch)) for name, column in _COLUMNS.items()}
    for name in given & set(_COLUMNS):
        column = _COLUMNS[name]
        try:
            values = batch.column(name).cast(column.dtype)
            if values.null_count and column.absent is None:
                row = number + values.is_null().index(True).as_py()
                _refuse(path, f"row {row}", f"{name} is null", column.allowed)
            if values.null_count:
                values = values.fill_null(column.absent)
        except pyarrow.ArrowException as error:
            _refuse(path, f"column {name}", str(error), column.allowed)
        arrays[name] = values.to_numpy(zero_copy_only=False)
    norms = {}
    if "per_parameter" in given:
        for step, text in zip(arrays["step"], batch.column("per_parameter"), strict=True):
            if text.is_valid:
                norms[int(step)] = _norms(_content(text.as_py()), path, f"step {step}")
    return _chunk(arrays, norms, given & set(_COLUMNS), read)
