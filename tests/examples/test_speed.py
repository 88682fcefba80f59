"""The benchmark of speed: exact counts, honest medians, pages that show what was measured."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.speed import report
from benchmarks.speed.cases import CASES
from benchmarks.speed.command import wanted
from benchmarks.speed.counts import Count, multi_tensor_launches
from benchmarks.speed.pairs import QUICK, Effort, in_turn, with_interval
from benchmarks.speed.rows import ROOT, Found, Point, Results, Row, read, write

ROW = Row("steps", "some", "torch", "ms", 1.0, 2.0, 0.5, 0.4, 0.6, aim=0.5)


def test_the_interval_ends_at_values_that_the_binomial_gives():
    values = [float(i) for i in range(15)]
    assert with_interval(values[::-1]) == (7.0, 3.0, 11.0)  # 4th to 12th: 96.5 %
    assert with_interval(values[:5]) == (2.0, 0.0, 4.0)


def test_both_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    called, now = [], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(name, seconds):
        called.append(name)
        now[0] += seconds if len(called) > 4 else 100.0

    timed = in_turn(
        lambda: call("a", 1.0),
        lambda: call("b", 4.0),
        Effort(pairs=4, seconds=1e9, least=4, quick=True),
    )
    assert "".join(called) == "abbaabbaabba"
    assert timed == (1.0, 4.0, 0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [
        ([10] * 770, 1, 1),
        ([10] * 771, 1, 2),
        ([10] * 448, 2, 1),
        ([10] * 449, 2, 2),
        ([65536 * 2240], 1, 1),
        ([65536 * 2240 + 1], 1, 2),
        ([65536 * 2240, 1], 1, 2),
        ([65536 * 5000], 1, 3),
        ([0, 0, 5], 1, 1),
        ([], 1, 0),
    ],
)
def test_launches_of_multi_tensor_kernels(sizes, depth, launches):
    assert multi_tensor_launches(sizes, depth) == launches


def test_operations_launches_and_bytes():
    with FakeTensorMode():
        grads = [torch.empty(1000, device="cuda") for _ in range(200)]
        coef = torch.empty((), device="cuda")
        with Count() as count:
            torch._foreach_mul_(grads, coef)
        assert (count.operations, count.launches) == (1, 1)
        assert count.bytes == 2 * 200 * 4000 + 4
        with Count() as count:
            torch.stack(torch._foreach_norm(grads)).view(-1)
        assert (count.operations, count.launches) == (2, 3 + 2)  # a stack takes 128 at once
        assert count.bytes == 200 * 4000 + 3 * 200 * 4
        with Count() as count:
            coef.expand(1000) + grads[0]
        assert (count.launches, count.bytes) == (1, 4 + 2 * 4000)


def test_results_come_back_from_the_file(tmp_path):
    results = Results(
        {"processor": "some"},
        {"one": Found("abc", [ROW], [Point("tensors", "torch", 10, 0.5)], 1.5), "two": Found("x")},
    )
    path = tmp_path / "results.json"
    assert read(path) == Results()
    write(results, path)
    found = read(path)
    assert found.machine == results.machine
    assert (found.rows, found.points) == (results.rows, results.points)
    assert found.cases["one"].seconds == 1.5
    assert list(found.cases) == ["one", "two"]


def test_only_what_is_missing_is_measured():
    first, second, *others = CASES
    results = Results({}, {first: Found("today"), second: Found("earlier")})
    assert wanted(results, None, anew=False, code="today") == [second, *others]
    assert wanted(results, None, anew=True, code="today") == list(CASES)
    assert wanted(results, first, anew=False, code="today") == [first]
    with pytest.raises(ValueError, match="nothing like it: no case fits; allowed are"):
        wanted(results, "nothing like it", anew=False, code="today")


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        (ROW, True),
        (replace(ROW, ratio=0.504), True),  # as it is shown
        (replace(ROW, ratio=0.506), False),
        (replace(ROW, aim=None), None),
        (replace(ROW, ratio=None), False),  # then it is about ours
        (replace(ROW, ratio=None, aim=1.0), True),
    ],
)
def test_an_aim_is_reached_by_what_the_table_shows(row, reached):
    assert row.reached is reached
    assert ("missed" in report.aim_of(row)) == (reached is False)


def test_every_aim_has_what_bounds_it():
    for row in read().rows:
        if row.aim is not None and row.part != "memory":
            assert report.bound_of(row)


def test_pages_show_what_was_measured_and_all_of_it():
    results = read()
    assert list(results.cases) == list(CASES)
    for path, make in report.PAGES.items():
        assert path.read_text() == report.between(path, make(results))
    assert {point.axis for point in results.points} == set(report.AXES)
    assert {row.what for row in results.rows} >= {
        f"{name}, clipped" for name in report.COSTS.values()
    }


def test_the_picture_is_drawn(tmp_path):
    path = tmp_path / "picture.png"
    report.draw(read().points, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_case_runs_in_a_process_of_its_own_and_writes_nothing():
    before = (ROOT / "benchmarks" / "README.md").read_bytes()
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--only", "model check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the model says" in " ".join(done.stderr.split())
    assert (ROOT / "benchmarks" / "README.md").read_bytes() == before
    assert QUICK.quick
