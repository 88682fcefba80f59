"""Saving, restoring and carrying over what policies remember."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip.effect.elements import ElementMemory, Key
from gradclip.errors import ConfigError
from gradclip.plan.plan import Rule
from gradclip.policies.base import COUNT
from gradclip.records.recorder import Tally
from gradclip.saved import Range, read_list, read_mapping, read_numbers, read_whole, refuse_saved
from gradclip.types import Memory, State

__all__ = ["Unpacked", "carry_over", "fresh_states", "pack", "unpack"]

FORMAT = 2
ANYTHING = Range(-math.inf, math.inf)


def pack(
    rules: Sequence[Rule], states: Sequence[State], memory: ElementMemory | None, tally: Tally
) -> dict[str, Any]:
    """Plain tensors, numbers and strings; loads with `torch.load(weights_only=True)`.

    Every rank calls it, as memory of elements is put together from all of them.
    """
    elements = [{} if memory is None else memory.saved(rule) for rule in rules]
    policies = [
        {
            "type": rule.policy.type,
            "slots": list(rule.names),
            "state": {name: value.clone() for name, value in state.items()},
            **({"elements": dict(own)} if own else {}),
        }
        for rule, state, own in zip(rules, states, elements, strict=True)
    ]
    return {
        "format": FORMAT,
        "policies": policies,
        "counts": dict(zip(Tally.NAMES, tally.counts.unbind(), strict=True)),
        "step": tally.first + tally.made,
    }


class Unpacked(NamedTuple):
    """What a `state_dict` holds, checked.

    Attributes:
        states: Of the policies.
        counts: As in `Tally.NAMES`.
        elements: What is remembered of elements.
        step: Number of the next step.
    """

    states: list[State]
    counts: Tensor
    elements: dict[Key, Memory]
    step: int


def unpack(
    saved: object,
    rules: Sequence[Rule],
    states: Sequence[State],
    memory: ElementMemory | None,
    device: torch.device,
) -> Unpacked:
    """Read a `state_dict`, checked against this clipper. Nothing is changed yet.

    Raises:
        ConfigError: If it isn't one, holds what no steps lead to, or is of other policies, slots
            or shapes.
    """
    found = saved.get("format") if isinstance(saved, Mapping) else FORMAT
    if type(found) is not int or found != FORMAT:
        msg = (
            f"Saved clip state has format {found!r}; this version reads {FORMAT}. "
            "Start with fresh state, or load it with the version that saved it."
        )
        raise ConfigError(msg)
    saved = read_mapping(saved, "the whole", ("format", "policies", "counts"), ("step",))
    entries = [
        read_mapping(entry, f"policies[{i}]", ("type", "slots", "state"), ("elements",))
        for i, entry in enumerate(read_list(saved["policies"], "policies", Mapping))
    ]
    kinds = read_list([entry["type"] for entry in entries], "type of policies", str)
    ours = [rule.policy.type for rule in rules]
    if kinds != ours:
        msg = (
            f"Saved clip state is of policies {kinds}, this configuration has {ours}. Start with "
            "fresh state or use the same policies."
        )
        raise ConfigError(msg)
    loaded: list[State] = []
    elements: dict[Key, Memory] = {}
    for i, (entry, rule, state) in enumerate(zip(entries, rules, states, strict=True)):
        own = _unpack_one(entry, f"policies[{i}]", rule, state)
        remembered, where = entry.get("elements", {}), f"policies[{i}].elements"
        if memory is None or rule.elementwise is None or not rule.elementwise.memory:
            read_mapping(remembered, where, ())
        elif rule.elementwise.saves:
            elements |= memory.loaded(rule, remembered, where, device)
        else:
            own = rule.policy.init(len(rule.names), device)
        loaded.append({name: value.to(device, copy=True) for name, value in own.items()})
    counts = _unpack_counts(saved)
    step = read_whole(saved["step"], "step") if "step" in saved else int(counts[0])
    if "step" in saved and bool((counts > step).any()):
        refuse_saved("counts", f"are {counts.tolist()} where step is {step}", "at most step")
    return Unpacked(loaded, counts, elements, step)


def _unpack_one(entry: Mapping[str, Any], where: str, rule: Rule, state: State) -> State:
    """The state of one policy."""
    slots = list(read_list(entry["slots"], f"{where}.slots", str))
    if state and sorted(slots) != sorted(rule.names):
        msg = (
            f"Saved clip state has slots {slots}, this model has "
            f"{list(rule.names)}. Start with fresh state or use the same scope."
        )
        raise ConfigError(msg)
    places = [slots.index(name) for name in rule.names] if state else []
    order = torch.tensor(places, dtype=torch.int64, device="cpu")  # another run's may be another
    saved = read_mapping(entry["state"], f"{where}.state", tuple(state))
    found: State = {}
    for name, value in state.items():
        at = f"{where}.state.{name} of {rule.policy.type!r}"
        if isinstance(saved[name], Tensor) and saved[name].shape != value.shape:
            msg = (
                f"Saved clip state: {at} has shape {tuple(saved[name].shape)}, here it has "
                f"{tuple(value.shape)}: a length such as warmup_steps differs. Start with fresh "
                "state or use the same values."
            )
            raise ConfigError(msg)
        allowed = rule.policy.ranges.get(name, ANYTHING)
        numbers = read_numbers(saved[name], at, value.shape, allowed, slots).double()
        found[name] = numbers[..., order.to(numbers.device)]
    for what, is_so in rule.policy.contradictions(found).items():
        if bool(is_so.any()):
            at = f"{where}.state of {rule.policy.type!r}"
            slot = rule.names[int(is_so.nonzero()[0])]
            refuse_saved(at, f"contradicts itself for {slot!r}: {what}", "what steps lead to")
    return found


def _unpack_counts(saved: Mapping[str, Any]) -> Tensor:
    """The counts, as in `Tally.NAMES`."""
    found = read_mapping(saved["counts"], "counts", Tally.NAMES)
    counts = {
        name: read_numbers(found[name], f"counts.{name}", (), COUNT).to("cpu", torch.float64)
        for name in Tally.NAMES
    }
    for name in ("clipped", "taken"):
        if counts[name] > counts["steps"]:
            found_here = f"is {counts[name]:g} of {counts['steps']:g} steps"
            refuse_saved(f"counts.{name}", found_here, "at most as many")
    return torch.stack(list(counts.values()))


def fresh_states(rules: Sequence[Rule], device: torch.device) -> list[State]:
    """What policies remember before their first step."""
    return [rule.policy.init(len(rule.names), device) for rule in rules]


def carry_over(
    before: Sequence[Rule], states: Sequence[State], after: Sequence[Rule], fresh: Sequence[State]
) -> list[State]:
    """States for new slots: those of the same name keep their columns.

    Args:
        before: The rules that were followed.
        states: What their policies remember.
        after: The rules to follow. A rule whose policy is another one starts fresh.
        fresh: States for these, for the slots that are new.
    """
    old = {rule.key: (rule, state) for rule, state in zip(before, states, strict=True)}
    carried: list[State] = []
    for rule, new in zip(after, fresh, strict=True):
        earlier, state = old.get(rule.key, (rule, {}))
        known = {name: index for index, name in enumerate(earlier.names if state else ())}
        kept = [(i, known[name]) for i, name in enumerate(rule.names) if name in known]
        if kept and earlier.policy == rule.policy:
            here, there = torch.tensor(kept, dtype=torch.int64, device="cpu").unbind(1)
            columns = {key: state[key][..., there.to(state[key].device)] for key in new}
            new = {
                key: value.index_copy(-1, here.to(value.device), columns[key].to(value.device))
                for key, value in new.items()
            }
        carried.append(new)
    return carried
