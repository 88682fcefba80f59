"""What is recommended clips as often as was asked for, or says that it isn't sure to."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from support.second_half import RUNS, chance, rates_later, recommended

from gradclip import ClipConfig, ConfigError, load_yaml
from gradclip.config import parse_mapping
from gradclip.tools.player import Player
from gradclip.tools.recommend import recommend
from gradclip.tools.replay import replay
from gradclip.tools.show_replay import recommendation_as_json
from gradclip.tools.trace import Trace, TraceHeader, write_trace


def written(path, norms, **header):
    rows = ({"step": step, "grad_norm": float(norm)} for step, norm in enumerate(norms))
    write_trace(path, TraceHeader(**header), rows)
    return Trace.open(path)


def steady(steps, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.4, size=steps)


@pytest.mark.parametrize("run", RUNS)
def test_first_half_tells_the_rate_of_the_second_within_a_tenth(run):
    wanted = [0.05, 0.1, 0.2]
    taken = [recommended(run, rate).taken for rate in wanted]
    found = [parse_mapping(option.config).policies for option in taken]
    # They differ in the percentile alone: side by side in one replay, which is three times as fast.
    assert {policy.model_copy(update={"percentile": 0.0}) for (policy,) in found} == {
        found[0][0].model_copy(update={"percentile": 0.0})
    }
    percentiles = torch.tensor([policy.percentile for (policy,) in found], dtype=torch.float64)
    many = found[0][0].model_copy(update={"percentile": percentiles})
    rates = rates_later(run, ClipConfig.model_construct(policies=[many]), slots=3)
    np.testing.assert_allclose(rates, wanted, rtol=0.1)


@pytest.mark.parametrize("run", ["mlp", "lstm"])
def test_few_steps_for_a_low_rate_are_admitted(run):
    wanted = 0.01
    found = recommended(run, wanted)
    assert all(option.confidence != "high" for option in found.options)
    (rate,) = rates_later(run, parse_mapping(found.taken.config))
    assert abs(rate - wanted) <= 3.1 * chance(run, wanted)


def test_a_fixed_threshold_on_moving_norms_is_not_called_sure():
    for run, wanted in itertools.product(("gpt", "mlp", "conv", "lstm"), (0.05, 0.1, 0.2)):
        fixed = recommended(run, wanted).options[0]
        (rate,) = rates_later(run, parse_mapping(fixed.config))
        assert abs(rate - wanted) > 0.1 * wanted
        assert fixed.confidence == "low"


def test_a_fixed_threshold_is_taken_where_norms_keep_their_level(tmp_path):
    norms = steady(60_000)
    found = recommend(written(tmp_path / "trace.jsonl", norms), 0.1)
    assert found.taken.name == "fixed threshold"
    assert found.taken.confidence == "high"
    (policy,) = parse_mapping(found.taken.config).policies
    assert np.mean(steady(60_000, seed=1) > policy.max_norm) == pytest.approx(0.1, rel=0.05)


def test_the_recent_level_is_what_counts(tmp_path):
    norms = np.concatenate([10 * steady(3000), steady(3000)])
    found = recommend(written(tmp_path / "trace.jsonl", norms), 0.1)
    fixed = found.options[0]
    assert fixed.first >= 3000
    assert np.mean(steady(3000, seed=1) > fixed.config["policies"][0]["max_norm"]) < 0.15
    assert fixed.confidence == "low"
    assert any("earlier" in reason for reason in fixed.reasons)


def test_every_option_fits_validates_and_is_ready_to_paste(tmp_path):
    trace = written(tmp_path / "trace.jsonl", [*steady(400), math.nan])
    shares = []
    found = recommend(trace, 0.2, every_policy=True, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    names = [option.name for option in found.options]
    assert names == [
        "fixed threshold",
        "autoclip",
        "ema",
        "zclip",
        "zclip under a ceiling",
        "skip_spike",
    ]
    assert found.nonfinite == 1
    for option in found.options:
        path = tmp_path / "clip.yaml"
        path.write_text(option.yaml)
        config = load_yaml(path)
        (outcome,) = replay(trace, {option.name: config}, start=option.first).outcomes
        assert outcome.clipped + outcome.skipped > 0
        close = 0.1 if option.name == "skip_spike" else 0.04
        assert option.rate == pytest.approx(0.2, abs=close), option.name
        assert option.reasons


@pytest.mark.parametrize(
    ("policies", "field", "values"),
    [
        ([{"type": "autoclip", "window": 30, "warmup_steps": 30}], "percentile", [60.0, 93.5]),
        ([{"type": "ema", "warmup_steps": 10}], "factor", [1.05, 1.7]),
        ([{"type": "zclip", "max_norm": None}, {"type": "norm", "max_norm": 1.5}], "z_threshold",
         [0.4, 2.0]),
    ],
)  # fmt: skip
def test_values_side_by_side_decide_as_each_alone(policies, field, values):
    norms, step, loss = steady(300), np.arange(300), np.full(300, np.nan)
    config = parse_mapping({"policies": policies})
    first, *rest = config.policies
    many = first.model_copy(update={field: torch.tensor(values, dtype=torch.float64)})
    both = config.model_copy(update={"policies": [many, *rest]})
    made = Player(both, 2.0, slots=2).decide(step, norms, loss)
    for slot, value in enumerate(values):
        alone = parse_mapping({"policies": [{**policies[0], field: value}, *policies[1:]]})
        expected = Player(alone, 2.0).decide(step, norms, loss).coef[:, 0]
        np.testing.assert_allclose(made.coef[:, slot], expected, rtol=1e-12)
        assert 0 < np.mean(expected < 1) < 1


def test_settings_say_which_norm_they_are_of(tmp_path):
    trace = written(tmp_path / "trace.jsonl", steady(400), norm_type=math.inf)
    found = recommend(trace, 0.2)
    assert "norm_type: .inf" in json.loads(recommendation_as_json(found))["options"][0]["yaml"]
    for option in found.options:
        assert option.config["policies"][0]["norm_type"] == math.inf
        replay(trace, {option.name: parse_mapping(option.config)})


def test_norms_on_few_steps_are_told(tmp_path):
    rows = [{"step": 50 * i, "grad_norm": float(n)} for i, n in enumerate(steady(300))]
    write_trace(tmp_path / "trace.jsonl", TraceHeader(source="import:csv"), rows)
    found = recommend(Trace.open(tmp_path / "trace.jsonl"), 0.2)
    assert any("one of" in fact for fact in found.facts)


def test_what_can_not_be_fitted_is_refused(tmp_path):
    trace = written(tmp_path / "trace.jsonl", steady(199))
    with pytest.raises(ConfigError, match="199 steps have a norm; at least 200"):
        recommend(trace)
    for rate in (0.0, 0.6, 5.0, math.nan):
        with pytest.raises(ConfigError, match="clip rate is"):
            recommend(trace, rate)
