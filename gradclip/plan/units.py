"""From parameters to units: which rows of which parameter are here, and how they are numbered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from gradclip.errors import LayoutError
from gradclip.types import Grads, Region, Units, UnitSpan

__all__ = ["UnitDims", "UnitMap"]

UnitDims = tuple[int, int]
"""The dims of a parameter that distinguish its units, from the first up to but without the second;
(0, 0) for a parameter that is one unit."""


class _Part(NamedTuple):
    """Which elements of a flat local part belong to a span; None for a part that has its shape."""

    inside: slice | None
    span: UnitSpan


@dataclass(frozen=True)
class UnitMap:
    """How parameters are divided into units, numbered in the order of the slots.

    Attributes:
        parts: For each slot, one parameter, what this rank's part of it is divided into.
        counts: Units of each slot.
        lengths: The same as int64 on the device of decisions.
    """

    parts: Sequence[Sequence[_Part]]
    counts: Sequence[int]
    lengths: Tensor

    @classmethod
    def of(
        cls,
        unit_dims: Mapping[str, UnitDims],
        shapes: Mapping[str, tuple[int, ...]],
        regions: Mapping[str, Region],
        device: torch.device,
    ) -> UnitMap:
        """The map of parameters.

        Args:
            unit_dims: For each parameter, by name in the order of the slots, what distinguishes
                its units.
            shapes: Of the whole parameters.
            regions: Where this rank's part of a parameter lies, for those it has.
            device: Where decisions are made.

        Raises:
            LayoutError: If a rank holds a part that isn't made of rows or parts of them.
        """
        counts = [math.prod(shapes[name][slice(*dims)]) for name, dims in unit_dims.items()]
        starts = [0, *accumulate(counts)]
        parts = [
            list(_parts(name, regions[name], dims, start)) if name in regions else []
            for (name, dims), start in zip(unit_dims.items(), starts, strict=False)
        ]
        return cls(parts, counts, torch.tensor(counts, dtype=torch.int64, device=device))

    def indices(self, slots: Sequence[int]) -> Tensor:
        """The units of some slots, int64, in order."""
        starts = [0, *accumulate(self.counts)]
        spans = [(0, 0), *((starts[slot], starts[slot + 1]) for slot in slots)]
        runs = [torch.arange(*span, dtype=torch.int64, device="cpu") for span in spans]
        return torch.cat(runs).to(self.lengths.device)

    def units(self, grads: Grads) -> Units:
        """Local gradients divided into units, without a copy.

        Args:
            grads: One list per slot, of one tensor or none.
        """
        tensors: list[Tensor] = []
        spans: list[UnitSpan] = []
        for slot, parts in zip(grads, self.parts, strict=True):
            for inside, span in parts if slot else ():
                tensors.append(slot[0] if inside is None else _taken(slot[0], inside, span))
                spans.append(span)
        return Units(tensors, spans, sum(self.counts), self.lengths.device)


def _parts(name: str, region: Region, unit_dims: UnitDims, start: int) -> Iterator[_Part]:
    """Divide one local part into units, in order."""
    first, last = unit_dims
    if region.interval is None:
        inner = math.prod(region.shape[first + 1 : last])
        if region.start[first + 1 : last] != (0,) * len(region.start[first + 1 : last]) or (
            region.size[first + 1 : last] != region.shape[first + 1 : last]
        ):
            raise LayoutError(_across(name, unit_dims))
        count = math.prod(region.size[first:last])
        before = region.start[first] * inner if last > first else 0
        if held := math.prod(region.size):
            yield _Part(None, UnitSpan(unit_dims, start + before, count, held // count))
        return
    if first:
        raise LayoutError(_across(name, unit_dims))
    row = math.prod(region.shape[last:])
    at, stop = region.interval
    begin = at
    while at < stop:
        unit, inside = divmod(at, row)
        whole = (stop - at) // row if not inside else 0
        end = at + whole * row if whole else min(stop, (unit + 1) * row)
        length = row if whole else end - at
        span = UnitSpan((0, 1) if whole else (0, 0), start + unit, whole or 1, length)
        yield _Part(slice(at - begin, end - begin), span)
        at = end


def _taken(grad: Tensor, inside: slice, span: UnitSpan) -> Tensor:
    part = grad.reshape(-1)[inside]
    return part.view(-1, span.row) if span.unit_dims == (0, 1) else part


def _across(name: str, unit_dims: UnitDims) -> str:
    return (
        f"Scope is 'unit', units of {name!r} are told apart by dims {list(range(*unit_dims))}, and "
        "ranks hold flat or split parts of it from which no sum makes whole units; supported: "
        "units along dim 0, or a parameter that isn't split along dims after the first of these. "
        "Use dim 0 (unit_dim), or scope 'parameter'."
    )
