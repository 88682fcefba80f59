"""Decide: ask a list of policies, which read the gradients once and write them once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, reduce
from operator import and_
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gradclip.errors import ConfigError
from gradclip.plan.plan import Rule
from gradclip.policies.arithmetic import (
    arithmetic,
    has_numbers,
    number,
    numbers_of,
    quiet,
    tensor_of,
)
from gradclip.private import compile_error
from gradclip.types import Decision, Edit, Elementwise, Known, State, Stats, Verdict

__all__ = ["compiled", "decide_all", "decide_on_host", "take_numbers"]


def take_numbers(rules: Sequence[Rule]) -> bool:
    """Whether these can be decided in numbers of the host: all of one slot, by formulas for both.

    A class that has a `decide` of its own says so by itself: who overrides the method of another
    policy may use tensors.
    """

    def takes(policy: object) -> bool:
        known = [vars(cls) for cls in type(policy).__mro__]
        own = next(names for names in known if "decide" in names)
        return bool(own.get("takes_numbers", False))

    return (
        bool(rules)
        and has_numbers()
        and all(rule.same_slots and len(rule.names) == 1 and takes(rule.policy) for rule in rules)
    )


def decide_on_host(
    rules: Sequence[Rule],
    norms: Mapping[float, Tensor],
    states: Sequence[State],
    *,
    step: Tensor | float,
    weights: Mapping[float, Tensor] | None,
    rate: float | None,
    loss: Tensor | None,
    held: Tensor | None,
    skip_nonfinite: bool,
    share: float,
) -> tuple[Verdict, Known, list[State]]:
    """`decide_all` in numbers of the host, for rules that `take_numbers`; reads the norms there.

    Arguments are those of `decide_all`; states may be in numbers or in tensors.

    Returns:
        The verdict in tensors, the same in numbers, and the states in numbers.
    """
    first = next(iter(norms.values()))
    with quiet():
        told, states = decide_all(
            rules,
            {p: number(norm) for p, norm in norms.items()},
            [numbers_of(state) for state in states],
            step=number(step),
            weights={p: number(norm) for p, norm in weights.items()} if weights else None,
            rate=None if rate is None else number(rate),
            loss=None if loss is None else number(loss),
            held=None if held is None else bool(held),  # type: ignore[arg-type]
            skip_nonfinite=skip_nonfinite,
            share=share,
        )
    limit, coef = float(told.limit), float(told.coef)
    known = Known(first.item(), limit, coef, bool(told.finite), _known(told.skip))
    verdict = Verdict(
        coef=_ONE if coef == 1 else tensor_of(coef).reshape(1),
        limit=_limit(limit),
        finite=_FLAGS[known.finite],
        skip=None if known.skip is None else _FLAGS[known.skip],
        stop=None if told.stop is None else _FLAGS[bool(told.stop)],
        keeps=_FLAGS[bool(told.keeps)],
    )
    return verdict, known, states


_ONE = torch.ones(1, dtype=torch.float64, device="cpu")
_FLAGS = (
    torch.zeros((), dtype=torch.bool, device="cpu"),
    torch.ones((), dtype=torch.bool, device="cpu"),
)


@lru_cache(maxsize=16)
def _limit(limit: float) -> Tensor:
    """As a tensor, 0-d; most limits come again."""
    return tensor_of(limit)


def _known(flag: Tensor | None) -> bool | None:
    return None if flag is None else bool(flag)


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
        norms: For each p the norms of the gradients, float64 of shape (measured slots,). Where all
            rules `take_numbers`, these may be numbers of the host, and all else then are.
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
    every = list(norms.values())
    xp = arithmetic(every[0])
    finite = _finite(every, watched)
    coef: Tensor | None = None
    limit: Tensor | None = None
    withheld = held  # by policies, beside what isn't finite
    stop: Tensor | None = None
    edits: list[Edit] = []
    learnt: list[State] = []
    for index, (rule, state) in enumerate(zip(rules, states, strict=True)):
        norm_type = rule.policy.measured[1] or next(iter(norms))
        seen = probed[index] if index in probed else norms[norm_type]
        weighs = rule.policy.uses_weights or rule.policy.uses_rate
        weight_norms = weights.get(norm_type) if weights and weighs else None
        if weight_norms is not None and not rule.same_slots:
            weight_norms = rule.gather(weight_norms, norm_type)
        # A policy on elements remembers elements, which no division of norms would reach.
        seen_share = 1.0 if not state or rule.elementwise is not None else share
        seen = seen if coef is None else seen * coef
        seen = seen if rule.same_slots else rule.gather(seen, norm_type)
        stats = Stats(
            norms=seen if seen_share == 1 else seen / seen_share,
            finite=finite,
            step=step,
            sizes=xp.own(rule.sizes),
            weights=weight_norms,
            rate=rate if rule.policy.uses_rate else None,
            loss=loss,
            share=seen_share,
        )
        decision, new = rule.policy.decide(stats, state)
        learns = finite
        if watched is not None or rule.elementwise is not None:
            # Else there is nothing to learn of how large gradients are.
            learns = has_size = (torch.stack(every) != 0).any()
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
        factor = decision.coef if rule.same_slots else rule.spread(decision.coef)
        coef = factor if coef is None else coef * factor
        tightest = xp.least(decision.limit)
        tightest = tightest if seen_share == 1 else tightest * seen_share
        limit = tightest if limit is None else xp.minimum(limit, tightest)
        withheld = _either(withheld, decision.skip)
        stop = _either(stop, decision.stop)
    keeps = finite if withheld is None else finite & xp.logical_not(withheld)
    kept = [
        _select(keeps, new, old, rule.policy.counters)
        for rule, new, old in zip(rules, learnt, states, strict=True)
    ]
    edits = [replace(edit, learns=edit.learns & keeps) for edit in edits]
    skip = _either(xp.logical_not(finite) if skip_nonfinite else None, withheld)
    if coef is None or limit is None:  # no policy acts on any parameter
        coef, limit = xp.full_like(every[0], 1.0), xp.full_like(xp.least(every[0]), math.inf)
    return Verdict(coef, limit, finite, skip, stop, keeps, tuple(edits)), kept


@cache
def compiled() -> Callable[..., tuple[Verdict, list[State]]]:
    """`decide_all` as graphs that torch makes of it, one for each list of policies.

    Sums may be rounded in another order. A policy of a user's that reads values on the host
    (`if norm > 1:`) breaks its graph in two, and is right all the same.

    It raises ConfigError where torch can't compile.
    """
    graph = torch.compile(decide_all, dynamic=False)

    def decide(*args: Any, **kwargs: Any) -> tuple[Verdict, list[State]]:
        try:
            return graph(*args, **kwargs)
        except compile_error() as error:
            why = str(error).partition("\n")[0]
            msg = (
                f"compile is true, and torch can't compile what policies decide ({why}); "
                "allowed: where there is Triton or, on a CPU, a C++ compiler. Set compile: false."
            )
            raise ConfigError(msg) from error

    return decide


def _finite(norms: Sequence[Tensor], watched: Tensor | None) -> Tensor:
    """Whether all norms are finite, none of which is below 0; of the watched slots alone."""
    if watched is not None:
        return (torch.stack(list(norms)).index_select(1, watched) < math.inf).all()
    xp = arithmetic(norms[0])
    flags = [xp.all(norm < math.inf) for norm in norms]
    return reduce(and_, flags)


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
    xp = arithmetic(decision.coef)
    late = replace(
        decision,
        coef=xp.where(starts, decision.coef, 1.0),
        limit=xp.where(starts, decision.limit, math.inf),
        skip=None if decision.skip is None else decision.skip & starts,
        stop=None if decision.stop is None else decision.stop & starts,
        changes=None if decision.changes is None else decision.changes & starts,
    )
    return late, _select(starts, new, old)


def _select(keeps: Tensor, new: State, old: State, counters: Iterable[str] = ()) -> State:
    """The new state where it is to be kept, else the old one; counters always move."""
    if new is old:
        return old
    if not isinstance(keeps, Tensor):
        return {name: new[name] if keeps or name in counters else old[name] for name in old}
    return {
        name: new[name] if name in counters else torch.where(keeps, new[name], value)
        for name, value in old.items()
    }
