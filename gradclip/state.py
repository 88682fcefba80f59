"""Saving, restoring and carrying over what policies remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.effect.elements import ElementMemory, Key
from gradclip.errors import ConfigError
from gradclip.plan.plan import Rule
from gradclip.policies import ElementPolicy
from gradclip.records.recorder import Tally
from gradclip.types import Memory, State

__all__ = ["carry_over", "pack", "unpack"]

FORMAT = 2


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
        "counts": dict(zip(Tally.NAMES, tally.counts.clone().unbind(), strict=True)),
        "step": tally.first + tally.made,
    }


def unpack(
    saved: Mapping[str, Any],
    rules: Sequence[Rule],
    states: Sequence[State],
    memory: ElementMemory | None,
    device: torch.device,
) -> tuple[list[State], Tensor, dict[Key, Memory]]:
    """The states, counts and memory of elements of a `state_dict`, checked against this clipper.

    Raises:
        ConfigError: If policies, slots or shapes are others.
    """
    if saved.get("format") != FORMAT:
        msg = (
            f"Saved clip state has format {saved.get('format')!r}; this version reads {FORMAT}. "
            "Start with fresh state, or load it with the version that saved it."
        )
        raise ConfigError(msg)
    kinds = [entry["type"] for entry in saved["policies"]]
    ours = [rule.policy.type for rule in rules]
    if kinds != ours:
        msg = (
            f"Saved clip state is of policies {kinds}, this configuration has {ours}. Start with "
            "fresh state or use the same policies."
        )
        raise ConfigError(msg)
    loaded: list[State] = []
    for entry, rule, state in zip(saved["policies"], rules, states, strict=True):
        if state and entry["slots"] != list(rule.names):
            msg = (
                f"Saved clip state has slots {entry['slots']}, this model has "
                f"{list(rule.names)}. Start with fresh state or use the same scope."
            )
            raise ConfigError(msg)
        shapes = {name: tuple(value.shape) for name, value in entry["state"].items()}
        expected = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != expected:
            msg = (
                f"Saved state of {entry['type']!r} has shapes {shapes}, this one has {expected}: "
                "a length such as warmup_steps differs. Start with fresh state or the same values."
            )
            raise ConfigError(msg)
        if isinstance(rule.policy, ElementPolicy) and rule.policy.memory and not rule.policy.saves:
            loaded.append(rule.policy.init(len(rule.names), device))
            continue
        loaded.append({n: v.to(device, torch.float64).clone() for n, v in entry["state"].items()})
    counts = [
        torch.as_tensor(saved["counts"][name], dtype=torch.float64, device=device)
        for name in Tally.NAMES
    ]
    elements: dict[Key, Memory] = {}
    if memory is not None:
        for rule, entry in zip(rules, saved["policies"], strict=True):
            elements |= memory.loaded(rule, entry.get("elements", {}), device)
    return loaded, torch.stack(counts), elements


def carry_over(
    before: Sequence[Rule], states: Sequence[State], after: Sequence[Rule], device: torch.device
) -> list[State]:
    """States for new slots: those of the same name keep their columns, others start fresh."""
    old = {rule.key: (rule.names, state) for rule, state in zip(before, states, strict=True)}
    carried: list[State] = []
    for rule in after:
        fresh = rule.policy.init(len(rule.names), device)
        names, state = old.get(rule.key, ((), {}))
        known = {name: index for index, name in enumerate(names)}
        kept = [(i, known[name]) for i, name in enumerate(rule.names) if name in known]
        for key, value in fresh.items() if kept else ():
            here, there = torch.tensor(kept, dtype=torch.int64, device=value.device).unbind(1)
            value[..., here] = state[key].index_select(-1, there.to(state[key].device)).to(device)
        carried.append(fresh)
    return carried
