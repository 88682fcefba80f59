"""Reading saved state: what isn't as it was saved is an error that names the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.errors import ConfigError

__all__ = ["Range", "read_list", "read_mapping", "read_numbers", "read_whole", "refuse_saved"]

LARGEST_COUNT = 2**53
"""Up to here every whole number is a float64."""


class Range(NamedTuple):
    """Which numbers something that is saved may hold, both ends included; never NaN.

    Attributes:
        low: The smallest.
        high: The largest.
        whole: Whole numbers only.
    """

    low: float
    high: float
    whole: bool = False

    def holds(self, values: Tensor) -> Tensor:
        """Which values are in it, bool of their shape."""
        # A dtype that ends before the range does would take its infinity for the end.
        limits = torch.finfo(values.dtype)
        inside = values >= max(self.low, limits.min)
        inside = inside & (values <= min(self.high, limits.max))
        return inside & (values == values.round()) if self.whole else inside

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} from {self.low:g} to {self.high:g}"


def refuse_saved(where: str, found: str, allowed: str) -> NoReturn:
    """Refuse a saved state for one of its entries.

    Args:
        where: The entry, as one would write it: `policies[0].state.mean`.
        found: A verb and what is there.
        allowed: What may be.

    Raises:
        ConfigError: Always.
    """
    msg = (
        f"Saved clip state: {where} {found}; allowed: {allowed}. Start with fresh state, or load "
        "one as state_dict() gave it."
    )
    raise ConfigError(msg)


def read_mapping(
    value: object, where: str, needed: Collection[str], optional: Collection[str] = ()
) -> Mapping[str, Any]:
    """A mapping that has the needed keys, and no others but the optional ones.

    Raises:
        ConfigError: If it isn't one.
    """
    keys = ", ".join(needed) or "none"
    if not isinstance(value, Mapping):
        refuse_saved(where, f"is a {type(value).__name__}", f"a mapping with the keys {keys}")
    missing = [key for key in needed if key not in value]
    if missing:
        refuse_saved(where, f"has no {missing[0]!r}", f"a mapping with the keys {keys}")
    extra = [key for key in value if key not in (*needed, *optional)]
    if extra:
        refuse_saved(where, f"has a key {extra[0]!r}", f"a mapping with the keys {keys}")
    return value


def read_list(value: object, where: str, kind: type) -> Sequence[Any]:
    """A list whose entries are all of one type.

    Raises:
        ConfigError: If it isn't one.
    """
    if not isinstance(value, list | tuple):
        refuse_saved(where, f"is a {type(value).__name__}", "a list")
    for index, entry in enumerate(value):
        if not isinstance(entry, kind) or isinstance(entry, bool):  # a bool is an int
            found = f"has a {type(entry).__name__} at index {index}"
            refuse_saved(where, found, f"entries of type {kind.__name__}")
    return value


def read_whole(value: object, where: str) -> int:
    """A whole number from 0 to 2^53.

    Raises:
        ConfigError: If it isn't one.
    """
    allowed = Range(0, LARGEST_COUNT, whole=True)
    if isinstance(value, bool) or not isinstance(value, int):
        refuse_saved(where, f"is a {type(value).__name__}", str(allowed))
    if not 0 <= value <= LARGEST_COUNT:
        refuse_saved(where, f"is {value}", str(allowed))
    return value


def read_numbers(
    value: object,
    where: str,
    shape: Sequence[int],
    allowed: Range,
    names: Sequence[str] = (),
) -> Tensor:
    """A dense tensor of real numbers, on the device that it is on.

    Args:
        value: What is saved.
        where: The entry, for errors.
        shape: That it has to have.
        allowed: Which numbers.
        names: Of its last dim, for errors.

    Raises:
        ConfigError: If it isn't one.
    """
    if not isinstance(value, Tensor):
        refuse_saved(where, f"is a {type(value).__name__}", "a tensor")
    if type(value) not in (Tensor, Parameter) or value.layout != torch.strided or value.is_nested:
        found = f"is a {type(value).__name__} of layout {value.layout}"
        refuse_saved(where, found, "a plain dense tensor")
    if value.is_meta or value.dtype not in (torch.float64, torch.float32):
        found = "is on the meta device" if value.is_meta else f"holds {value.dtype}"
        refuse_saved(where, found, "values in float64 or float32")
    if tuple(value.shape) != tuple(shape):
        found = f"has shape {tuple(value.shape)}"
        refuse_saved(where, found, f"{tuple(shape)}, as here")
    value = value.detach()
    is_bad = allowed.holds(value).logical_not()
    if bool(is_bad.any()):
        *_, last = first = is_bad.nonzero()[0].tolist() or [0]
        whose = f" for {names[last]!r}" if names else ""
        number = float(value[tuple(first)] if value.dim() else value)
        refuse_saved(where, f"is {number:g}{whose}", str(allowed))
    return value
