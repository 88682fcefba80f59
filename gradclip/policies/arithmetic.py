"""Operations that formulas are made of, on tensors and on numbers of the host.

A policy's formulas stand once. On a device they run on tensors. Where the host decides, one number
for all gradients, they run on float64 numbers of NumPy and give the same bits: an operation on a
tensor of one element takes twenty times as long as on a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradclip.types import State

try:  # as torch has it: nothing else of a training run needs NumPy
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]

__all__ = [
    "Arithmetic",
    "arithmetic",
    "has_numbers",
    "number",
    "numbers_of",
    "quiet",
    "tensor_of",
    "tensors_of",
]


class Arithmetic:
    """What formulas use beside `+ - * / < > <= >= & |` and `abs`; here on tensors.

    Values are of shape (slots,), rows of shape (window, slots). Numbers stand for values of one
    slot, and one-dimensional arrays for its rows.
    """

    where: Callable[..., Tensor] = staticmethod(torch.where)  # type: ignore[assignment]
    maximum: Callable[..., Tensor] = staticmethod(torch.maximum)
    minimum: Callable[..., Tensor] = staticmethod(torch.minimum)
    sqrt: Callable[..., Tensor] = staticmethod(torch.sqrt)
    cos: Callable[..., Tensor] = staticmethod(torch.cos)
    floor: Callable[..., Tensor] = staticmethod(torch.floor)
    ceil: Callable[..., Tensor] = staticmethod(torch.ceil)
    isfinite: Callable[..., Tensor] = staticmethod(torch.isfinite)
    logical_not: Callable[..., Tensor] = staticmethod(torch.logical_not)
    full_like: Callable[..., Tensor] = staticmethod(torch.full_like)
    clip: Callable[..., Tensor] = staticmethod(torch.clamp)
    double: Callable[..., Tensor] = staticmethod(torch.Tensor.double)

    @staticmethod
    def own(values: Tensor | None) -> Tensor | None:
        """Values that are tensors, as these operations take them."""
        return values

    @staticmethod
    def may(condition: Tensor) -> bool:
        """False where the host knows that a condition holds nowhere."""
        del condition
        return True

    @staticmethod
    def any(flags: Tensor) -> Tensor:
        """Whether one of them holds, 0-d."""
        return flags.any() if flags.numel() > 1 else flags.reshape(())

    @staticmethod
    def all(flags: Tensor) -> Tensor:
        """Whether all of them hold, 0-d."""
        return flags.all() if flags.numel() > 1 else flags.reshape(())

    @staticmethod
    def least(values: Tensor) -> Tensor:
        """The smallest of all, 0-d."""
        return values.min() if values.numel() > 1 else values.reshape(())

    @staticmethod
    def count(values: Tensor) -> int:
        """The number of slots."""
        return values.numel()

    @staticmethod
    def between(rows: Tensor, first: int, stop: int) -> Tensor:
        """Rows from the first up to but without the second."""
        return rows.narrow(0, first, stop - first)

    @staticmethod
    def appended(rows: Tensor, values: Tensor) -> Tensor:
        """Rows with values as one more."""
        return torch.cat([rows, values.unsqueeze(0)])

    @staticmethod
    def joined(rows: list[Tensor]) -> Tensor:
        """Rows one after the other."""
        return torch.cat(rows)

    @staticmethod
    def ages(rows: Tensor) -> Tensor:
        """How old each row is, int64 of shape (window, 1); the last one is 1."""
        ages = torch.arange(rows.shape[0], 0, -1, dtype=torch.int64, device=rows.device)
        return ages.unsqueeze(1)

    @staticmethod
    def sum(rows: Tensor) -> Tensor:
        """Of each slot."""
        return rows.sum(0)

    @staticmethod
    def mean(rows: Tensor) -> Tensor:
        """Of each slot."""
        return rows.mean(0)

    @staticmethod
    def var(rows: Tensor) -> Tensor:
        """Of each slot, of the whole population."""
        return rows.var(0, correction=0)

    @staticmethod
    def sorted(rows: Tensor) -> Tensor:
        """Each slot's rows from small to large."""
        return rows.sort(0).values

    @staticmethod
    def row(rows: Tensor, index: Tensor) -> Tensor:
        """The row that each slot asks for, by an index that is a whole float64."""
        return rows.gather(0, index.long().unsqueeze(0)).squeeze(0)


