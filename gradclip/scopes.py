"""From parameters to slots: what each coefficient covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.groups import Fact, Membership, matched, members_of
from gradclip.measure import is_wide
from gradclip.policies import ElementPolicy, NormPolicy, Policy, Rule, combine_runs
from gradclip.types import Grads, Place, Units
from gradclip.units import Kept, UnitCut

__all__ = ["Plan", "build_plan", "needs_places"]

_LEVELS = ("global", "group", "parameter", "unit")
_PARAMETER, _UNIT = 2, 3

Path = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Everything about a step that depends on the parameters and the configuration alone.

    Attributes:
        parameters: Those this rank holds, by name, in a fixed order.
        slots: The parameters of each measured slot: the coarsest cut that every policy's own
            slots can be put together from.
        slot_names: One name per measured slot.
        rules: The policies in order, each with its slots.
        norm_types: The p of every norm to measure, the recorded one first, and whether it is
            wide (`gradclip.measure.is_wide`).
        watched: Int64 indices of the measured slots (or units) that may withhold a step; None for
            all.
        weight_types: The p of every norm of the parameters themselves to measure, as `norm_types`.
        probe_types: The p of what each element policy measures in place of gradients, by rule.
        cut: How each slot, then one parameter, is cut into units; None if none are measured.
        places: Where this rank's part of each parameter lies, by name; empty where nobody asks.
        shapes: Of all whole parameters, by name.
        group_names: The optimizer's parameter groups, where slots tell them apart.
        group_members: The measured slots of each, as `Rule.members`.
        each: The held parameter of each name, if any, where slots are coarser than parameters;
            None where they aren't.
    """

    parameters: Mapping[str, Parameter]
    slots: Sequence[Sequence[Parameter]]
    slot_names: Sequence[str]
    rules: Sequence[Rule]
    norm_types: Mapping[float, bool]
    watched: Tensor | None
    weight_types: Mapping[float, bool]
    probe_types: Mapping[int, Mapping[float, bool]]
    cut: UnitCut | None
    places: Mapping[str, Place]
    shapes: Mapping[str, tuple[int, ...]]
    group_names: Sequence[str]
    group_members: Tensor
    each: Mapping[str, Sequence[Parameter]] | None

    @property
    def recorded(self) -> float:
        """The p of the norm that records show."""
        return next(iter(self.norm_types))

    @property
    def split_by(self) -> str | None:
        """The type of a policy that one coefficient for all gradients can't stand for, if any."""
        for rule in self.rules:
            whole = len(rule.names) == 1 and len(rule.covers) == len(self.slots)
            if self.cut is not None or not whole or isinstance(rule.policy, ElementPolicy):
                return rule.policy.type
        return None

    def cut_up(self, grads: Grads) -> Grads | Units:
        """Local tensors as they are measured and scaled: by slot, or by unit."""
        return grads if self.cut is None else self.cut.units(grads)

    def with_sizes(self, sizes: Tensor) -> Plan:
        """The same, with the elements of each slot, float64 of shape (slots,), for who asks."""
        rules = [
            replace(rule, sizes=rule.sized(sizes)) if rule.policy.uses_sizes else rule
            for rule in self.rules
        ]
        return replace(self, rules=rules)

    def by_slot(self, norms: Tensor) -> Tensor:
        """Recorded norms of the slots from those of what is measured."""
        return norms if self.cut is None else combine_runs(norms, self.recorded, self.cut.lengths)


