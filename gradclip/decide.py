"""Decide: ask a list of policies, which read the gradients once and write them once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from gradclip.plan.plan import Rule
from gradclip.types import Decision, Edit, Elementwise, State, Stats, Verdict

__all__ = ["decide_all"]


def decide_all(
    rules: Sequence[Rule],
    norms: Mapping[float, Tensor],
    states: Sequence[State],
    *,
    step: Tensor,
    probed: Mapping[int, Tensor] = MappingProxyType({}),
    weights: Mapping[float, Tensor] | None = None,
    rate: Tensor | None = None,
    loss: Tensor | None = None,
    watched: Tensor | None = None,
    skip_nonfinite: bool,
    held: Tensor | None = None,
    share: float = 1.0,
) -> tuple[Verdict, list[State]]:
    """Ask the policies in order, each seeing the norms as those before it leave them.

    Scaling a slot by c scales its p-norm by c, for every p, so gradients are read once whatever
    the number of policies. A step that isn't finite, or is withheld, changes no state but the
    counters of such steps. Nor does one whose norm is exactly 0: zeros say nothing of how large
    gradients are, and would pull limits towards 0, where nothing is trained.

    Args:
        rules: The policies in order.
        norms: For each p the norms of the gradients, float64 of shape (measured slots,).
        states: One per rule.
        step: 0-d float64, the optimizer steps taken before this one.
        probed: By index of a rule, the norms that it decides on in place of those of the
            gradients, float64 of shape (measured slots,).
        weights: The norms of the parameters, for each p that a policy asks for.
        rate: 0-d float64, of an optimizer whose steps grow with the gradient.
        loss: 0-d float64, equal on every rank, if the caller gave one.
        watched: Int64 indices of the measured slots that may withhold a step; None for all.
        skip_nonfinite: Whether a step that isn't finite is withheld.
        held: 0-d bool, the step is withheld whatever policies say.
        share: The gradients' share of a full accumulation window, up to 1. Policies that remember
            see norms divided by it, and their limits are multiplied by it; they divide limits that
            the user gave by it, which so stay what they are.

    Returns:
        What all policies together decided, and the states after the step, one per rule.
    """
    every = torch.stack(list(norms.values()))
    finite = torch.isfinite(every if watched is None else every.index_select(1, watched)).all()
    coef = torch.ones_like(next(iter(norms.values())))
    limit = torch.full_like(finite, math.inf, dtype=torch.float64)
    skip = _either(finite.logical_not() if skip_nonfinite else None, held)
    stop: Tensor | None = None
    edits: list[Edit] = []
    has_size = (every != 0).any()  # else there is nothing to learn of how large gradients are
    learnt: list[State] = []
    for index, (rule, state) in enumerate(zip(rules, states, strict=True)):
        norm_type = rule.policy.measured[1] or next(iter(norms))
        measured = probed[index] if index in probed else norms[norm_type]
        weighs = rule.policy.uses_weights or rule.policy.uses_rate
        weight_norms = weights.get(norm_type) if weights and weighs else None
        # A policy on elements remembers elements, which no division of norms would reach.
        seen_share = 1.0 if not state or rule.elementwise is not None else share
        stats = Stats(
            norms=_gathered(rule, measured * coef, norm_type) / seen_share,
            finite=finite,
            step=step,
            sizes=rule.sizes,
            weights=None if weight_norms is None else rule.gather(weight_norms, norm_type),
            rate=rate if rule.policy.uses_rate else None,
            loss=loss,
            share=seen_share,
        )
        decision, new = rule.policy.decide(stats, state)
        learns = has_size
        if watched is not None:
            # NaN in a slot that isn't watched doesn't withhold the step, and may not reach a state.
            learns = has_size & torch.isfinite(stats.norms).all()
            new = _select(learns, new, state)
        if rule.policy.after:
            starts = step >= rule.policy.after
            learns = learns & starts
            decision, new = _from_start(starts, decision, new, state)
        if rule.elementwise is not None:
            new = _select(learns, new, state)
            edits.append(_edit(rule.elementwise, rule, decision, has_size, learns))
        learnt.append(new)
        coef = coef * (decision.coef if rule.same_slots else rule.spread(decision.coef))
        limit = torch.minimum(limit, decision.limit.min() * seen_share)
        skip = _either(skip, decision.skip)
        stop = _either(stop, decision.stop)
    keeps = finite if skip is None else finite & skip.logical_not()
    kept = [
        _select(keeps, new, old, rule.policy.counters)
        for rule, new, old in zip(rules, learnt, states, strict=True)
    ]
    edits = [replace(edit, learns=edit.learns & keeps) for edit in edits]
    return Verdict(coef, limit, finite, skip, stop, tuple(edits)), kept


def _gathered(rule: Rule, norms: Tensor, norm_type: float) -> Tensor:
    return norms if rule.same_slots else rule.gather(norms, norm_type)


def _edit(
    policy: Elementwise, rule: Rule, decision: Decision, has_size: Tensor, learns: Tensor
) -> Edit:
    """A decision on elements, spread from the policy's slots to the plan's."""
    assert decision.changes is not None
    values = tuple(rule.by_slot(value) for value in decision.elements)
    return Edit(
        policy, rule.key, rule.covers, values, rule.by_slot(decision.changes & has_size), learns
    )


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Whether one of two holds; None stands for a rule that can't hold at all."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def _from_start(
    starts: Tensor, decision: Decision, new: State, old: State
) -> tuple[Decision, State]:
    """A policy's answer from its first step on; until then that of a policy that does nothing."""
    late = replace(
        decision,
        coef=torch.where(starts, decision.coef, 1.0),
        limit=torch.where(starts, decision.limit, math.inf),
        skip=None if decision.skip is None else decision.skip & starts,
        stop=None if decision.stop is None else decision.stop & starts,
        changes=None if decision.changes is None else decision.changes & starts,
    )
    return late, _select(starts, new, old)


def _select(keeps: Tensor, new: State, old: State, counters: Iterable[str] = ()) -> State:
    """The new state where it is to be kept, else the old one; counters always move."""
    if new is old:
        return old
    return {
        name: new[name] if name in counters else torch.where(keeps, new[name], value)
        for name, value in old.items()
    }
