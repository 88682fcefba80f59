"""What is wrong with how a run was clipped is found, and what is fine isn't."""

import json
import math

import numpy as np
import pytest

from gradclip.tools.main import main
from gradclip.tools.trace import TraceHeader, write_trace

STEADY = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
STEPS = np.arange(2000)
SPIKE = np.where((STEPS >= 1000) & (STEPS < 1250), 6.0, 1.0)
NORM = {"policies": [{"type": "skip_spike"}, {"type": "norm", "max_norm": 9.0}]}
ZCLIP = {"policies": [{"type": "zclip"}], "on_nonfinite": "ignore"}


def broken(*steps):
    return np.where(np.isin(STEPS, steps), math.nan, STEADY)


RUNS = {  # norms, limit, configuration; what is found: the check, words of it, of the change
    "fine": (STEADY, 1.6, NORM, []),
    "never": (STEADY, 9.0, NORM, [("never", "in none of 2,000", "policies[1].max_norm: 1.6")]),
    "never, by another policy": (
        STEADY, 9.0, ZCLIP, [("never", "is 9 or more", "gradclip recommend")],
    ),
    "always": (STEADY, 0.1, None, [("always", "in 100.0% of 2,000", "max_norm: 1.6")]),
    "no limit": (STEADY, math.inf, None, []),
    "not finite": (
        broken(700, 900, 901, 902), 1.6, ZCLIP,
        [("not finite", "first is step 700; at most 3 stand in a row", "on_nonfinite: skip")],
    ),
    "not finite, and withheld": (
        broken(700), 1.6, NORM, [("not finite", "1 of 2,000 steps", "recorder: {}")],
    ),
    "not finite while a loss scale looks for its level": (broken(0, 1, 2), 1.6, None, []),
    "drift": (
        STEADY * np.geomspace(1, 8, 2000), 3.0, None, [("drift", "went from 1.", "type: autoclip")],
    ),
    "drift under a limit that follows": (
        STEADY * np.geomspace(1, 8, 2000), 2 * np.geomspace(1, 8, 2000), None, [],
    ),
    "a spike of one step": (np.where(STEPS == 1000, 99.0, STEADY), 1.6, None, []),
    "a lingering spike": (
        STEADY * SPIKE, 1.6, None,
        [("lingering spike", "From about step 1000", "type: zclip")],
    ),
    "a lingering spike at the end": (
        STEADY * np.where(STEPS >= 1800, 6.0, 1.0), 1.6, None,
        [("lingering spike", "hadn't come back at the end", "type: zclip")],
    ),
}  # fmt: skip


def written(path, norms, limit=None, config=None):
    limits = np.broadcast_to(math.nan if limit is None else limit, norms.shape)
    rows = [
        {
            "step": step,
            "grad_norm": float(norm),
            **({} if limit is None else {"limit": float(bound), "clipped": bool(norm > bound)}),
        }
        for step, (norm, bound) in enumerate(zip(norms, limits, strict=True))
    ]
    write_trace(path, TraceHeader(config=config), rows)
    return path


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["lint", *map(str, arguments)])
    return stop.value.code


@pytest.mark.parametrize(("norms", "limit", "config", "expected"), RUNS.values(), ids=RUNS)
def test_what_is_wrong_is_found_with_the_line_to_change(
    tmp_path, capsys, norms, limit, config, expected
):
    path = written(tmp_path / "run.jsonl", norms, limit, config)
    assert call(path, "--json") == (1 if expected else 0)
    found = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in found["findings"]] == [check for check, *_ in expected]
    for finding, (_, says, change) in zip(found["findings"], expected, strict=True):
        assert says in finding["says"]
        assert change in finding["change"]


def test_findings_are_the_same_however_the_file_is_read(tmp_path, monkeypatch, capsys):
    path = written(tmp_path / "run.jsonl", broken(*range(60, 200)) * SPIKE, 1.6)
    call(path, "--json")
    expected = capsys.readouterr().out
    for size in (7, 133):
        monkeypatch.setattr("gradclip.tools.replay._AT_ONCE", size)
        call(path, "--json")
        assert capsys.readouterr().out == expected
    assert "at most 140 stand in a row" in expected


def test_a_log_and_a_limit_known_from_elsewhere(tmp_path, capsys):
    rows = [{"step": 10 * i, "grad_norm": float(n)} for i, n in enumerate(STEADY)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows}))
    assert call(path) == 0
    assert "The limit isn't known, so nothing is said of it; --limit" in capsys.readouterr().out
    assert call(path, "--limit", "0.1", "--steps", "1000:9000") == 1
    shown = capsys.readouterr().out
    assert "1 finding in 800 steps, 1000 to 8990" in shown
    assert "change: max_grad_norm: 1." in shown
    assert "There is a norm on one of 10 steps" in shown
    assert call(path, "--limit", "1", "--steps", "0:900") == 0
    assert "90 steps had a limit, too few to judge it" in capsys.readouterr().out
    assert call(path, "--steps", "99999:") == 2
    assert "no step has a norm" in capsys.readouterr().err


def test_an_entry_on_several_steps_is_not_clipped_as_a_whole(tmp_path, capsys):
    """Of each ten steps one was clipped: the mean norm is below the limit."""
    rows = "".join(f"{10 * i},0.8,1.0,1\n" for i in range(300))
    path = tmp_path / "log.csv"
    path.write_text("step,clip/grad_norm,clip/limit,clip/clipped\n" + rows)
    assert call(path) == 0
    assert "no findings in 300 steps" in capsys.readouterr().out