def build_plan(
    config: ClipConfig,
    facts: Mapping[str, Fact],
    parameters: Mapping[str, Parameter],
    places: Mapping[str, Place],
    device: torch.device,
    *,
    fine: bool,
) -> Plan:
    """Cut parameters into slots and give every policy its own.

    Args:
        config: Policies, and other policies for some parameters.
        facts: What is known of every parameter, also of those that only other ranks hold.
        parameters: Those that this rank holds, by name.
        places: Where this rank's part of each of them lies, if units are told apart.
        device: Where decisions are made.
        fine: Every parameter is measured by itself, whatever policies ask for.

    Raises:
        ConfigError: If a pattern of the configuration matches no parameter, or policies don't
            agree on what a unit is.
        LayoutError: If ranks hold parts that units can't be made of.
    """
    chains = config.lists
    policies = [policy for chain in chains for policy in chain]
    members = members_of(config, facts)
    told = _PARAMETER if fine else 1 if config.log.per_group else 0
    depth = max([told, *(_finest(policy) for policy in policies)])

    # A slot is named by its path: config group, optimizer group, parameter, as deep as needed.
    slots: dict[Path, list[Parameter]] = {}
    where: dict[Path, Membership] = {}
    for name, fact in facts.items():
        path = (str(members[name].place), fact.group, name)[: depth + 1]
        slot = slots.setdefault(path, [])
        where[path] = members[name]
        if name in parameters:
            slot.append(parameters[name])
    _refuse_complex(chains, members, facts)
    cut = None
    if depth == _UNIT:
        _refuse_probes(policies)
        kept = _kept(chains, where, facts)
        shapes = {name: fact.shape for name, fact in facts.items()}
        cut = UnitCut.of(kept, shapes, places, device)
    rules = [
        rule
        for index, chain in enumerate(chains)
        for policy in chain
        if (rule := _rule(policy, index, where, cut, device)).names
    ]
    held = {name: [parameters[name]] if name in parameters else [] for name in facts}
    groups: dict[str, list[int]] = {}
    for i, path in enumerate(slots):
        groups.setdefault(path[1] if depth else "group0", []).append(i)
    recorded = next((p.norm_type for p in policies if isinstance(p, NormPolicy)), 2.0)
    needed = [p for policy in policies if not _probes(policy) and (p := policy.measured[1])]
    weighed = [p.measured[1] for p in policies if p.uses_weights and p.measured[1] is not None]
    dtypes = {fact.dtype for fact in facts.values()}
    return Plan(
        parameters=parameters,
        slots=list(slots.values()),
        slot_names=[path[-1] for path in slots],
        rules=rules,
        norm_types={p: is_wide(p, dtypes) for p in dict.fromkeys([recorded, *needed])},
        watched=_watched(where, cut, device),
        weight_types={p: is_wide(p, dtypes) for p in dict.fromkeys(weighed)},
        probe_types={
            i: {p: is_wide(p, dtypes)}
            for i, rule in enumerate(rules)
            if _probes(rule.policy) and (p := rule.policy.measured[1])
        },
        cut=cut,
        places=places,
        shapes={name: fact.shape for name, fact in facts.items()},
        group_names=list(groups),
        group_members=_table(list(groups.values()), len(slots), device),
        each=None if depth >= _PARAMETER else held,
    )


def needs_places(config: ClipConfig) -> bool:
    """Whether one has to know where local parts lie: for units, and to save what elements have."""
    return any(
        policy.measured[0] == "unit" or (isinstance(policy, ElementPolicy) and policy.saves)
        for chain in config.lists
        for policy in chain
    )


def _depth(policy: Policy) -> int:
    return _LEVELS.index(policy.measured[0])


def _probes(policy: Policy) -> bool:
    return isinstance(policy, ElementPolicy) and policy.probes


def _finest(policy: Policy) -> int:
    """The depth that a policy needs its slots to have: memory of elements goes by parameter."""
    remembers = isinstance(policy, ElementPolicy) and policy.memory
    return max(_depth(policy), _PARAMETER if remembers else 0)


def _refuse_probes(policies: Sequence[Policy]) -> None:
    """Elements of units that were scaled differently could not be measured as one."""
    for policy in policies:
        if _probes(policy):
            msg = (
                f"{policy.type!r} stands beside a policy of scope 'unit', and measures elements by "
                "parameter; allowed beside it: scope 'global', 'group' or 'parameter'. Change that "
                "scope, or leave one of them out."
            )
            raise ConfigError(msg)


def _refuse_complex(
    chains: Sequence[Sequence[Policy]],
    members: Mapping[str, Membership],
    facts: Mapping[str, Fact],
) -> None:
    """Complex elements are measured and scaled as pairs of real numbers."""
    for name in (name for name, fact in facts.items() if fact.dtype.is_complex):
        for index, policy in ((i, policy) for i, chain in enumerate(chains) for policy in chain):
            scope, norm_type = policy.measured
            own = isinstance(policy, ElementPolicy)
            if scope == "unit" or (
                members[name].chain == index if own else norm_type not in (None, 2.0)
            ):
                msg = (
                    f"{name!r} is complex, and {policy.type!r} takes elements, units or a norm "
                    "other than p = 2 of it; allowed: p = 2 of scope 'global', 'group' or "
                    "'parameter'. Use that, leave it out of the optimizer of this clipper, or "
                    "store it as a real tensor (torch.view_as_real)."
                )
                raise ConfigError(msg)


