"""Accumulation: the sum of clipped micro-batches, and what is said of those it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.layouts.local import local_part
from gradclip.private import is_view
from gradclip.records.record import Facts

__all__ = ["Accumulated", "add_up", "is_borrowed"]


@dataclass
class Accumulated:
    """The micro-batches since the last step; tensors are 0-d bool, equal on every rank.

    Attributes:
        facts: Of the worst: the largest norm and its limit, the smallest coefficient.
        slots: The largest norm of each slot, float64 of shape (slots,).
        each: The same of each parameter, where a flight record keeps the worst steps.
        kept: One at least joined the sum.
        sound: What joined it is finite.
        dropped: How many didn't join it, 0-d float64.
        count: How many there were.
        any_sum: A gradient was left in `.grad` of some parameter on this rank.
        names: What is said of those that were dropped, where the host knows.
    """

    facts: Facts
    slots: Tensor
    each: Tensor
    kept: Tensor
    sound: Tensor
    dropped: Tensor
    count: int = 1
    any_sum: bool = False
    names: list[str] = field(default_factory=list[str])

    def add(self, other: Accumulated) -> None:
        """Take in one more micro-batch."""
        a, b = self.facts, other.facts
        worse = (b.grad_norm > a.grad_norm) | b.grad_norm.isnan()
        self.facts = Facts(
            grad_norm=torch.where(worse, b.grad_norm, a.grad_norm),
            limit=torch.where(worse, b.limit, a.limit),
            coef=torch.minimum(a.coef, b.coef),
            changed=a.clipped | b.clipped,
            finite=a.finite & b.finite,
            has_gradient=a.has_gradient | b.has_gradient,
            loss=b.loss,
        )
        self.slots = torch.maximum(self.slots, other.slots)
        self.each = torch.maximum(self.each, other.each)
        self.kept = self.kept | other.kept
        self.sound = self.sound & other.sound
        self.dropped = self.dropped + other.dropped
        self.count += 1
        self.names += other.names


def add_up(
    parameters: Mapping[str, Parameter], sums: Mapping[Parameter, Tensor], *, left_out: bool
) -> bool:
    """Put the sum back into `.grad`, with what a backward left there; whether there is any."""
    olds: list[Tensor] = []
    news: list[Tensor] = []
    for p in parameters.values():
        old, new = sums.get(p), None if left_out else p.grad
        if old is None or new is None:
            p.grad = old if new is None else new
        elif old.is_sparse or new.is_sparse:
            p.grad = new + old if old.is_sparse else old + new
        else:
            olds.append(local_part(old))
            news.append(local_part(new))
            p.grad = old
    if olds:
        torch._foreach_add_(olds, news)
    return any(p.grad is not None for p in parameters.values())


def is_borrowed(grad: Tensor) -> bool:
    """Whether a gradient lies in a larger piece of memory, such as a bucket of DDP's.

    DDP writes the next backward's gradients to the same place (`gradient_as_bucket_view`).
    """
    part = local_part(grad)
    if part.is_sparse:
        return False
    return is_view(part) or part.untyped_storage().nbytes() > part.nbytes