class _Numbers:
    """The same on numbers, and on one-dimensional arrays for rows."""

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if type(condition) is np.ndarray:
            return np.where(condition, a, b)
        chosen = a if condition else b
        return np.float64(chosen) if type(chosen) is float else chosen

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:  # NaN wins
        return a if a > b or a != a else b

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return a if a < b or a != a else b

    @staticmethod
    def clip(value: Any, low: float | None = None, high: float | None = None) -> Any:
        value = value if low is None else _Numbers.maximum(value, np.float64(low))
        return value if high is None else _Numbers.minimum(value, np.float64(high))

    @staticmethod
    def logical_not(flag: Any) -> Any:
        return np.logical_not(flag) if type(flag) is np.ndarray else not flag

    @staticmethod
    def full_like(like: Any, value: Any) -> Any:
        del like
        return np.float64(value)

    @staticmethod
    def own(values: Any) -> Any:
        return None if values is None else number(values)

    @staticmethod
    def may(condition: Any) -> bool:
        return bool(condition)

    @staticmethod
    def any(flags: Any) -> Any:
        return flags

    all = least = any

    @staticmethod
    def count(values: Any) -> int:
        del values
        return 1

    @staticmethod
    def double(value: Any) -> Any:
        return np.float64(value)

    @staticmethod
    def isfinite(value: Any) -> Any:
        return math.isfinite(value)

    @staticmethod
    def between(rows: Any, first: int, stop: int) -> Any:
        return rows[first:stop]

    @staticmethod
    def appended(rows: Any, values: Any) -> Any:
        longer = np.empty(len(rows) + 1)
        longer[:-1], longer[-1] = rows, values
        return longer

    @staticmethod
    def ages(rows: Any) -> Any:
        return np.arange(len(rows), 0, -1)

    # NumPy adds up in another order, and torch's root and cosine round otherwise.
    @staticmethod
    def sum(rows: Any) -> Any:
        return number(_column(rows).sum(0))

    @staticmethod
    def mean(rows: Any) -> Any:
        return number(_column(rows).mean(0))

    @staticmethod
    def var(rows: Any) -> Any:
        return number(_column(rows).var(0, correction=0))

    @staticmethod
    def sqrt(value: Any) -> Any:
        return number(tensor_of(value).sqrt_())

    @staticmethod
    def cos(value: Any) -> Any:
        return number(tensor_of(value).cos_())

    @staticmethod
    def row(rows: Any, index: Any) -> Any:
        return rows[int(index)]

    if np is not None:
        floor, ceil = np.floor, np.ceil
        sorted, joined = staticmethod(np.sort), staticmethod(np.concatenate)


_tensors: Any = Arithmetic()
_numbers: Any = _Numbers()


def arithmetic(values: Tensor) -> Arithmetic:
    """The operations for these values."""
    found: Arithmetic = _tensors if isinstance(values, Tensor) else _numbers
    return found


def has_numbers() -> bool:
    """Whether there is NumPy, whose numbers divide by 0 and overflow as tensors do."""
    return np is not None


def quiet() -> AbstractContextManager[Any]:
    """In it numbers may become inf or NaN, as tensors do, without a warning."""
    return nullcontext() if np is None else np.errstate(all="ignore")


def number(value: Tensor | float) -> Any:
    """A value of one element as a number of the host; reads it there."""
    return np.float64(value.item() if isinstance(value, Tensor) else value)


def tensor_of(value: float) -> Tensor:
    """A number of the host as a tensor, 0-d: half the time of torch's own constructors."""
    return torch.from_numpy(np.array(value, dtype=np.float64))


def numbers_of(state: State) -> State:
    """The state of one slot in numbers; one that is in numbers as it is."""
    return {name: _numbered(value) for name, value in state.items()}


def tensors_of(state: State, device: torch.device) -> State:
    """The same state as tensors, which a policy's `init` gives."""
    return {
        name: value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64, device=device).unsqueeze(-1)
        for name, value in state.items()
    }


def _column(rows: Any) -> Tensor:
    return torch.from_numpy(rows).unsqueeze(-1)


def _numbered(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return np.float64(value.item()) if value.dim() == 1 else value.squeeze(-1).numpy(force=True)
