"""Shares of a norm, and who wasn't finite."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradclip.records.culprits import not_finite, shares

NORMS = st.dictionaries(st.text(), st.floats(0, 1e300), min_size=1)


@given(norms=NORMS, p=st.sampled_from([1.0, 2.0, 3.5]))
def test_shares_add_up_and_are_sorted(norms, p):
    found = shares(norms, p)
    parts = [share for _, share in found]
    assert sorted(name for name, _ in found) == sorted(norms)
    assert parts == sorted(parts, reverse=True)
    assert sum(parts) == pytest.approx(1.0 if any(norms.values()) else 0.0)


@pytest.mark.parametrize(
    ("p", "expected"), [(1.0, (4 / 7, 3 / 7)), (2.0, (0.64, 0.36)), (math.inf, (1.0, 0.75))]
)
def test_shares_follow_the_norm(p, expected):
    (first, large), (second, small) = shares({"a": 3.0, "b": 4.0}, p)
    assert (first, second) == ("b", "a")
    assert (large, small) == pytest.approx(expected)


def test_shares_stay_right_where_powers_overflow():
    assert shares({"a": 3e200, "b": 4e200}) == [
        ("b", pytest.approx(0.64)),
        ("a", pytest.approx(0.36)),
    ]


def test_shares_leave_out_what_is_not_finite():
    assert shares({"a": math.nan, "b": 2.0, "c": math.inf}) == [("b", 1.0)]
    assert shares({}) == []


def test_the_one_nearest_the_loss_stands_first():
    norms = {"embed": math.nan, "body": math.inf, "fine": 1.0, "head": math.nan}
    assert not_finite(norms) == ["head", "body", "embed"]
