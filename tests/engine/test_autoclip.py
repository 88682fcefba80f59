"""AutoClip and the quantile it keeps in constant memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops import CountOps
from support.vectors import cases, load, number

from gradclip import AutoClip, ConfigError
from gradclip.config import parse_mapping
from gradclip.policies.sketch import BINS, quantile, taken_in
from gradclip.types import Stats

CPU = torch.device("cpu")
ACCURACY = 0.005


def sketch_of(values):
    counts = torch.zeros(BINS, 1, dtype=torch.float64)
    for value in values:
        counts = taken_in(counts, torch.tensor([value], dtype=torch.float64))
    return counts


def stats(norm):
    norms = torch.tensor([norm], dtype=torch.float64)
    return Stats(norms, torch.tensor(True), torch.zeros((), dtype=torch.float64))


def limits(policy, norms, state=None):
    """The limit of every step, and the state after them."""
    state = state or policy.init(1, CPU)
    found = []
    for norm in norms:
        decision, state = policy.decide(stats(norm), state)
        found.append(float(decision.limit))
    return found, state


def spiky(steps, seed=0):
    generator = np.random.default_rng(seed)
    norms = generator.lognormal(0.0, 0.5, steps)
    norms[generator.random(steps) < 0.03] *= 40
    return norms.tolist()


class TestSketch:
    @settings(max_examples=60, deadline=None)
    @given(
        values=st.lists(st.floats(1e-11, 1e11), min_size=1, max_size=40),
        share=st.floats(0.0, 1.0),
    )
    def test_is_within_half_a_percent_of_numpy(self, values, share):
        found = float(quantile(sketch_of(values), share))
        assert found == pytest.approx(float(np.quantile(values, share)), rel=ACCURACY)

    @pytest.mark.parametrize("case", cases("ddsketch"))
    def test_recorded_bounds(self, case):
        values = [v for v in map(number, load("ddsketch")["inputs"]["values"]) if v]
        zeros = [i for i, v in enumerate(load("ddsketch")["inputs"]["values"]) if not number(v)]
        seen = 0
        for out in case["outputs"]:
            if zeros and out["n"] > zeros[0]:
                continue  # a norm of 0 is no observation here
            found = float(quantile(sketch_of(values[: out["n"]]), out["q"]))
            assert found == pytest.approx(out["exact_linear"], rel=ACCURACY)
            seen += 1
        assert seen
        every = sketch_of(values)
        for share in (0.05, 0.1, 0.5, 0.9, 0.95, 0.99):
            want = float(np.quantile(values, share))
            assert float(quantile(every, share)) == pytest.approx(want, rel=ACCURACY)

    def test_bin_borders_and_what_lies_outside(self):
        for value in (1e-12, 1e12, 1.0, math.exp(0.01), math.nextafter(1.0, 2)):
            assert float(quantile(sketch_of([value]), 0.5)) == pytest.approx(value, rel=ACCURACY)
        for value, near in ((1e-30, 1e-12), (1e30, 1e12)):
            assert float(quantile(sketch_of([value]), 0.5)) == pytest.approx(near, rel=0.02)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    def test_what_is_no_norm_leaves_it_as_it_was(self, bad):
        before = sketch_of([1.0, 2.0])
        assert torch.equal(taken_in(before, torch.tensor([bad], dtype=torch.float64)), before)

    def test_slots_are_apart(self):
        counts = torch.zeros(BINS, 2, dtype=torch.float64)
        counts = taken_in(counts, torch.tensor([1.0, 100.0], dtype=torch.float64))
        torch.testing.assert_close(
            quantile(counts, 0.5), torch.tensor([1.0, 100.0]).double(), rtol=ACCURACY, atol=0
        )


class TestConstant:
    def test_memory(self):
        state = AutoClip(history="all").init(1, CPU)
        assert sum(v.numel() * v.element_size() for v in state.values()) <= 64 * 1024

    @pytest.mark.parametrize("history", ["all", "window"])
    def test_work_and_state_do_not_grow(self, history):
        policy = AutoClip(history=history, warmup_steps=5)
        _, state = limits(policy, spiky(10))
        late = {name: value.clone() for name, value in state.items()}
        late["seen"] += 1e6
        if history == "all":
            late["counts"] += 200.0
        ops = []
        for kept in (state, late):
            with CountOps() as count:
                _, after = policy.decide(stats(1.0), kept)
            assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in kept.items()}
            ops.append(count.count)
        assert ops[0] == ops[1] < 80


class TestPolicy:
    @pytest.mark.parametrize("inclusive", [False, True])
    @pytest.mark.parametrize("history", ["window", "all"])
    def test_is_numpys_percentile(self, history, inclusive):
        norms = spiky(300)
        norms[40] = 0.0
        for percentile in (0.0, 10.0, 62.5, 95.0, 100.0):
            policy = AutoClip(
                percentile=percentile,
                history=history,
                window=50,
                warmup_steps=7,
                inclusive=inclusive,
                max_norm=30.0,
                min_norm=0.6,
            )
            found, _ = limits(policy, norms)
            seen = []
            for norm, limit in zip(norms, found, strict=True):
                past = seen + [norm] * (inclusive and norm > 0)
                seen = seen + [norm] * (norm > 0)
                last = past[-50:] if history == "window" else past
                want = np.percentile(last, percentile) if len(past) >= 7 else math.inf
                want = min(max(want, 0.6), 30.0)
                rel = ACCURACY if history == "all" else 1e-12
                assert limit == pytest.approx(want, rel=rel)

    def test_a_spike_does_not_vote_on_its_own_limit(self):
        norms = [1.0] * 20 + [1000.0]
        apart, _ = limits(AutoClip(percentile=99, warmup_steps=2), norms)
        voting, _ = limits(AutoClip(percentile=99, warmup_steps=2, inclusive=True), norms)
        assert apart[-1] == 1.0
        assert voting[-1] > 500

    def test_warmup_beyond_the_window(self):
        with pytest.raises(ConfigError, match="warmup_steps 100 above window 50, which never"):
            parse_mapping({"policies": [{"type": "autoclip", "window": 50}]})

    def test_no_history_for_each_unit(self):
        with pytest.raises(ConfigError, match=r"scope is 'unit'; allowed: 'global', 'group'"):
            parse_mapping({"policies": [{"type": "autoclip", "scope": "unit"}]})
