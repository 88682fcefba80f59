"""From parameters to slots: what each coefficient covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.norms import is_wide
from gradclip.plan.groups import Fact, Membership, matched, members_of
from gradclip.plan.plan import Plan, Rule
from gradclip.plan.rates import grows_with_gradient
from gradclip.plan.units import UnitDims, UnitMap
from gradclip.policies import ElementPolicy, NormPolicy, Policy
from gradclip.types import Region

__all__ = ["build_plan", "needs_regions"]

_LEVELS = ("global", "group", "parameter", "unit")
_PARAMETER, _UNIT = 2, 3

Path = tuple[str, ...]


def build_plan(
    config: ClipConfig,
    facts: Mapping[str, Fact],
    parameters: Mapping[str, Parameter],
    regions: Mapping[str, Region],
    device: torch.device,
    *,
    fine: bool,
    frozen: Sequence[str] = (),
) -> Plan:
    """Divide parameters into slots and give every policy its own.

    Args:
        config: Policies, and other policies for some parameters.
        facts: What is known of every parameter, also of those that only other ranks hold.
        parameters: Those that this rank holds, by name; a lazy one counts as held elsewhere until
            it has a shape.
        regions: Where this rank's part of each of them lies, if units are measured.
        device: Where decisions are made.
        fine: Every parameter is measured by itself, whatever policies ask for.
        frozen: Names that groups may match although nothing is clipped there yet.

    Raises:
        ConfigError: If a pattern of the configuration matches no parameter, or policies don't
            agree on what a unit is.
        LayoutError: If ranks hold parts that units can't be made of.
    """
    chains = config.lists
    policies = [policy for chain in chains for policy in chain]
    members = members_of(config, facts, frozen)
    logged = _PARAMETER if fine else 1 if config.log.per_group else 0
    depth = max([logged, *(_finest(policy) for policy in policies)])

    # A slot is named by its path: config group, optimizer group, parameter, as deep as needed.
    shaped = {name: p for name, p in parameters.items() if not is_lazy(p)}
    slots: dict[Path, list[Parameter]] = {}
    where: dict[Path, Membership] = {}
    for name, fact in facts.items():
        path = (str(members[name].group), fact.group, name)[: depth + 1]
        slot = slots.setdefault(path, [])
        where[path] = members[name]
        if name in shaped:
            slot.append(shaped[name])
    _refuse_complex(chains, members, facts)
    unit_map = None
    if depth == _UNIT:
        _refuse_probes(policies)
        unit_dims = _unit_dims(chains, where, facts)
        shapes = {name: fact.shape for name, fact in facts.items()}
        unit_map = UnitMap.of(unit_dims, shapes, regions, device)
    rules = [
        rule
        for chain_index, chain in enumerate(chains)
        for index, policy in enumerate(chain)
        if (rule := _rule((chain_index, index), policy, where, unit_map, device)).names
    ]
    held = {name: [shaped[name]] if name in shaped else [] for name in facts}
    groups: dict[str, list[int]] = {}
    for i, path in enumerate(slots):
        groups.setdefault(path[1] if depth else "group0", []).append(i)
    recorded = next((p.norm_type for p in policies if isinstance(p, NormPolicy)), 2.0)
    needed = [p for policy in policies if not _probes(policy) and (p := policy.measured[1])]
    rated = any(grows_with_gradient(fact.kinds) for fact in facts.values())
    weighing = [p for p in policies if p.uses_weights or (p.uses_rate and rated)]
    weighed = [p for policy in weighing if (p := policy.measured[1]) is not None]
    dtypes = {fact.dtype for fact in facts.values()}
    return Plan(
        parameters=parameters,
        slots=list(slots.values()),
        slot_names=[path[-1] for path in slots],
        rules=rules,
        recorded=recorded,
        norm_types={p: is_wide(p, dtypes) for p in dict.fromkeys([recorded, *needed])},
        watched=_watched(where, unit_map, device),
        weight_types={p: is_wide(p, dtypes) for p in dict.fromkeys(weighed)},
        probe_types={
            i: {p: is_wide(p, dtypes)}
            for i, rule in enumerate(rules)
            if rule.elementwise is not None
            and rule.elementwise.probes
            and (p := rule.policy.measured[1])
        },
        unit_map=unit_map,
        regions=regions,
        shapes={name: fact.shape for name, fact in facts.items()},
        group_names=list(groups),
        group_members=_table(list(groups.values()), len(slots), device),
        each=None if depth >= _PARAMETER else held,
    )


def needs_regions(config: ClipConfig) -> bool:
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
    where: Mapping[Path, Membership], unit_map: UnitMap | None, device: torch.device
) -> Tensor | None:
    slots = [i for i, member in enumerate(where.values()) if member.watched]
    if len(slots) == len(where):
        return None
    if unit_map is not None:
        return unit_map.indices(slots)
    return torch.tensor(slots, dtype=torch.int64, device=device)


def _unit_dims(
    chains: Sequence[Sequence[Policy]],
    where: Mapping[Path, Membership],
    facts: Mapping[str, Fact],
) -> dict[str, UnitDims]:
    """What distinguishes the units of each parameter: what the policies of scope "unit" say."""
    found: dict[str, UnitDims] = {}
    for path, member in where.items():
        name = path[-1]
        says = {
            policy.unit_dims(name, facts[name].shape)
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
    key: tuple[int, int],
    policy: Policy,
    where: Mapping[Path, Membership],
    unit_map: UnitMap | None,
    device: torch.device,
) -> Rule:
    """A policy and the measured slots that its own are made of, and act on."""
    depth, chain = _depth(policy), key[0]
    paths = list(where)
    mine = [i for i, m in enumerate(where.values()) if m.chain == chain]
    out = _excluded(policy, [paths[i][-1] for i in mine])
    acts = [i for i in mine if where[paths[i]].scaled and paths[i][-1] not in out]
    sees = [i for i, m in enumerate(where.values()) if _sees(policy, depth, chain, m)]
    sees = [i for i in sees if paths[i][-1] not in out]
    if depth == _UNIT and unit_map is not None:
        names = [f"{paths[i][-1]}[{row}]" for i in acts for row in range(unit_map.counts[i])]
        indices, units = unit_map.indices(acts), sum(unit_map.counts)
        owner = torch.tensor([], dtype=torch.int64, device=device)
        return Rule(
            key, policy, tuple(names), tuple(acts), None, owner, unit_map.lengths, units, indices
        )
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
        key,
        policy,
        tuple(path[-1] if depth else "global" for path in own),
        tuple(acts),
        None if same else _table(held, len(paths), device),
        torch.tensor(owners, dtype=torch.int64, device=device),
        None if unit_map is None else unit_map.lengths,
        0 if unit_map is None else sum(unit_map.counts),
        elementwise=policy if isinstance(policy, ElementPolicy) else None,
        same_slots=same and unit_map is None,
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
