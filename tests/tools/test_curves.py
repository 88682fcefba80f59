"""Curves and samples hold what a series is like, in bounded memory, however it comes in."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.tools.curves import CurveBuilder, Thinned

NUMBERS = st.one_of(st.floats(0, 100), st.just(np.nan), st.just(np.inf))


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBERS, min_size=1, max_size=300), st.integers(1, 50), st.sampled_from([2, 8, 20]))
def test_each_bucket_says_what_its_steps_hold(numbers, piece, buckets):
    values, step = np.array(numbers), 3 * np.arange(len(numbers))
    builder = CurveBuilder(buckets)
    for start in range(0, len(values), piece):
        builder.add(step[start : start + piece], values[start : start + piece])
    curve = builder.curve()
    assert len(curve.step) <= buckets + 1
    assert curve.step[-1] == step[-1]
    begin = -1
    for index, end in enumerate(curve.step):
        inside = values[(step > begin) & (step <= end)]
        inside = inside[np.isfinite(inside)]
        begin = end
        if not len(inside):
            assert np.isnan([curve.low[index], curve.high[index], curve.last[index]]).all()
            continue
        assert curve.low[index] == inside.min()
        assert curve.high[index] == inside.max()
        assert curve.last[index] == inside[-1]


def test_buckets_are_of_one_width_but_for_the_last():
    builder = CurveBuilder(100)
    for start in range(0, 12345, 1000):
        step = np.arange(start, min(12345, start + 1000))
        builder.add(step, step.astype(float))
    widths = np.diff(builder.curve().step, prepend=-1)
    assert set(widths[:-1]) == {128}
    assert len(widths) == 97


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=30), st.sampled_from([1, 4, 16]))
def test_samples_are_evenly_spaced(pieces, most):
    sample, seen = Thinned(most, np.int64), 0
    for size in pieces:
        sample.add(np.arange(seen, seen + size))
        seen += size
    assert sample.seen == seen
    np.testing.assert_array_equal(sample.values, np.arange(0, seen, sample.stride))
    assert seen // 2 < most * sample.stride or len(sample.values) == seen
    assert len(sample.values) <= most
