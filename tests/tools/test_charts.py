"""Clip rates and marks are what the steps say, however many there are; pictures are drawn."""

import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from gradclip.tools.charts import (
    Clipping,
    Counts,
    clip_rate,
    find_clip_marks,
    find_marks,
    plot_png,
)
from gradclip.tools.curves import CurveBuilder


def curve(values, every=1):
    builder = CurveBuilder()
    builder.add(np.arange(len(values)) * every, np.asarray(values, dtype=float))
    return builder.curve()


def clipping(clipped, counts, limit=None, skipped=None, name="zclip.yaml"):
    return Clipping(name, Counts(*counts), limit, clipped, skipped)


def test_clip_rates_are_shares_of_the_steps_in_their_bins():
    for steps, every in itertools.product([1, 59, 60, 61, 2000, 2001, 12345], [1, 50]):
        clipped = np.random.default_rng(steps).random(steps) < 0.3
        norm = curve(np.ones(steps), every)
        at = np.flatnonzero(clipped) * every
        ends, rate = clip_rate(norm, clipping(at, (steps, len(at), 0)))
        assert ends[-1] == (steps - 1) * every
        assert len(ends) <= 120
        stops = ends // every + 1
        starts = np.concatenate([[0], stops[:-1]])
        expected = [clipped[a:b].mean() for a, b in zip(starts, stops, strict=True)]
        np.testing.assert_allclose(rate, expected)


def test_an_even_choice_of_the_clipped_steps_gives_the_same_rate():
    steps, at = 12000, np.arange(0, 12000, 3)
    _, rate = clip_rate(curve(np.ones(steps)), clipping(at[::4], (steps, len(at), 0)))
    np.testing.assert_allclose(rate, 1 / 3, rtol=0.05)


def test_marks_stand_on_the_highest_norm_and_at_the_top_where_there_is_none():
    steps, norms = find_marks(curve([1.0, 7.0, np.nan, 2.0]), np.array([1, 2]))
    assert steps.tolist() == [1, 2]
    assert norms.tolist() == [7.0, 7.0]
    many, _ = find_marks(curve(np.arange(1.0, 10001)), np.arange(10000))
    assert len(many) <= 2000


def test_marks_of_several_that_would_hide_the_norm_are_left_out():
    norm, steps = curve(np.ones(1000)), np.arange(1000)
    many, few = clipping(steps, (1000, 1000, 0)), clipping(steps[:5], (1000, 5, 0))
    assert [len(x) for x, _ in find_clip_marks(norm, [many])] == [1000]
    assert [len(x) for x, _ in find_clip_marks(norm, [many, few])] == [0, 5]


@pytest.mark.parametrize(
    "norms",
    [
        np.geomspace(1e-9, 1e9, 300),
        np.linspace(1.0, 1.1, 5000),
        np.array([1.0]),
        np.array([0.0, 0.0]),
        np.array([np.nan, np.nan]),
    ],
    ids=["wide", "narrow", "one", "zeros", "nan"],
)
def test_a_picture_of_any_run_is_drawn(tmp_path, norms):
    norm, steps = curve(norms), np.arange(len(norms))
    limit, half = curve(np.where(steps < 1, np.inf, 0.9)), steps[::2]
    counts = len(steps), len(half), 1
    for names in (["zclip.yaml"], ["$a_{$.yaml", "b" * 60]):
        made = [clipping(half, counts, limit, half, name) for name in names]
        plot_png(tmp_path / "out.png", "$x_{$ of <b>norms</b>", norm, made)
        picture = imread(tmp_path / "out.png")
        assert picture.shape[:2] == (550, 1100)
        assert np.ptp(picture[..., :3]) > 0.5
