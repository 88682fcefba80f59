"""Long series in bounded memory: curves to draw, and evenly spaced samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "CurveBuilder", "Thinned"]

Floats = NDArray[np.float64]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Curve:
    """A series of numbers over steps, as so many buckets of steps in a row.

    Attributes:
        name: What it shows.
        step: Int64 of shape (buckets,), the last step of each.
        low: Float64, its smallest number; NaN where it has none.
        high: Float64, its largest; NaN where it has none.
        last: Float64, its last number; NaN where it has none.
    """

    name: str
    step: NDArray[np.int64]
    low: Floats
    high: Floats
    last: Floats


class CurveBuilder:
    """Takes in a series piece by piece, and keeps at most so many buckets.

    Args:
        name: What the series shows.
        buckets: How many to keep at most, an even number. Where there would be more, two become
            one, so that each holds equally many steps but for the last.
    """

    def __init__(self, name: str, buckets: int = 2000) -> None:
        self._name, self._buckets, self._width = name, buckets, 1
        self._rows = np.empty((4, 0))
        self._open = np.empty((4, 0))

    def add(self, step: NDArray[np.int64], values: Floats) -> None:
        """Take in more of it; what isn't finite counts as no number.

        Args:
            step: Shape (n,), rising.
            values: Shape (n,).
        """
        values = np.where(np.isfinite(values), values, np.nan)
        rows = np.stack([step.astype(np.float64), values, values, values])
        self._open = np.concatenate([self._open, rows], axis=1)
        while True:
            whole = self._open.shape[1] // self._width * self._width
            room = (self._buckets - self._rows.shape[1]) * self._width
            taken = min(whole, room)
            full = _merged(self._open[:, :taken], self._width)
            self._rows = np.concatenate([self._rows, full], axis=1)
            self._open = self._open[:, taken:]
            if taken == whole:
                return
            self._rows, self._width = _merged(self._rows, 2), 2 * self._width

    def curve(self) -> Curve:
        """What was taken in so far."""
        rest = _merged(self._open, max(1, self._open.shape[1]))
        step, low, high, last = np.concatenate([self._rows, rest], axis=1)
        return Curve(self._name, step.astype(np.int64), low, high, last)


class Thinned(Generic[Kind]):
    """Evenly spaced values of a series of unknown length: all of them, or each 2nd, 4th, ...

    Args:
        most: How many to keep at most.
        dtype: Of the values.
    """

    def __init__(self, most: int, dtype: type[Kind]) -> None:
        self._most = most
        self._kept: NDArray[Kind] = np.empty(0, dtype)
        self.stride = 1
        self.seen = 0

    def add(self, values: NDArray[Any]) -> None:
        """Take in more of the series, shape (n,)."""
        first = -self.seen % self.stride
        self.seen += len(values)
        self._kept = np.concatenate([self._kept, values[first :: self.stride]])
        while len(self._kept) > self._most:
            self._kept = self._kept[::2].copy()
            self.stride *= 2

    @property
    def values(self) -> NDArray[Kind]:
        """Those that were kept, in order."""
        return self._kept


def _merged(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Rows of (last step, low, high, last number), `width` columns as one; the rest is dropped."""
    whole = rows.shape[1] // width * width
    step, low, high, last = rows[:, :whole].reshape(4, -1, width)
    place = width - 1 - np.argmax(np.isfinite(last)[:, ::-1], axis=1)
    number = np.take_along_axis(last, place[:, None], axis=1)[:, 0] if whole else last[:, 0]
    return np.stack(
        [
            step[:, -1],
            np.fmin.reduce(low, axis=1),
            np.fmax.reduce(high, axis=1),
            number,
        ]
    )
