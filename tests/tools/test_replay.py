"""Replaying gives what training would have decided; what a trace can't tell is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradclip import ConfigError, GradientClipper, NonFiniteError, SkipLimitError
from gradclip.config import as_config
from gradclip.config.models import RecorderConfig
from gradclip.tools.player import Player
from gradclip.tools.replay import replay
from gradclip.tools.trace import Trace, TraceHeader, write_trace

CONFIGS = {
    "norm": [{"type": "norm", "max_norm": 0.5}],
    "schedule": [
        {
            "type": "norm",
            "max_norm": {"schedule": "linear", "start": 2.0, "end": 0.1, "steps": 60},
        }
    ],
    "zclip": [{"type": "zclip", "warmup_steps": 5, "escape_after": 4, "max_norm": 3.0}],
    "ema": [{"type": "ema", "warmup_steps": 5, "factor": 1.1, "after": 3}],
    "autoclip": [{"type": "autoclip", "warmup_steps": 5, "window": 20, "percentile": 70}],
    "autoclip_all": [{"type": "autoclip", "warmup_steps": 5, "history": "all", "percentile": 70}],
    "skip_spike": [{"type": "skip_spike", "warmup_steps": 5, "z_threshold": 2, "window": 16}],
    "skip_loss": [{"type": "skip_spike", "warmup_steps": 5, "z_threshold": 1, "watch": "both"}],
    "skip_large": [{"type": "skip_large", "limit": 1.2, "relative_to": "ema", "warmup_steps": 5}],
    "adagc": [{"type": "adagc", "scope": "global", "warmup_steps": 5}],
    "chain": [
        {"type": "skip_nonfinite"},
        {"type": "zclip", "warmup_steps": 5, "max_norm": None},
        {"type": "norm", "max_norm": 0.8},
    ],
}


def trained(policies, steps=80, **options):
    """A small training with a NaN and a spike in it: a row a step, and what was decided."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = {"policies": policies, **options}
    clipper = GradientClipper(config, model.named_parameters(), optimizer)
    rows = []
    for step in range(steps):
        x = torch.randn(8, 4)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean() * (30 if step == 50 else 1)
        optimizer.zero_grad()
        loss.backward()
        if step in (7, 40):
            model[0].weight.grad[0, 0] = math.nan
        record = clipper.clip(loss=loss)
        if not record.skipped and record.finite:
            optimizer.step()
        numbers = ("grad_norm", "limit", "coef", "clipped_norm")
        flags = ("clipped", "skipped", "finite")
        row = {name: float(getattr(record, name)) for name in numbers}
        row |= {name: bool(getattr(record, name)) for name in flags}
        rows.append({"step": step, "loss": float(loss.detach()), **row})
    return rows, float(record.clip_rate)


def written(path, rows, **header):
    write_trace(path, TraceHeader(**header), rows)
    return Trace.open(path)


def made(norms, losses=None):
    """Rows of a trace with these norms."""
    rows = [{"step": step, "grad_norm": float(norm)} for step, norm in enumerate(norms)]
    for row, loss in zip(rows, losses if losses is not None else [], strict=False):
        row["loss"] = float(loss)
    return rows


@pytest.mark.parametrize("name", CONFIGS)
def test_decisions_are_those_of_training(name, tmp_path):
    rows, clip_rate = trained(CONFIGS[name])
    trace = written(tmp_path / "trace.jsonl", rows)
    seen = trace.read()
    config = as_config({"policies": CONFIGS[name]})
    decided = Player(config, 2.0).decide(seen.step, seen.grad_norm, seen.loss)
    assert decided.stopped is None
    np.testing.assert_array_equal(decided.limit, seen.limit)
    np.testing.assert_array_equal(decided.coef[:, 0], seen.coef)
    np.testing.assert_array_equal(decided.skipped, seen.skipped)
    (outcome,) = replay(trace, {name: config}).outcomes
    assert outcome.clipped == seen.clipped.sum()
    assert outcome.skipped == seen.skipped.sum() >= 2
    assert outcome.clip_rate == pytest.approx(clip_rate, abs=1e-15)
    assert outcome.limit_last == seen.limit[-1]
    assert outcome.clipped + outcome.skipped > 3, "something has to happen"
    if name != "skip_loss":  # a loss that nobody watches need not be there
        decided = Player(config, 2.0).decide(seen.step, seen.grad_norm, seen.loss * np.nan)
        np.testing.assert_array_equal(decided.limit, seen.limit)


def test_pieces_are_one_series(tmp_path):
    norms = np.random.default_rng(0).lognormal(size=9000)  # more than is read at once
    trace = written(tmp_path / "trace.jsonl", made(norms))
    config = as_config({"policies": [{"type": "norm", "max_norm": 1.5}]})
    shares = []
    (outcome,) = replay(trace, {"a": config}, progress=shares.append).outcomes
    assert len(shares) == 3
    assert 0 < shares[0] < shares[1] < shares[2] == 1
    assert outcome.clipped == (norms > 1.5).sum()
    assert outcome.mean_coef == pytest.approx(np.minimum(1, 1.5 / norms).mean(), rel=1e-6)


