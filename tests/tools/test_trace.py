"""A trace says again what was written, tells what is broken, and is read piece by piece."""

import math

import pytest

from gradclip import ConfigError
from gradclip.tools.trace import Trace, TraceHeader, write_trace


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_was_written_is_read(tmp_path, suffix):
    path = tmp_path / f"trace.{suffix}"
    header = TraceHeader(2.0, config={"max_norm": math.inf}, parameters=("a", "b"))
    first = {"step": 3, "batch": 12, "grad_norm": 3.5, "limit": 1.0, "coef": 0.25, "clipped": True}
    worst = {"step": 5, "grad_norm": math.nan, "limit": None, "per_parameter": {"a": math.inf}}
    write_trace(path, header, [first, worst])
    trace = Trace.open(path)
    assert trace.header == header
    chunk = trace.read()
    assert chunk.step.tolist() == [3, 5]
    assert chunk.batch.tolist() == [12, -1]
    assert chunk.limit.tolist() == [1.0, math.inf]
    assert chunk.finite.tolist() == [True, False]
    assert chunk.clipped.tolist() == [True, False]
    assert math.isnan(chunk.grad_norm[1])
    assert math.isnan(chunk.per_parameter[5]["a"])
    assert "loss" not in chunk.columns


def test_steps_that_fall_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("before")
    with pytest.raises(ConfigError, match="step 1 after step 1"):
        write_trace(path, TraceHeader(), [{"step": 1}, {"step": 1}])
    assert [file.name for file in tmp_path.iterdir()] == ["trace.jsonl"]
    assert path.read_text() == "before"
