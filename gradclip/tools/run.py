"""Finding the steps of a run: in a trace, in a log, or in a folder with one of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradclip.records.trace_file import FORMAT
from gradclip.tools.imports import import_log
from gradclip.tools.trace import Chunk, StepSource, Trace, TraceHeader

__all__ = ["Run", "open_run"]


@dataclass(frozen=True)
class Run:
    """The steps of a run.

    Attributes:
        source: A trace, or what a log gives.
        notes: Remarks for the reader, a sentence each.
        limit: The limit of all steps, for a source that doesn't hold it.
        start: The first step.
        stop: The step after the last; None for all.
    """

    source: StepSource
    notes: tuple[str, ...] = ()
    limit: float | None = None
    start: int = 0
    stop: int | None = None

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self.source.path

    @property
    def header(self) -> TraceHeader:
        """That of the source; without totals if these are a part of its steps."""
        part = self.start > 0 or self.stop is not None
        return self.source.header.model_copy(update={"counts": None} if part else {})

    @property
    def size_hint(self) -> int:
        """What `bytes_read` of the chunks counts up to."""
        return self.source.size_hint

    def chunks(self, size: int = 16384) -> Iterator[Chunk]:
        """The steps in order, at most `size` in a chunk.

        Raises:
            ConfigError: If the file is broken, or has limits though one was given.
        """
        stop = sys.maxsize if self.stop is None else self.stop
        for chunk in self.source.chunks(size):
            inside = chunk.take((chunk.step >= self.start) & (chunk.step < stop))
            if self.limit is not None:
                inside = inside.with_limit(self.limit, f"{self.path}")
            if len(inside):
                yield inside
            if len(chunk) and chunk.step[-1] >= stop:
                return


def open_run(
    path: Path, *, limit: float | None = None, start: int = 0, stop: int | None = None
) -> Run:
    """Open the trace or the log of a run.

    Args:
        path: A trace, a folder whose newest trace is taken, or a log (or a folder with one) that
            `gradclip import` understands.
        limit: The limit of all steps, if the file doesn't hold it.
        start: The first step.
        stop: The step after the last; None for all.

    Raises:
        ConfigError: If there is neither, or it can't be read.
    """
    traces = [path] if path.is_file() else [*path.rglob("*.jsonl"), *path.rglob("*.parquet")]
    traces = [found for found in traces if found.is_file() and _is_trace(found)]
    if not traces:
        log = import_log(path)
        return Run(log, tuple(f"Note: {note}." for note in log.notes), limit, start, stop)
    trace = Trace.open(max(traces, key=lambda found: found.stat().st_mtime_ns))
    others = (f"The newest of {len(traces)} traces in {path}.",) if len(traces) > 1 else ()
    return Run(trace, others, limit, start, stop)


def _is_trace(path: Path) -> bool:
    """Whether a file is a trace, from its first bytes (JSON Lines) or its last (Parquet)."""
    name, most = FORMAT.encode(), 1 << 20
    with path.open("rb") as file:
        if path.suffix == ".parquet":
            file.seek(max(0, path.stat().st_size - most))
            return name in file.read(most)
        return name in file.read(1000)
