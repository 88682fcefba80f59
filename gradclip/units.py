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
from gradclip.types import Grads, Piece, Place, Units

__all__ = ["Kept", "UnitCut"]

Kept = tuple[int, int]
"""The dims of a parameter that tell its units apart, from the first up to but without the second;
(0, 0) for a parameter that is one unit."""


class _Part(NamedTuple):
    """Which elements of a flat local part belong to a piece; None for a part that has its shape."""

    span: slice | None
    piece: Piece


@dataclass(frozen=True)
class UnitCut:
    """How parameters are cut into units, numbered in the order of the slots.

    Attributes:
        parts: For each slot, one parameter, what this rank's part of it is cut into.
        counts: Units of each slot.
        lengths: The same as int64 on the device of decisions.
    """

    parts: Sequence[Sequence[_Part]]
    counts: Sequence[int]
    lengths: Tensor

    @classmethod
    def of(
        cls,
        kept: Mapping[str, Kept],
        shapes: Mapping[str, tuple[int, ...]],
        places: Mapping[str, Place],
        device: torch.device,
    ) -> UnitCut:
        """The cut of parameters.

        Args:
            kept: For each parameter, by name in the order of the slots, what tells units apart.
            shapes: Of the whole parameters.
            places: Where this rank's part of a parameter lies, for those it has.
            device: Where decisions are made.

        Raises:
            LayoutError: If a rank holds a part that isn't made of rows or parts of them.
        """
        counts = [math.prod(shapes[name][slice(*dims)]) for name, dims in kept.items()]
        starts = [0, *accumulate(counts)]
        parts = [
            list(_parts(name, places[name], dims, start)) if name in places else []
            for (name, dims), start in zip(kept.items(), starts, strict=False)
        ]
        return cls(parts, counts, torch.tensor(counts, device=device))

    def indices(self, slots: Sequence[int]) -> Tensor:
        """The units of some slots, int64, in order."""
        starts = [0, *accumulate(self.counts)]
        runs = [torch.arange(starts[slot], starts[slot + 1]) for slot in slots]
        return torch.cat(runs or [torch.arange(0)]).to(self.lengths.device)

    def units(self, grads: Grads) -> Units:
        """Local gradients cut into units, without a copy.

        Args:
            grads: One list per slot, of one tensor or none.
        """
        tensors: list[Tensor] = []
        pieces: list[Piece] = []
        for slot, parts in zip(grads, self.parts, strict=True):
            for span, piece in parts if slot else ():
                tensors.append(slot[0] if span is None else _taken(slot[0], span, piece))
                pieces.append(piece)
        return Units(tensors, pieces, sum(self.counts), self.lengths.device)


def _parts(name: str, place: Place, kept: Kept, start: int) -> Iterator[_Part]:
    """Cut one local part into units, in order."""
    first, last = kept
    if place.interval is None:
        inner = math.prod(place.shape[first + 1 : last])
        if place.start[first + 1 : last] != (0,) * len(place.start[first + 1 : last]) or (
            place.size[first + 1 : last] != place.shape[first + 1 : last]
        ):
            raise LayoutError(_across(name, kept))
        count = math.prod(place.size[first:last])
        before = place.start[first] * inner if last > first else 0
        if held := math.prod(place.size):
            yield _Part(None, Piece(kept, start + before, count, held // count))
        return
    if first:
        raise LayoutError(_across(name, kept))
    row = math.prod(place.shape[last:])
    at, stop = place.interval
    begin = at
    while at < stop:
        unit, inside = divmod(at, row)
        whole = (stop - at) // row if not inside else 0
        end = at + whole * row if whole else min(stop, (unit + 1) * row)
        length = row if whole else end - at
        piece = Piece((0, 1) if whole else (0, 0), start + unit, whole or 1, length)
        yield _Part(slice(at - begin, end - begin), piece)
        at = end


def _taken(grad: Tensor, span: slice, piece: Piece) -> Tensor:
    cut = grad.reshape(-1)[span]
    return cut.view(-1, piece.row) if piece.kept == (0, 1) else cut


def _across(name: str, kept: Kept) -> str:
    return (
        f"Scope is 'unit', units of {name!r} are told apart by dims {list(range(*kept))}, and "
        "ranks hold flat or split parts of it from which no sum makes whole units; supported: "
        "units along dim 0, or a parameter that isn't split along dims after the first of these. "
        "Use dim 0 (unit_dim), or scope 'parameter'."
    )
