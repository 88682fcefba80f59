"""A trace says again what was written, tells what is broken, and is read piece by piece."""

import json
import math
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import ConfigError
from gradclip.tools.trace import Trace, TraceHeader, write_trace

HEADER = '{"format":"gradclip-trace","version":1,"norm_type":2.0}\n'
NUMBER = st.floats(min_value=0) | st.just(math.nan)
NUMBERS = ("grad_norm", "limit", "coef", "clipped_norm", "loss")
FLAGS = ("clipped", "skipped", "finite")
ROW = st.fixed_dictionaries(
    {},
    optional={
        "batch": st.none() | st.integers(0, 2**60),
        **{name: st.none() | NUMBER for name in NUMBERS},
        **{name: st.booleans() for name in FLAGS},
        "per_parameter": st.dictionaries(st.text(), NUMBER, max_size=3),
        "unknown": st.text(),
    },
)


def known(value):
    return math.nan if value is None or not math.isfinite(value) else value


def expected(row, name):
    if name == "limit":
        return math.inf if row.get(name, 0.0) is None else row.get(name, math.nan)
    if name == "finite":
        norm = row.get("grad_norm", 0.0)
        return row.get(name, norm is not None and math.isfinite(norm))
    if name in FLAGS:
        return row.get(name, False)
    return known(row.get(name))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.dictionaries(st.integers(0, 2**60), ROW, max_size=8),
    suffix=st.sampled_from(["jsonl", "parquet"]),
)
def test_what_was_written_is_read(tmp_path_factory, rows, suffix):
    path = tmp_path_factory.mktemp("trace") / f"trace.{suffix}"
    rows = dict(sorted(rows.items()))
    write_trace(path, TraceHeader(), ({"step": step, **row} for step, row in rows.items()))
    chunk = Trace.open(path).read()
    assert chunk.step.tolist() == list(rows)
    for name in (*NUMBERS, *FLAGS):
        wanted = [expected(row, name) for row in rows.values()]
        assert getattr(chunk, name).tolist() == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)
    batches = [row.get("batch") for row in rows.values()]
    assert chunk.batch.tolist() == [-1 if batch is None else batch for batch in batches]
    norms = {s: row["per_parameter"] for s, row in rows.items() if "per_parameter" in row}
    assert chunk.per_parameter.keys() == norms.keys()
    for step, by_name in norms.items():
        assert chunk.per_parameter[step] == pytest.approx(
            {name: known(norm) for name, norm in by_name.items()}, rel=0, abs=0, nan_ok=True
        )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_header_is_read_whole(tmp_path, suffix):
    header = TraceHeader(
        norm_type=math.inf,
        source="import:csv",
        config={"policies": [{"type": "norm", "max_norm": math.inf}]},
        created="2026-01-02T03:04:05+00:00",
        parameters=("a.weight", "b</script>"),
        counts={"steps": 1, "clipped": 0, "skipped": 0, "nonfinite": 0},
    )
    path = tmp_path / "new" / f"trace.{suffix}"
    write_trace(path, header, [{"step": 0}])
    trace = Trace.open(path)
    assert trace.header == header
    assert trace.read().columns == {"step"}
    assert trace.size_hint == trace.read().bytes_read == path.stat().st_size


def test_every_line_is_standard_json(tmp_path):
    path = tmp_path / "trace.jsonl"
    worst = {"step": 3, "grad_norm": math.nan, "limit": math.inf, "per_parameter": {"a": math.inf}}
    write_trace(path, TraceHeader(config={"max_norm": math.inf}), [worst])
    header, line = (
        json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()
    )
    assert header["format"] == "gradclip-trace"
    assert header["config"] == {"max_norm": ".inf"}
    assert line == {
        "step": 3,
        "grad_norm": None,
        "limit": None,
        "finite": False,
        "per_parameter": {"a": None},
    }


def test_a_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("before")
    with pytest.raises(ConfigError, match="step 1 after step 1"):
        write_trace(path, TraceHeader(), [{"step": 1}, {"step": 1}])
    assert [file.name for file in tmp_path.iterdir()] == ["trace.jsonl"]
    assert path.read_text() == "before"