def test_steps_in_between(tmp_path):
    trace = written(tmp_path / "trace.jsonl", made(range(1, 101)))
    config = as_config({"policies": [{"type": "norm", "max_norm": 49.5}]})
    result = replay(trace, {"a": config}, start=40, stop=60)
    assert (result.first, result.last, result.steps) == (40, 59, 20)
    assert list(result.outcomes[0].clipped_steps) == list(range(49, 60))
    assert any("step 40" in note for note in result.notes)
    with pytest.raises(ConfigError, match="no step from 200"):
        replay(trace, {"a": config}, start=200)


@pytest.mark.parametrize(
    ("policies", "on_nonfinite", "error"),
    [
        ([{"type": "norm", "max_norm": 1}], "raise", NonFiniteError),
        (
            [{"type": "skip_large", "limit": 1, "max_consecutive": 3, "fallback": "raise"}],
            "skip",
            SkipLimitError,
        ),
    ],
)
def test_where_training_would_have_ended(policies, on_nonfinite, error, tmp_path):
    norms = [0.5] * 10 + ([math.nan] if error is NonFiniteError else [2.0] * 8) + [0.5] * 10
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    config = as_config({"policies": policies, "on_nonfinite": on_nonfinite})
    clipper = GradientClipper(config, [("only", parameter)])
    ended = None
    for step, norm in enumerate(norms):
        parameter.grad = torch.tensor([norm], dtype=torch.float64)
        try:
            clipper.clip()
        except error:
            ended = step
            break
    trace = written(tmp_path / "trace.jsonl", made(norms))
    (outcome,) = replay(trace, {"a": config}).outcomes
    assert outcome.stopped_at == ended is not None
    assert outcome.steps == ended
    assert outcome.why_stopped


def test_ignored_steps_are_not_learnt_from(tmp_path):
    norms = [1.0] * 20 + [math.nan] + [1.0] * 5
    config = {"policies": [{"type": "ema", "warmup_steps": 5}], "on_nonfinite": "ignore"}
    trace = written(tmp_path / "trace.jsonl", made(norms))
    result = replay(trace, {"a": as_config(config)})
    assert result.nonfinite == 1
    assert result.outcomes[0].skipped == 0
    assert result.outcomes[0].limit_last == pytest.approx(2.0)


REFUSED = [
    ({"policies": [{"type": "agc"}]}, "'agc'"),
    ({"policies": [{"type": "value", "clip_value": 1}]}, "'value'"),
    ({"policies": [{"type": "spam"}]}, "'spam'"),
    ({"policies": [{"type": "spike_max"}]}, "'spike_max'"),
    ({"policies": [{"type": "uclip", "limit": 1}]}, "'uclip'"),
    ({"policies": [{"type": "rms", "max_rms": 1}]}, "scope is 'parameter'"),
    ({"policies": [{"type": "rms", "max_rms": 1, "scope": "global"}]}, "number of elements"),
    ({"policies": [{"type": "zclip", "scope": "parameter"}]}, "scope is 'parameter'"),
    ({"policies": [{"type": "ema", "norm_type": 1}]}, "norm_type is 1"),
    ({"policies": [{"type": "skip_spike", "watch": "loss"}]}, "step 0 of the trace has none"),
    (
        {"policies": [{"type": "zclip"}], "groups": [{"match": "*", "counted": False}]},
        "groups",
    ),
]


def test_what_one_norm_cannot_tell_is_refused(tmp_path, subtests):
    trace = written(tmp_path / "trace.jsonl", made([1.0] * 10))
    for config, words in REFUSED:
        with subtests.test(words), pytest.raises(ConfigError, match=words):
            replay(trace, {"a.yaml": as_config(config)})


def test_sparse_norms_are_told(tmp_path):
    rows = [{"step": 10 * i, "grad_norm": 1.0} for i in range(20)] + [{"step": 200, "loss": 1.0}]
    trace = written(tmp_path / "trace.jsonl", rows, source="import:csv")
    result = replay(trace, {"a": as_config({"policies": [{"type": "zclip"}]})})
    assert result.steps == 20
    assert any("one of" in note for note in result.notes)
    assert any("1 steps without a norm" in note for note in result.notes)


def test_a_flight_record_is_replayed_from_its_last_steps_in_a_row(tmp_path):
    config = as_config({"policies": [{"type": "zclip", "warmup_steps": 5, "max_norm": None}]})
    config = config.model_copy(update={"recorder": RecorderConfig(steps=50, worst=4)})
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    clipper = GradientClipper(config, [("only", parameter)])
    norms = np.random.default_rng(0).lognormal(size=120)
    norms[[10, 30]] = 50.0, 80.0
    for norm in norms:
        parameter.grad = torch.tensor([norm], dtype=torch.float64)
        clipper.clip()
    trace = Trace.open(clipper.recorder.write(tmp_path / "trace.jsonl"))
    assert 30 in trace.read().step
    result = replay(trace, {"a": config})
    assert (result.first, result.last, result.steps) == (70, 119, 50)
    assert any("step 70" in note for note in result.notes)
    whole = replay(written(tmp_path / "all.jsonl", made(norms)), {"a": config})
    np.testing.assert_array_equal(whole.outcomes[0].limit.last[70:], trace.read().limit[-50:])
