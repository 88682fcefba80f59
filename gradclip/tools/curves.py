"""Long series in bounded memory: curves to draw, and evenly spaced samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bools", "Curve", "CurveBuilder", "Floats", "Steps", "Thinned"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Steps = NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """A series of numbers over steps, summed up in buckets of consecutive steps.

    Attributes:
        step: Int64 of shape (buckets,), the last step of each bucket.
        low: Float64, the smallest number of each bucket; NaN where it has none.
        high: Float64, the largest; NaN where it has none.
        last: Float64, the last; NaN where it has none.
    """

    step: Steps
    low: Floats
    high: Floats
    last: Floats


class CurveBuilder:
    """Builds a curve from a series that comes in chunks.

    Args:
        buckets: The most buckets to keep, an even number. Where there would be more, pairs are
            merged, so that all buckets but the last hold equally many steps.
    """

    def __init__(self, buckets: int = 2000) -> None:
        self._buckets, self._width = buckets, 1
        self._rows = np.empty((4, 0))
        self._open = np.empty((4, 0))

    def add(self, step: Steps, values: Floats) -> None:
        """Add the next chunk; NaN and infinity count as no number.

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
        """The curve of all chunks so far."""
        rest = _merged(self._open, max(1, self._open.shape[1]))
        step, low, high, last = np.concatenate([self._rows, rest], axis=1)
        return Curve(step.astype(np.int64), low, high, last)


class Thinned:
    """Evenly spaced values of a series of unknown length: all of them, or each 2nd, 4th, ...

    Args:
        most: The most values to keep.
        dtype: Of the values.

    Attributes:
        values: The kept values, in order.
        stride: The distance between two of them in the series.
        seen: The length of the series so far.
    """

    def __init__(self, most: int, dtype: type[np.generic]) -> None:
        self._most = most
        self.values: NDArray[Any] = np.empty(0, dtype)
        self.stride = 1
        self.seen = 0

    def add(self, values: NDArray[Any]) -> None:
        """Add the next values of the series, shape (n,)."""
        first = -self.seen % self.stride
        self.seen += len(values)
        self.values = np.concatenate([self.values, values[first :: self.stride]])
        while len(self.values) > self._most:
            self.values = self.values[::2].copy()
            self.stride *= 2


def _merged(rows: Floats, width: int) -> Floats:
    """Rows of (step, low, high, last) with each `width` columns as one; the rest is dropped."""
    whole = rows.shape[1] // width * width
    step, low, high, last = rows[:, :whole].reshape(4, -1, width)
    place = width - 1 - np.argmax(np.isfinite(last)[:, ::-1], axis=1)
    number = np.take_along_axis(last, place[:, None], axis=1)[:, 0] if whole else last[:, 0]
    return np.stack(
        [step[:, -1], np.fmin.reduce(low, axis=1), np.fmax.reduce(high, axis=1), number]
    )