BROKEN = {
    "no JSON": ('{"step":0}\n{"step":1\n{"step":2}\n', "line 3: this isn't JSON"),
    "two in a line": ('{"step":0}\n{"step":1},{"step":2}\n', "line 3: this isn't JSON"),
    "torn in two": ('{"step":0\n"loss":1}\n{"step":1},{"step":2}\n', "line 2: this isn't JSON"),
    "no object": ('{"step":0}\n[1]\n', r"line 3: found \[1\]; allowed: a step as one JSON object"),
    "NaN": ('{"step":0,"loss":NaN}\n', "line 2: this isn't JSON"),
    "text": ('{"step":0}\n{"step":1,"loss":"2"}\n', "line 3: loss is '2'; allowed: a number or"),
    "flag": ('{"step":0,"clipped":1}\n', "line 2: clipped is 1; allowed: true, false or null"),
    "no step": ('{"step":0}\n{"loss":1}\n', "line 3: step is None; allowed: a whole number"),
    "order": ('{"step":5}\n{"step":7}\n{"step":6}\n', "line 4: step is 6 after 7; allowed"),
    "below 0": ('{"step":-1}\n', "line 2: step is -1; allowed: steps from 0"),
    "too large": ('{"step":36893488147419103232}\n', "step is too large for 64 bits"),
    "large norms": (
        f'{{"step":0,"per_parameter":{{"a":{"1" * 400}}}}}\n',
        "line 2: per_parameter has a norm too large",
    ),
    "norms": ('{"step":0,"per_parameter":{"a":"b"}}\n', "line 2: per_parameter is {'a': 'b'}"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path, text, message):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + text)
    for size in (2, 100):
        with pytest.raises(ConfigError, match=message):
            list(Trace.open(path).chunks(size))


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + '{"step":0}\n{"step":1}\n{"st')
    for size in (1, 2, 3, 100):
        with pytest.warns(UserWarning, match=r"trace.jsonl, line 4: the file was cut off here"):
            chunks = list(Trace.open(path).chunks(size))
        assert [step for chunk in chunks for step in chunk.step.tolist()] == [0, 1]


def test_a_last_line_without_its_end_is_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER + '{"step":0}\n{"step":1}')
    assert Trace.open(path).read().step.tolist() == [0, 1]