def _watched(
    where: Mapping[Path, Membership], cut: UnitCut | None, device: torch.device
) -> Tensor | None:
    slots = [i for i, member in enumerate(where.values()) if member.watched]
    if len(slots) == len(where):
        return None
    return torch.tensor(slots, device=device) if cut is None else cut.indices(slots)


def _kept(
    chains: Sequence[Sequence[Policy]],
    where: Mapping[Path, Membership],
    facts: Mapping[str, Fact],
) -> dict[str, Kept]:
    """What tells the units of each parameter apart, as the policies of scope "unit" say."""
    found: dict[str, Kept] = {}
    for path, member in where.items():
        name = path[-1]
        says = {
            policy.kept(name, facts[name].shape)
            for policy in chains[member.chain]
            if _depth(policy) == _UNIT
        }
        if len(says) > 1:
            msg = (
                f"Policies of scope 'unit' tell the units of {name!r} apart by different dims; "
                "allowed: the same for all of them. Give them the same unit_dim and axes."
            )
            raise ConfigError(msg)
        found[name] = says.pop() if says else (0, 0)
    return found


def _rule(
    policy: Policy,
    chain: int,
    where: Mapping[Path, Membership],
    cut: UnitCut | None,
    device: torch.device,
) -> Rule:
    """A policy and the measured slots that its own are made of, and act on."""
    depth = _depth(policy)
    paths = list(where)
    mine = [i for i, m in enumerate(where.values()) if m.chain == chain]
    out = _excluded(policy, [paths[i][-1] for i in mine])
    acts = [i for i in mine if where[paths[i]].scaled and paths[i][-1] not in out]
    sees = [i for i, m in enumerate(where.values()) if _sees(policy, depth, chain, m)]
    sees = [i for i in sees if paths[i][-1] not in out]
    if depth == _UNIT and cut is not None:
        names = [f"{paths[i][-1]}[{row}]" for i in acts for row in range(cut.counts[i])]
        places, units = cut.indices(acts), sum(cut.counts)
        owner = torch.tensor([], device=device)
        return Rule(policy, tuple(names), tuple(acts), None, owner, cut.lengths, units, places)
    own = list(dict.fromkeys(paths[i][1 : depth + 1] for i in sorted({*acts, *sees})))
    if own and not sees:
        msg = (
            f"groups leave {policy.type!r} nothing to measure: no parameter is counted (or, for a "
            "policy that withholds steps, watched). Leave one in."
        )
        raise ConfigError(msg)
    index = {path: i for i, path in enumerate(own)}
    owners = [len(own)] * len(paths)
    for i in acts:
        owners[i] = index[paths[i][1 : depth + 1]]
    held: list[list[int]] = [[] for _ in own]
    for i in sees:
        held[index[paths[i][1 : depth + 1]]].append(i)
    same = held == [[i] for i in range(len(paths))] and owners == list(range(len(paths)))
    return Rule(
        policy,
        tuple(path[-1] if depth else "global" for path in own),
        tuple(acts),
        None if same else _table(held, len(paths), device),
        torch.tensor(owners, device=device),
        None if cut is None else cut.lengths,
        0 if cut is None else sum(cut.counts),
    )


def _table(held: Sequence[Sequence[int]], slots: int, device: torch.device) -> Tensor:
    """Slots in rows of one length, filled up with the number of slots."""
    width = max(map(len, held), default=0)
    rows = [[*row, *[slots] * (width - len(row))] for row in held]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _excluded(policy: Policy, names: Sequence[str]) -> set[str]:
    """The parameters that a policy leaves alone."""
    where = f"exclude of {policy.type!r}"
    return {name for pattern in policy.excluded for name in matched(where, pattern, names)}


def _sees(policy: Policy, depth: int, chain: int, member: Membership) -> bool:
    """Whether a parameter is part of what a policy measures."""
    if policy.withholds:
        return member.chain == chain and member.watched
    if chain == 0 and depth < _PARAMETER:
        return member.counted
    return member.chain == chain
