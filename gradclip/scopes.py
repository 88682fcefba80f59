"""From parameters to slots: what each coefficient covers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.groups import Fact, Membership, members_of
from gradclip.in_backward import refuse_steps_in_backward
from gradclip.measure import is_wide
from gradclip.policies import NormPolicy, Policy, Rule

__all__ = ["Plan", "build_plan", "collect_parameters", "facts_of"]

_LEVELS = ("global", "group", "parameter")

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP1, activation checkpointing and torch.compile put into the names of parameters."""

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
        watched: Int64 indices of the measured slots that may withhold a step; None for all.
    """

    parameters: Mapping[str, Parameter]
    slots: Sequence[Sequence[Parameter]]
    slot_names: Sequence[str]
    rules: Sequence[Rule]
    norm_types: Mapping[float, bool]
    watched: Tensor | None = None

    @property
    def recorded(self) -> float:
        """The p of the norm that records show."""
        return next(iter(self.norm_types))


def collect_parameters(
    named_parameters: Iterable[tuple[str, Parameter]] | None, optimizer: Optimizer | None
) -> dict[str, Parameter]:
    """The parameters to clip, by name, each once.

    With an optimizer these are its parameters; names come from `named_parameters`, else from the
    optimizer's own `param_names`, else from their place in it. They are those of the unwrapped
    model, so that patterns, metrics and saved state mean the same under every wrapper.

    Raises:
        ConfigError: If neither is given, there is no parameter, two have one name, or one is
            stepped inside backward.
    """
    if named_parameters is None and optimizer is None:
        msg = (
            "GradientClipper got neither named_parameters nor optimizer; give at least one, as in "
            "GradientClipper(policy, named_parameters=model.named_parameters(), optimizer=opt)."
        )
        raise ConfigError(msg)
    names: dict[Parameter, str] = {}
    named = list(named_parameters or ())
    for (_, parameter), name in zip(named, _unwrapped([name for name, _ in named]), strict=True):
        names.setdefault(parameter, name)
    if optimizer is not None:
        places = [
            (parameter, _unwrapped(group.get("param_names", ())), f"group{index}", place)
            for index, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        ]
        names = {
            parameter: names.get(parameter, own[place] if own else f"{group}.{place}")
            for parameter, own, group, place in places
        }
    found: dict[str, Parameter] = {}
    for parameter, name in names.items():
        if name in found:
            msg = (
                f"Two parameters are named {name!r}; every parameter needs a name of its own. "
                "With several models, put something before the names of each, as in "
                "[('decoder.' + n, p) for n, p in decoder.named_parameters()]."
            )
            raise ConfigError(msg)
        found[name] = parameter
    if not found:
        msg = (
            "GradientClipper got no parameters: a generator may have been used up. Pass a new one."
        )
        raise ConfigError(msg)
    refuse_steps_in_backward(found)
    return found


def _unwrapped(names: Iterable[str]) -> list[str]:
    """The names in the user's own model; DDP puts one `module.` before all of them."""
    names = list(names)
    for wrapper in _WRAPPERS:
        names = [name.replace(wrapper, "") for name in names]
    by_ddp = all(name.startswith("module.") for name in names)
    return [name.removeprefix("module.") for name in names] if by_ddp else names


def facts_of(parameters: Mapping[str, Parameter], optimizer: Optimizer | None) -> dict[str, Fact]:
    """What a plan needs to know of each parameter.

    A parameter's optimizer group is named by its `name`, else `group<i>`.
    """
    groups: dict[Parameter, str] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer else ()):
        groups |= dict.fromkeys(group["params"], str(group.get("name", f"group{index}")))
    stepping = getattr(optimizer, "stepping", optimizer)
    kinds = tuple(c.__name__ for c in type(stepping).__mro__[:-1]) if optimizer else ()
    return {name: Fact(groups.get(p, "group0"), p.dtype, kinds) for name, p in parameters.items()}


def build_plan(
    config: ClipConfig,
    facts: Mapping[str, Fact],
    parameters: Mapping[str, Parameter],
    device: torch.device,
) -> Plan:
    """Cut parameters into slots and give every policy its own.

    Args:
        config: Policies, and other policies for some parameters.
        facts: What is known of every parameter, also of those that only other ranks hold.
        parameters: Those that this rank holds, by name.
        device: Where decisions are made.

    Raises:
        ConfigError: If a pattern of the configuration matches no parameter.
    """
    chains = [config.policies, *(group.policies or [] for group in config.groups)]
    policies = [policy for chain in chains for policy in chain]
    members = members_of(config, facts)
    depth = 2 if config.log.per_parameter else 0
    depth = max([depth, *(_LEVELS.index(policy.measured[0]) for policy in policies)])

    # A slot is named by its path: config group, optimizer group, parameter, as deep as needed.
    slots: dict[Path, list[Parameter]] = {}
    where: dict[Path, Membership] = {}
    for name, fact in facts.items():
        path = (str(members[name].place), fact.group, name)[: depth + 1]
        slot = slots.setdefault(path, [])
        where[path] = members[name]
        if name in parameters:
            slot.append(parameters[name])
    rules = [
        rule
        for index, chain in enumerate(chains)
        for policy in chain
        if (rule := _rule(policy, index, where, device)).names
    ]
    watched = [i for i, member in enumerate(where.values()) if member.watched]
    recorded = next((p.norm_type for p in policies if isinstance(p, NormPolicy)), 2.0)
    needed = [p for policy in policies if (p := policy.measured[1]) is not None]
    dtypes = {fact.dtype for fact in facts.values()}
    return Plan(
        parameters=parameters,
        slots=list(slots.values()),
        slot_names=[path[-1] for path in slots],
        rules=rules,
        norm_types={p: is_wide(p, dtypes) for p in dict.fromkeys([recorded, *needed])},
        watched=None if len(watched) == len(where) else torch.tensor(watched, device=device),
    )


def _rule(
    policy: Policy, chain: int, where: Mapping[Path, Membership], device: torch.device
) -> Rule:
    """A policy and the measured slots that its own are made of, and act on."""
    depth = _LEVELS.index(policy.measured[0])
    paths = list(where)
    acts = [i for i, m in enumerate(where.values()) if m.chain == chain and m.scaled]
    sees = [i for i, m in enumerate(where.values()) if _sees(policy, depth, chain, m)]
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
    width = max(map(len, held), default=0)
    members = [places + [len(paths)] * (width - len(places)) for places in held]
    same = members == [[i] for i in range(len(paths))] and owners == list(range(len(paths)))
    return Rule(
        policy,
        tuple(path[-1] if depth else "global" for path in own),
        tuple(acts),
        None if same else torch.tensor(members, device=device),
        torch.tensor(owners, device=device),
    )


def _sees(policy: Policy, depth: int, chain: int, member: Membership) -> bool:
    """Whether a parameter is part of what a policy measures."""
    if policy.withholds:
        return member.chain == chain and member.watched
    if chain == 0 and depth < _LEVELS.index("parameter"):
        return member.counted
    return member.chain == chain
