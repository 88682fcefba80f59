"""Clip rates and marks are what the steps say, however many there are; pictures are drawn."""

import numpy as np
import pytest
from matplotlib.image import imread

from gradclip.tools.charts import Counts, clip_rate, find_clip_marks, find_marks, plot_png
from gradclip.tools.curves import CurveBuilder


def curve(values, every=1):
    builder = CurveBuilder("gradient norm")
    builder.add(np.arange(len(values)) * every, np.asarray(values, dtype=float))
    return builder.curve()


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize("steps", [1, 59, 60, 61, 2000, 2001, 12345])
def test_clip_rates_are_shares_of_the_steps_in_their_bins(steps, every):
    clipped = np.random.default_rng(steps).random(steps) < 0.3
    norm = curve(np.ones(steps), every)
    at = np.flatnonzero(clipped) * every
    ends, rate = clip_rate(norm, at, Counts(steps, len(at), 0))
    assert ends[-1] == (steps - 1) * every
    assert len(ends) <= 120
    stops = ends // every + 1
    starts = np.concatenate([[0], stops[:-1]])
    expected = [clipped[a:b].mean() for a, b in zip(starts, stops, strict=True)]
    np.testing.assert_allclose(rate, expected)


def test_an_even_choice_of_the_clipped_steps_gives_the_same_rate():
    steps, at = 12000, np.arange(0, 12000, 3)
    norm = curve(np.ones(steps))
    _, rate = clip_rate(norm, at[::4], Counts(steps, len(at), 0))
    np.testing.assert_allclose(rate, 1 / 3, rtol=0.05)


def test_marks_stand_on_the_highest_norm_and_at_the_top_where_there_is_none():
    steps, norms = find_marks(curve([1.0, 7.0, np.nan, 2.0]), np.array([1, 2]))
    assert steps.tolist() == [1, 2]
    assert norms.tolist() == [7.0, 7.0]
    many, _ = find_marks(curve(np.arange(1.0, 10001)), np.arange(10000))
    assert len(many) <= 2000


def test_marks_of_several_that_would_hide_the_norm_are_left_out():
    norm, all_steps = curve(np.ones(1000)), np.arange(1000)
    assert len(find_clip_marks(norm, {"one": all_steps})["one"][0]) == 1000
    found = find_clip_marks(norm, {"many": all_steps, "few": all_steps[:5]})
    assert [len(found[name][0]) for name in ("many", "few")] == [0, 5]


@pytest.mark.parametrize("names", [["zclip.yaml"], ["$a_{$.yaml", "b" * 60]])
@pytest.mark.parametrize(
    "norms",
    [
        np.geomspace(1e-9, 1e9, 300),
        np.linspace(1.0, 1.1, 5000),
        np.array([1.0]),
        np.array([0.0, 0.0]),
        np.array([np.nan, np.nan]),
    ],
)
def test_a_picture_of_any_run_is_drawn(tmp_path, names, norms):
    path = tmp_path / "out.png"
    norm, steps = curve(norms), np.arange(len(norms))
    limits = {name: curve(np.where(steps < 1, np.inf, 0.9)) for name in names}
    some = dict.fromkeys(names, steps[::2])
    counts = dict.fromkeys(names, Counts(len(steps), len(steps[::2]), 1))
    plot_png(path, "$x_{$ of <b>norms</b>", norm, limits, some, some, counts=counts)
    picture = imread(path)
    assert picture.shape[:2] == (550, 1100)
    assert np.ptp(picture[..., :3]) > 0.5
