"""A policy and the slots it decides on, and how its slots follow from the measured ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradclip.policies.base import Policy

__all__ = ["Rule", "combine", "combine_runs"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy and the slots it decides on.

    The engine measures the coarsest slots that every policy can be built from; a rule says which
    of those make up each of its own. Where units are measured, a slot is a run of them, one after
    the other; a rule of scope "unit" then decides on the units themselves.

    Attributes:
        policy: What decides.
        names: One name per slot of this policy.
        covers: Indices of the measured slots whose gradients this policy may change.
        members: Int64 of shape (slots, most members of one): the measured slots of each, filled
            up with the number of measured slots; None if both are the same.
        owner: Int64 of shape (measured slots,): the policy's slot, or its slot count for a
            measured slot that this policy leaves alone.
        lengths: Int64 of shape (measured slots,), the units of each; None if none are measured.
        units: How many units there are in all; 0 if none are measured.
        places: Int64 of shape (slots,): the unit that each slot is, at scope "unit" alone.
        sizes: Float64 of shape (slots,), the elements of each; None unless the policy asks.
    """

    policy: Policy
    names: tuple[str, ...]
    covers: tuple[int, ...]
    members: Tensor | None
    owner: Tensor
    lengths: Tensor | None = None
    units: int = 0
    places: Tensor | None = None
    sizes: Tensor | None = None

    def gather(self, norms: Tensor, norm_type: float) -> Tensor:
        """Norms of this policy's slots from those of the measured slots or units."""
        if self.places is not None:
            return norms.index_select(0, self.places)
        if self.lengths is not None:
            norms = combine_runs(norms, norm_type, self.lengths)
        return norms if self.members is None else combine(norms, norm_type, self.members)

    def spread(self, coef: Tensor) -> Tensor:
        """Coefficients of the measured slots or units from those of this policy's slots."""
        if self.places is not None:
            return coef.new_ones(self.units).index_copy(0, self.places, coef)
        if self.members is not None:
            coef = torch.cat([coef, coef.new_ones(1)]).index_select(0, self.owner)
        if self.lengths is None:
            return coef
        return torch.repeat_interleave(coef, self.lengths, output_size=self.units)

    def by_slot(self, values: Tensor) -> Tensor:
        """What this policy's slots have, for each measured slot; 0 where left alone."""
        if self.members is None:
            return values
        return torch.cat([values, values.new_zeros(1)]).index_select(0, self.owner)

    def sized(self, sizes: Tensor) -> Tensor:
        """Elements of this policy's slots from those of the measured slots."""
        if self.places is not None:
            assert self.lengths is not None
            each = torch.repeat_interleave(sizes / self.lengths, self.lengths)
            return each.index_select(0, self.places)
        if self.members is None:
            return sizes
        return torch.cat([sizes, sizes.new_zeros(1)]).take(self.members).sum(-1)


def combine(norms: Tensor, norm_type: float, members: Tensor | None = None) -> Tensor:
    """The p-norm of unions of slots from the p-norms of the slots, without overflow.

    Args:
        norms: Shape (n,), float64.
        norm_type: p, or inf.
        members: Int64 of shape (m, k), the slots of each union, filled up with n; None for one of
            all. A table of m times n would grow with the square of a model's parameters.

    Returns:
        Shape (m,), or 0-d for one union. Sums run over a dim, in one order on every device, so
        that ranks agree bitwise.
    """
    parts = norms if members is None else torch.cat([norms, norms.new_zeros(1)]).take(members)
    if parts.shape[-1] == 1:
        return parts.squeeze(-1)
    peak = parts.amax(-1)
    if norm_type == math.inf:
        return peak
    scale = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
    return scale * (parts / scale.unsqueeze(-1)).pow(norm_type).sum(-1).pow(1.0 / norm_type)


def combine_runs(norms: Tensor, norm_type: float, lengths: Tensor) -> Tensor:
    """The p-norm of runs of units, one after the other, from the p-norms of the units.

    Args:
        norms: Shape (units,), float64.
        norm_type: p, or inf.
        lengths: Int64 of shape (runs,), at least 1 each; their sum is the number of units.

    Returns:
        Shape (runs,). Each run is added up in one order on every device, so that ranks agree
        bitwise.
    """
    peak = torch.segment_reduce(norms, "max", lengths=lengths, unsafe=True)
    if norm_type == math.inf:
        return peak
    scale = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
    each = torch.repeat_interleave(scale, lengths, output_size=norms.numel())
    powers = (norms / each).pow(norm_type)
    total = torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)
    return scale * total.pow(1.0 / norm_type)
