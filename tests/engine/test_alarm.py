"""Alarms: norms that rise, norms that don't come back, runs that withhold too many steps."""

import logging
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.ranks import run_on_ranks

from gradclip import AlarmConfig, AlarmError, ConfigError, GradientClipper, Spike
from gradclip.adapters import ClipperSet
from gradclip.records.alarm import SpikeDetector
from gradclip.records.record import COLUMNS

FIXED = [{"type": "norm", "max_norm": 1.0}]


def noise(steps, seed=0, deviation=0.3):
    return np.random.default_rng(seed).lognormal(0.0, deviation, steps)


def rows(norms, has_gradient=None, skipped=None):
    """What a recorder keeps of these norms."""
    norms = torch.as_tensor(np.asarray(norms), dtype=torch.float64)
    found = torch.zeros(len(norms), len(COLUMNS), dtype=torch.float64)
    columns = {
        "step": torch.arange(len(norms)),
        "grad_norm": norms,
        "nonfinite": norms.isfinite().logical_not(),
        "has_gradient": 1.0 if has_gradient is None else torch.as_tensor(has_gradient),
        "skipped": 0.0 if skipped is None else torch.as_tensor(skipped),
    }
    for name, values in columns.items():
        found[:, COLUMNS.index(name)] = values
    return found


def found_in(steps, **config):
    return [(s.kind, s.step) for s in SpikeDetector(AlarmConfig(**config)).follow(steps)]


def times(factors, seed=0):
    """Noise of 2000 steps, multiplied by these factors between two steps."""
    norms = noise(2000, seed)
    for first, stop, factor in factors:
        norms[first:stop] = norms[first:stop] * factor
    return norms