def test_what_is_no_trace_is_refused(tmp_path):
    path, parquet = tmp_path / "trace.jsonl", tmp_path / "trace.parquet"
    for text, message in (
        ("", "line 1: this isn't the header of a trace"),
        ('{"step":0}\n', "line 1: this isn't the header of a trace"),
        ('{"format":"gradclip-trace","version":2}\n', "version is 2; this gradclip reads 1"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Trace.open(path)
        parquet.write_text(text or "x" * 100)
        with pytest.raises(ConfigError, match="this isn't a Parquet file"):
            Trace.open(parquet)
    with pytest.raises(ConfigError, match="the file can't be read"):
        Trace.open(tmp_path / "nowhere.jsonl")


WRONG_FIELDS = [
    (
        "counts",
        {"steps": 3},
        r"counts is {'steps': 3}; allowed: null, or an object with the wh",
    ),
    ("counts", 5, "counts is 5; allowed"),
    ("config", [1], r"config is \[1\]; allowed: an object or null"),
    ("norm_type", "abc", "norm_type is 'abc'; allowed: a number above 0"),
    ("norm_type", -1, "norm_type is -1; allowed"),
    ("parameters", "a", "parameters is 'a'; allowed: a list of names"),
    ("source", None, "source is None; allowed: text"),
]


def test_a_header_of_other_types_is_refused(tmp_path, subtests):
    path = tmp_path / "trace.jsonl"
    for key, value, message in WRONG_FIELDS:
        path.write_text(json.dumps({**json.loads(HEADER), key: value}) + "\n")
        with (
            subtests.test(key, value=value),
            pytest.raises(ConfigError, match=f"trace.jsonl, line 1: {message}"),
        ):
            Trace.open(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_reading_takes_memory_for_one_piece_only(tmp_path, suffix):
    path = tmp_path / f"trace.{suffix}"
    steps = 60_000
    write_trace(path, TraceHeader(), ({"step": i, "grad_norm": i / 7} for i in range(steps)))
    trace = Trace.open(path)

    def peak(size):
        tracemalloc.start()
        lengths = [len(chunk) for chunk in trace.chunks(size)]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(lengths) == steps
        assert max(lengths) <= size
        return most

    assert peak(1000) < peak(steps) / 10
    assert peak(1000) < path.stat().st_size


def test_progress_is_told_with_each_piece(tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(path, TraceHeader(), ({"step": i} for i in range(10)))
    trace = Trace.open(path)
    read = [chunk.bytes_read for chunk in trace.chunks(3)]
    assert read == sorted(set(read))
    assert read[-1] == trace.size_hint


def test_parquet_says_what_is_missing_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow(?s:.*)gradclip\[parquet\]"):
        write_trace(tmp_path / "trace.parquet", TraceHeader(), [])
    assert not list(tmp_path.iterdir())


def test_a_parquet_file_with_a_wrong_column_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "trace.parquet"
    for column, message in (
        ({"step": [0], "loss": ["high"]}, "column loss"),
        ({"loss": [1.0]}, "column step: it is missing"),
        ({"step": [0, None, 1]}, "row 2: step is null; allowed: a whole number"),
        ({"step": [4], "per_parameter": ["{bad"]}, "step 4: per_parameter is '{bad'; allowed: a m"),
        ({"step": [4], "per_parameter": [7]}, "step 4: per_parameter is 7; allowed: a mapping"),
    ):
        table = pyarrow.table(column).replace_schema_metadata({"gradclip-trace": HEADER})
        parquet.write_table(table, path)
        for size in (2, 100):
            with pytest.raises(ConfigError, match=message):
                list(Trace.open(path).chunks(size))


def test_a_parquet_file_that_was_damaged_is_named(tmp_path):
    path = tmp_path / "trace.parquet"
    write_trace(path, TraceHeader(), ({"step": i, "grad_norm": i / 7} for i in range(5000)))
    content = bytearray(path.read_bytes())
    content[1000:1400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"trace.parquet, after row 0: the file can't be read \(."
    ):
        Trace.open(path).read()
    foot = content.index(b"gradclip-trace") - 100
    path.write_bytes(content[:foot] + b"\xff" * 50 + content[foot + 50 :])
    with pytest.raises(ConfigError, match=r"trace.parquet: the file can't be read \([^N]"):
        Trace.open(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_name_that_another_run_takes_meanwhile_is_left_to_it(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"

    def rows():
        yield {"step": 0}
        path.write_text("another run's")

    found = write_trace(path, TraceHeader(), rows(), anew=True)
    assert found == tmp_path / f"run-1.{suffix}"
    assert Trace.open(found).read().step.tolist() == [0]
    assert path.read_text() == "another run's"
    assert write_trace(path, TraceHeader(), [{"step": 0}], anew=True).stem == "run-2"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_links_and_leftovers_are_neither_followed_nor_in_the_way(tmp_path, suffix):
    victim, path = tmp_path / "victim", tmp_path / f"run.{suffix}"
    victim.write_text("kept")
    planted = [path, tmp_path / f".{path.name}.{os.getpid()}.tmp", tmp_path / f".{path.name}.tmp"]
    for link in planted:
        link.symlink_to(victim)
    (tmp_path / f"run-1.{suffix}").symlink_to(tmp_path / "nowhere")
    before = set(tmp_path.iterdir())
    found = write_trace(path, TraceHeader(), [{"step": 0}], anew=True)
    assert found.name == f"run-2.{suffix}"
    assert set(tmp_path.iterdir()) - before == {found}
    assert write_trace(path, TraceHeader(), [{"step": 0}]) == path
    with pytest.raises(ConfigError):
        write_trace(path, TraceHeader(), [{"step": 1}, {"step": 0}])
    assert Trace.open(path).read().step.tolist() == [0]
    assert victim.read_text() == "kept"
    assert set(tmp_path.iterdir()) - before == {found}
