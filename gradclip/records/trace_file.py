"""Writing a trace: one file that holds what clipping saw, step by step (docs/traces.md)."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
)

from gradclip.errors import ConfigError

__all__ = [
    "FLAGS",
    "FORMAT",
    "NUMBERS",
    "VERSION",
    "TraceHeader",
    "import_pyarrow",
    "null_unless_finite",
    "probe",
    "spell_out",
    "write_trace",
]

FORMAT = "gradclip-trace"
VERSION = 1
NUMBERS = ("grad_norm", "limit", "coef", "clipped_norm", "loss")
FLAGS = ("clipped", "skipped", "finite")

_ROWS_AT_ONCE = 65536
_SPELLED = {".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


def spell_out(value: Any) -> Any:
    """The same with infinity and NaN as YAML spells them, since JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, Mapping):
        return {str(key): spell_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell_out(item) for item in value]
    return value


def _read_spelled(value: Any) -> Any:
    """The opposite of `spell_out`."""
    if isinstance(value, dict):
        return {key: _read_spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_spelled(item) for item in value]
    return _SPELLED.get(value, value) if isinstance(value, str) else value


_READ, _SPELL = BeforeValidator(_read_spelled), PlainSerializer(spell_out)


def _need_totals(counts: dict[str, int]) -> dict[str, int]:
    if lacking := {"steps", "clipped", "skipped", "nonfinite"} - set(counts):
        msg = f"{lacking} are missing"
        raise ValueError(msg)
    return counts


class TraceHeader(BaseModel):
    """The first line of a trace. A field's description is what the reader allows there.

    Attributes:
        norm_type: p of the norms.
        source: Who wrote it: `recorder`, or `import:` and the kind of log.
        config: The configuration that was in use, as a mapping; None if unknown.
        created: ISO 8601 time.
        parameters: Names of the parameters, in order.
        counts: Totals over the whole run.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    norm_type: Annotated[float, _READ, _SPELL] = Field(
        2.0, gt=0, description='a number above 0, or ".inf"'
    )
    source: str = Field("recorder", description="text")
    config: Annotated[dict[str, Any] | None, _READ, _SPELL] = Field(
        None, description="an object or null"
    )
    created: str | None = Field(None, description="text or null")
    parameters: tuple[str, ...] | None = Field(None, description="a list of names or null")
    counts: Annotated[dict[str, NonNegativeInt], AfterValidator(_need_totals)] | None = Field(
        None,
        description="null, or an object with the whole numbers steps, clipped, skipped and "
        "nonfinite",
    )

    def as_text(self) -> str:
        """The header as one line of JSON."""
        fields = {"format": FORMAT, "version": VERSION, **self.model_dump()}
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def write_trace(
    path: str | Path,
    header: TraceHeader,
    rows: Iterable[Mapping[str, Any]],
    *,
    anew: bool = False,
) -> Path:
    """Write a trace; the file appears whole or not at all.

    Args:
        path: The file; `.parquet` writes Parquet (needs pyarrow), anything else JSON Lines.
            Missing folders are made.
        header: The first line.
        rows: One mapping per step in rising order of `step`, with the keys of docs/traces.md as
            plain Python numbers. NaN and infinity are allowed. Other keys are left out.
        anew: Never write over a file: where there is one, a number is added to the name.

    Returns:
        The file.

    Raises:
        ConfigError: If steps don't rise, or pyarrow is missing.
        OSError: If it can't be written.
    """
    path = Path(path)
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as (temporary, file):
        with file:
            write(file, header, _complete(rows, path))
        path = _claimed(path) if anew else path
        temporary.replace(path)
    return path


def probe(path: Path) -> None:
    """Try whether a trace can be written; leaves nothing behind.

    Args:
        path: The file, absolute; it and its folder may be missing.

    Raises:
        OSError: If it can't.
        ValueError: If no file can have this name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next((folder for folder in path.parents if folder.exists()), path.parent)
    with _temporary(folder / path.name) as (_, file):
        file.close()


def import_pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        ConfigError: If they aren't installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        msg = (
            "A Parquet trace needs pyarrow, which isn't installed. Install it "
            "(pip install 'gradclip[parquet]'), or use a .jsonl file."
        )
        raise ConfigError(msg) from None
    return pyarrow, pyarrow.parquet


def null_unless_finite(value: Any) -> Any:
    """The same with None for infinity and NaN, as JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: null_unless_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_unless_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_lines(file: IO[bytes], header: TraceHeader, rows: Iterable[Mapping[str, Any]]) -> None:
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    file.write(f"{header.as_text()}\n".encode())
    file.writelines(f"{encode(null_unless_finite(row))}\n".encode() for row in rows)


def _write_parquet(file: IO[bytes], header: TraceHeader, rows: Iterable[Mapping[str, Any]]) -> None:
    pyarrow, parquet = import_pyarrow()
    schema = pyarrow.schema(
        [
            pyarrow.field("step", pyarrow.int64(), nullable=False),
            ("batch", pyarrow.int64()),
            *((name, pyarrow.float64()) for name in NUMBERS),
            *((name, pyarrow.bool_()) for name in FLAGS),
            ("per_parameter", pyarrow.string()),
        ],
        metadata={FORMAT: header.as_text()},
    )
    rest = iter(rows)
    with parquet.ParquetWriter(file, schema) as writer:
        while block := list(islice(rest, _ROWS_AT_ONCE)):
            listed = [{**row, "per_parameter": _norms_as_text(row)} for row in block]
            writer.write_table(pyarrow.Table.from_pylist(listed, schema))


def _norms_as_text(row: Mapping[str, Any]) -> str | None:
    norms = row.get("per_parameter")
    return None if norms is None else json.dumps(null_unless_finite(norms), allow_nan=False)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file beside `path`, gone afterwards; nobody knows its name before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    file = temporary.open("xb")  # x: neither over another file nor through a link
    try:
        yield temporary, file
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def _claimed(path: Path) -> Path:
    """The first of `name.jsonl`, `name-1.jsonl` ... that isn't there; now it is, and empty."""
    stem, dot, rest = path.name.partition(".")
    for number in count():
        free = path.with_name(f"{stem}{f'-{number}' if number else ''}{dot}{rest}")
        with suppress(FileExistsError):
            free.open("xb").close()
            return free
    raise AssertionError


def _complete(rows: Iterable[Mapping[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Rows with known keys only; None becomes NaN, or infinity for a limit.

    `finite` is added where the norm alone says that the step wasn't finite.
    """
    last = -1
    for row in rows:
        step = row["step"]
        if step <= last:
            msg = f"{path}: step {step} after step {last}; steps start at 0 and each is larger."
            raise ConfigError(msg)
        last = step
        done = {"step": step}
        if row.get("batch") is not None:
            done["batch"] = row["batch"]
        for name in NUMBERS:
            value = row.get(name)
            if value is not None and math.isfinite(value):
                done[name] = value
            elif name in row and name != "limit":
                done[name] = math.nan
            elif name in row and (value is None or value > 0):
                done[name] = math.inf
        for name in (*FLAGS, "per_parameter"):
            if row.get(name) is not None:
                done[name] = row[name]
            elif name == "finite" and math.isnan(done.get("grad_norm", 0.0)):
                done[name] = False
        yield done