STEPS = np.arange(2000)
EVERY_20TH, TENTH = STEPS % 20 == 3, STEPS % 10 == 3
CASES = {
    "nothing": (rows(times([])), []),
    "a spike that comes back": (rows(times([(700, 701, 1e6), (900, 901, 1e6)])), []),
    "two steps in a row": (rows(times([(700, 702, 1e6)])), []),
    "some high steps that come back": (rows(times([(700, 760, 5)])), [("rise", 700)]),
    "a spike that lingers": (rows(times([(700, 2000, 5)])), [("rise", 700), ("lingering", 700)]),
    "a small step up": (rows(times([(700, 2000, 2)])), [("rise", 700), ("lingering", 700)]),
    "a slow drift": (rows(times([(700, 2000, 1.005 ** np.arange(1300))]))[:900], [("rise", 740)]),
    "decay": (rows(times([(0, 2000, 0.997**STEPS)])), []),
    "a drop": (rows(times([(700, 2000, 0.01)])), []),
    "norms that hardly vary": (rows(1 + 0.01 * np.sin(STEPS / 50)), []),
    "NaN": (rows(np.where(EVERY_20TH, math.nan, times([]))), []),
    "infinities that were let through": (
        rows(np.where(EVERY_20TH, math.inf, times([(700, 2000, 5)]))),
        [("rise", 700), ("lingering", 700)],
    ),
    "zeros": (rows(times([(700, 800, 0), (900, 901, 0)])), []),
    "no gradients": (rows(times([(700, 800, 0)]), has_gradient=(STEPS < 700) | (STEPS > 800)), []),
    "high, and withheld": (
        rows(times([(700, 790, 50)]), skipped=(STEPS > 699) & (STEPS < 790)),
        [],
    ),
    "a tenth withheld": (rows(times([]), skipped=TENTH), []),
    "more than a tenth": (rows(times([]), skipped=TENTH | (STEPS == 900)), [("withheld", 3)]),
    "more than a tenth of those with a gradient": (
        rows(times([]), has_gradient=STEPS % 2 == 0, skipped=STEPS % 16 == 4),
        [("withheld", 4)],
    ),
    "withheld long ago": (rows(times([]), skipped=(STEPS < 90) | (STEPS > 1989)), []),
    "all withheld": (rows(times([])[:150], skipped=np.ones(150)), [("withheld", 0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_told_of_a_run(name):
    steps, wanted = CASES[name]
    found = found_in(steps)
    assert [kind for kind, _ in found] == [kind for kind, _ in wanted]
    for (kind, step), (_, began) in zip(found, wanted, strict=True):
        assert abs(step - began) <= (0 if kind == "withheld" else 60 if "drift" in name else 5)
    scaled = steps.clone()
    scaled[:, COLUMNS.index("grad_norm")] *= 1e6
    assert found_in(scaled) == found
    parts = SpikeDetector(AlarmConfig())
    in_parts = [spike for part in steps.split(7) for spike in parts.follow(part)]
    assert [(spike.kind, spike.step) for spike in in_parts] == found


def test_each_field_has_its_say():
    lingers, up = rows(times([(700, 2000, 5)])), rows(times([(700, 720, 5)]))
    assert found_in(lingers, rise=math.inf) == []
    assert found_in(up, lingers=8) == [("rise", 700), ("lingering", 700)]
    assert found_in(lingers, warmup_steps=900) == []
    withheld = rows(times([]), skipped=STEPS % 2 == 0)
    assert found_in(withheld, withheld=1.0) == []
    assert found_in(withheld, withheld=0.3)[0] == ("withheld", 0)


def test_false_alarms_come_as_rarely_as_the_docstring_says():
    """At `rise` 3, where there are enough of them to count."""
    spikes = SpikeDetector(AlarmConfig(rise=3.0, lingers=10**9)).follow(rows(noise(120_000)))
    twice = 2 * (3.0 + 1.166)
    theory = (math.exp(twice) - twice - 1) / 2
    assert 120_000 / len(spikes) == pytest.approx(theory, rel=0.4)
    assert theory == pytest.approx(2073, rel=1e-3)


def made(listener=None, kernel=None, recorder=None, **alarm):
    """A clipper of one parameter that steps by itself, and what makes a step of a norm."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    config = {"policies": FIXED, "alarm": {"warmup_steps": 20} | alarm, "recorder": recorder}
    clipper = GradientClipper(config, [("p", parameter)], optimizer, kernel=kernel)
    if listener is not None:
        clipper.on_spike(listener)

    def step(norm):
        parameter.grad = torch.tensor([0.0, norm], dtype=torch.float32)
        return clipper.clip()

    return clipper, step, parameter


def high_from(first, steps=None):
    """Norms around 1 that are ten times that from a step on."""
    norms = noise(400, deviation=0.1)
    norms[first : None if steps is None else first + steps] *= 10
    return norms.tolist()


@pytest.mark.parametrize("kernel", ["cpu", "accelerator"])
@pytest.mark.parametrize("flushes", [10**6, 3])
def test_a_listener_is_told_at_most_one_interval_late_and_nobody_else_is(caplog, kernel, flushes):
    told = []
    clipper, step, _ = made(lambda spike: told.append((count, spike)), kernel=kernel)
    norms = high_from(203)
    for count, norm in enumerate(norms):
        step(norm)
        if count % flushes == 0:
            clipper.flush()
    (first, rise), (second, lingering) = told
    assert (rise.kind, rise.step, rise.checkpoint) == ("rise", 203, None)
    assert rise.usual == pytest.approx(1.0, rel=0.1)
    assert rise.norm == pytest.approx(norms[205], rel=1e-6)  # 3 a step; above 8 in the third
    assert (first, second) == (210, 310)
    assert lingering.kind == "lingering"
    assert lingering.step == 203
    assert lingering.usual == rise.usual
    assert not caplog.records


def test_without_a_listener_each_alarm_is_one_warning(caplog):
    _, step, _ = made()
    for norm in high_from(203):
        step(norm)
    first, second = (record.getMessage() for record in caplog.records)
    assert "clip: gradient norms have risen since step 203 (norm" in first
    assert "clip: gradient norms rose at step 203 and haven't come back" in second
    assert "no checkpoint from before is known" in first
    assert "risen" in str(Spike("rise", 3, 2.0, 1.0, "here"))
    assert "the last checkpoint from before is here." in str(Spike("rise", 3, 2.0, 1.0, "here"))


@pytest.mark.parametrize(
    ("alarm", "skipped", "reason", "ends_at"),
    [
        ({"stop": "rise"}, False, "alarm.stop is 'rise'", 210),
        ({"stop": "lingering"}, False, "alarm.stop is 'lingering'", 310),
        ({"withheld": 0.05}, True, "alarm.withheld is 0.05", 260),
    ],
)
def test_a_run_that_ends_leaves_the_step_as_it_was(caplog, alarm, skipped, reason, ends_at):
    told = []
    clipper, step, parameter = made(told.append, **alarm)
    clipper.saved_to("s3://bucket/good")
    norms = [math.nan if skipped and n > 5 else n for n in high_from(203)]
    for norm in norms[:ends_at]:
        step(norm)
    before = clipper.state_dict()
    with pytest.raises(AlarmError, match="so the run ends, with exit code 76") as error:
        step(norms[ends_at])
    assert parameter.grad.tolist() == torch.tensor([0.0, norms[ends_at]]).tolist() or skipped
    assert str(clipper.state_dict()) == str(before)
    assert reason in str(error.value)
    assert isinstance(error.value, SystemExit)
    assert error.value.code == 76
    assert error.value.checkpoint == told[-1].checkpoint == "s3://bucket/good"
    assert [record.levelno for record in caplog.records if "76" in record.message] == [
        logging.ERROR
    ]
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    for norm in norms[ends_at : ends_at + 30]:  # whoever catches it may go on
        step(norm)


def test_the_flight_record_of_a_run_that_ends_is_written_at_once(tmp_path):
    file = tmp_path / "trace.jsonl"
    _, step, _ = made(recorder={"file": str(file), "steps": 512}, stop="rise")
    norms = high_from(203)
    for norm in norms[:210]:
        step(norm)
    file.unlink(missing_ok=True)
    with pytest.raises(AlarmError):
        step(norms[210])
    assert len(file.read_text().splitlines()) == 1 + 210


def test_what_a_listener_raises_ends_the_step():
    def refuse(spike):
        raise InterruptedError(spike.kind)

    clipper, step, parameter = made(refuse)
    norms = high_from(203)
    for norm in norms[:210]:
        step(norm)
    with pytest.raises(InterruptedError, match="rise"):
        step(norms[210])
    assert float(parameter.grad[1]) == pytest.approx(norms[210])
    assert int(clipper.state_dict()["counts"]["steps"]) == 210


SAVED = {  # when each was saved, and which one a spike that begins at step 203 names
    "the newest from before": ({"a": [100], "b": [200], "c": [206]}, "b"),
    "one saved as it begins": ({"a": [100], "b": [203]}, "b"),
    "one that was written over": ({"a": [100], "last": [200, 206]}, "a"),
    "one that is gone": ({"a": [100], "gone": [200]}, "a"),
    "none from before": ({"c": [206]}, None),
}


@pytest.mark.parametrize("name", SAVED)
def test_the_last_good_checkpoint_is_named(tmp_path, name):
    saved, wanted = SAVED[name]
    told = []
    clipper, step, _ = made(told.append)
    for count, norm in enumerate(high_from(203)):
        for path in (path for path, steps in saved.items() if count in steps):
            clipper.saved_to(tmp_path / path)
            if path != "gone":
                (tmp_path / path).touch()
        step(norm)
    assert told[0].checkpoint == (None if wanted is None else str(tmp_path / wanted))


def test_a_restart_learns_anew_and_knows_older_checkpoints_alone():
    told = []
    clipper, step, _ = made(told.append)
    saved = {}
    for count, norm in enumerate(high_from(400)[:200]):
        if count in (50, 100, 150):
            saved[count] = clipper.state_dict()
            clipper.saved_to(f"s3://at/{count}")
        step(norm)
    clipper.load_state_dict(saved[100])
    for norm in [20 * norm for norm in high_from(203)]:  # another level: no alarm for that
        step(norm)
    assert [(spike.kind, spike.step) for spike in told] == [("rise", 303), ("lingering", 303)]
    assert told[0].checkpoint == "s3://at/100"


def test_withheld_steps_are_counted_anew_after_a_restart():
    clipper, step, _ = made(withheld=0.05)
    for _ in range(2):
        for _ in range(49):
            step(math.nan)
        clipper.load_state_dict(clipper.state_dict())
        step(1.0)


def test_parameters_that_join_raise_no_alarm():
    told = []
    old, new = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([old], lr=1.0)
    config = {"policies": FIXED, "alarm": {"warmup_steps": 20}}
    clipper = GradientClipper(config, [("old", old), ("new", new)], optimizer)
    clipper.on_spike(told.append)
    for count, norm in enumerate(high_from(400)):
        if count == 203:
            optimizer.add_param_group({"params": [new]})
        old.grad, new.grad = torch.tensor([norm]), torch.tensor([20 * norm])
        record = clipper.clip()
    assert float(record.grad_norm) > 15
    assert told == []


def test_a_listener_without_the_section_is_refused():
    clipper = GradientClipper(FIXED, [("p", torch.nn.Parameter(torch.zeros(2)))])
    with pytest.raises(ConfigError, match=r"no section alarm.*Add `alarm: \{\}`"):
        ClipperSet([clipper]).on_spike(print)
    clipper.saved_to("anywhere")


PROGRAM = """
import math, torch
from gradclip import GradientClipper
p = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([p], lr=0.1)
config = {"policies": [{"type": "norm", "max_norm": 1.0}], "recorder": {}}
config["alarm"] = {"warmup_steps": 20, "stop": "rise"}
clipper = GradientClipper(config, [("p", p)], optimizer)
clipper.attach(optimizer)
for step in range(100):
    p.grad = torch.tensor([0.0, 10.0 if step >= 50 else 1.0])
    optimizer.step()
    if step == 39:
        torch.save(clipper.state_dict(), "good.pt")
        clipper.saved_to("good.pt")
"""


def test_a_process_ends_with_its_own_exit_code_and_says_why(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 76
    assert "Traceback" not in done.stderr
    assert "have risen since step 50" in done.stderr
    assert "the last checkpoint from before is good.pt." in done.stderr
    assert len((tmp_path / "gradclip.trace.jsonl").read_text().splitlines()) == 1 + 60


def stops_on(rank, world):
    """Steps until the end, and what was logged; the first rank alone flushes, at odd steps."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("gradclip").addHandler(handler)
    told = []
    clipper, step, _ = made(told.append, stop="rise")
    ended = None
    for count, norm in enumerate(high_from(203)[:300]):
        try:
            step(norm)
        except AlarmError:
            ended = count
            break
        if rank == 0 and count % 7 == 0:
            clipper.flush()
    logging.getLogger("gradclip").removeHandler(handler)
    return ended, told, len(records)


def test_every_rank_ends_at_the_same_step_and_the_first_says_it():
    (first, told, said), (second, also_told, said_there) = run_on_ranks(stops_on, 2)
    assert first == second == 210
    assert told == also_told
    assert (said, said_there) == (1, 0)
