"""The plan of a step: which slots are measured, and which of them each policy decides on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.norms import combine, combine_runs
from gradclip.plan.units import UnitMap
from gradclip.types import Decides, Elementwise, Region

__all__ = ["Plan", "Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy and the slots it decides on.

    The engine measures the coarsest slots that every policy can be built from; a rule says which
    of those make up each of its own. Where units are measured, a slot is a run of them, one after
    the other; a rule of scope "unit" then decides on the units themselves.

    Attributes:
        key: Which policy of the configuration this is: the index of its list, 0 for the main one
            and 1 + i for that of group i, and its index in that list.
        policy: What decides.
        names: One name per slot of this policy.
        covers: Indices of the measured slots whose gradients this policy may change.
        members: Int64 of shape (slots, most members of one): the measured slots of each, filled
            up with the number of measured slots; None if both are the same.
        owner: Int64 of shape (measured slots,): the policy's slot, or its slot count for a
            measured slot that this policy leaves alone.
        lengths: Int64 of shape (measured slots,), the units of each; None if none are measured.
        units: How many units there are in all; 0 if none are measured.
        unit_indices: Int64 of shape (slots,): the unit that each slot is, at scope "unit" alone.
        sizes: Float64 of shape (slots,), the elements of each; None unless the policy asks.
        elementwise: The policy again, where it works on single elements; else None.
        same_slots: The policy's slots are the measured slots themselves, all of them.
    """

    key: tuple[int, int]
    policy: Decides
    names: tuple[str, ...]
    covers: tuple[int, ...]
    members: Tensor | None
    owner: Tensor
    lengths: Tensor | None = None
    units: int = 0
    unit_indices: Tensor | None = None
    sizes: Tensor | None = None
    elementwise: Elementwise | None = None
    same_slots: bool = False

    def gather(self, norms: Tensor, norm_type: float) -> Tensor:
        """Norms of this policy's slots from those of the measured slots or units."""
        if self.unit_indices is not None:
            return norms.index_select(0, self.unit_indices)
        if self.lengths is not None:
            norms = combine_runs(norms, norm_type, self.lengths)
        return norms if self.members is None else combine(norms, norm_type, self.members)

    def spread(self, coef: Tensor) -> Tensor:
        """Coefficients of the measured slots or units from those of this policy's slots."""
        if self.unit_indices is not None:
            return coef.new_ones(self.units).index_copy(0, self.unit_indices, coef)
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
        if self.unit_indices is not None:
            assert self.lengths is not None
            each = torch.repeat_interleave(sizes / self.lengths, self.lengths)
            return each.index_select(0, self.unit_indices)
        if self.members is None:
            return sizes
        return torch.cat([sizes, sizes.new_zeros(1)]).take(self.members).sum(-1)


@dataclass(frozen=True)
class Plan:
    """Everything about a step that depends on the parameters and the configuration alone.

    Attributes:
        parameters: Those this rank holds, by name, in a fixed order.
        slots: The parameters of each measured slot: the coarsest division that every policy's own
            slots can be put together from.
        slot_names: One name per measured slot.
        rules: The policies in order, each with its slots.
        recorded: The p of the norm that records show.
        norm_types: The p of every norm to measure, and whether it is wide
            (`gradclip.norms.is_wide`).
        watched: Int64 indices of the measured slots (or units) that may withhold a step; None for
            all.
        weight_types: The p of every norm of the parameters themselves to measure, as `norm_types`.
        probe_types: The p of what each element policy measures in place of gradients, by rule.
        unit_map: How each slot, then one parameter, is divided into units; None if none are
            measured.
        regions: Where this rank's part of each parameter lies, by name; empty where nobody asks.
        shapes: Of all whole parameters, by name.
        group_names: The optimizer's parameter groups, where slots distinguish them.
        group_members: The measured slots of each, as `Rule.members`.
        each: The held parameter of each name, if any, where slots are coarser than parameters;
            None where they aren't.
    """

    parameters: Mapping[str, Parameter]
    slots: Sequence[Sequence[Parameter]]
    slot_names: Sequence[str]
    rules: Sequence[Rule]
    recorded: float
    norm_types: Mapping[float, bool]
    watched: Tensor | None
    weight_types: Mapping[float, bool]
    probe_types: Mapping[int, Mapping[float, bool]]
    unit_map: UnitMap | None
    regions: Mapping[str, Region]
    shapes: Mapping[str, tuple[int, ...]]
    group_names: Sequence[str]
    group_members: Tensor
    each: Mapping[str, Sequence[Parameter]] | None

    @property
    def split_by(self) -> str | None:
        """The type of a policy that one coefficient for all gradients can't stand for, if any."""
        for rule in self.rules:
            whole = len(rule.names) == 1 and len(rule.covers) == len(self.slots)
            if self.unit_map is not None or not whole or rule.elementwise is not None:
                return rule.policy.type
        return None

    def with_sizes(self, sizes: Tensor) -> Plan:
        """The same, with the elements of each slot, float64 of shape (slots,), for who asks."""
        rules = [
            replace(rule, sizes=rule.sized(sizes))
            if rule.policy.uses_sizes or rule.policy.uses_rate
            else rule
            for rule in self.rules
        ]
        return replace(self, rules=rules)

    def by_slot(self, norms: Tensor) -> Tensor:
        """Recorded norms of the slots from those of what is measured."""
        return (
            norms
            if self.unit_map is None
            else combine_runs(norms, self.recorded, self.unit_map.lengths)
        )
