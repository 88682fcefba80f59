"""From parameters to slots: what each coefficient covers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.measure import is_wide
from gradclip.policies import NormPolicy, Policy, Rule

__all__ = ["Plan", "build_plan", "collect_parameters", "group_names"]

_LEVELS = ("global", "group", "parameter")


@dataclass(frozen=True)
class Plan:
    """Everything about a step that depends on the parameters and the configuration alone.

    Attributes:
        parameters: By name, in a fixed order.
        slots: The parameters of each measured slot: the coarsest cut that every policy's own
            slots can be put together from.
        slot_names: One name per measured slot.
        rules: The policies in order, each with its slots.
        norm_types: The p of every norm to measure, the recorded one first, and whether it is
            wide (`gradclip.measure.is_wide`).
    """

    parameters: Mapping[str, Parameter]
    slots: Sequence[Sequence[Parameter]]
    slot_names: Sequence[str]
    rules: Sequence[Rule]
    norm_types: Mapping[float, bool]

    @property
    def recorded(self) -> float:
        """The p of the norm that records show."""
        return next(iter(self.norm_types))


def collect_parameters(
    named_parameters: Iterable[tuple[str, Parameter]] | None, optimizer: Optimizer | None
) -> dict[str, Parameter]:
    """The parameters to clip, by name, each once.

    With an optimizer these are its parameters; names come from `named_parameters`, else from the
    optimizer's own `param_names`, else from their place in it.

    Raises:
        ConfigError: If neither is given, or there is no parameter.
    """
    if named_parameters is None and optimizer is None:
        msg = (
            "GradientClipper got neither named_parameters nor optimizer; give at least one, as in "
            "GradientClipper(policy, named_parameters=model.named_parameters(), optimizer=opt)."
        )
        raise ConfigError(msg)
    named = list(named_parameters or ())
    names: dict[Parameter, str] = {}
    for name, parameter in named:
        names.setdefault(parameter, name)
    found = {name: parameter for parameter, name in names.items()}
    if optimizer is not None:
        found = {}
        for index, group in enumerate(optimizer.param_groups):
            own = group.get("param_names", ())
            for place, parameter in enumerate(group["params"]):
                fallback = own[place] if own else f"group{index}.{place}"
                found[names.get(parameter, fallback)] = parameter
    found = {name: parameter for name, parameter in found.items() if parameter.numel()}
    if not found:
        msg = (
            "GradientClipper got no parameters: a generator may have been used up. Pass a new one."
        )
        raise ConfigError(msg)
    return found


def group_names(
    optimizer: Optimizer | None, parameters: Iterable[Parameter]
) -> dict[Parameter, str]:
    """The name of each parameter's optimizer group: its `name`, else `group<i>`."""
    if optimizer is None:
        return dict.fromkeys(parameters, "group0")
    return {
        parameter: str(group.get("name", f"group{index}"))
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def build_plan(
    config: ClipConfig,
    parameters: Mapping[str, Parameter],
    groups: Mapping[Parameter, str],
    device: torch.device,
) -> Plan:
    """Cut parameters into slots and give every policy its own.

    Args:
        config: Policies, and other policies for some parameters.
        parameters: By name, each once.
        groups: Name of each parameter's optimizer group.
        device: Where decisions are made.

    Raises:
        ConfigError: If a pattern of the configuration matches no parameter.
    """
    chains = [config.policies, *(group.policies for group in config.groups)]
    policies = [policy for chain in chains for policy in chain]
    chain_of = _match(config, parameters)
    depth = 2 if config.log.per_parameter else 0
    depth = max([depth, *(_LEVELS.index(policy.measured[0]) for policy in policies)])

    # A slot is named by its path: chain, optimizer group, parameter, as deep as needed.
    slots: dict[tuple[str, ...], list[Parameter]] = {}
    for name, parameter in parameters.items():
        path = (str(chain_of[name]), groups[parameter], name)
        slots.setdefault(path[: depth + 1], []).append(parameter)
    rules = [
        rule
        for index, chain in enumerate(chains)
        for policy in chain
        if (rule := _rule(policy, str(index), list(slots), device)).names
    ]
    recorded = next((p.norm_type for p in policies if isinstance(p, NormPolicy)), 2.0)
    needed = [p for policy in policies if (p := policy.measured[1]) is not None]
    dtypes = {parameter.dtype for parameter in parameters.values()}
    return Plan(
        parameters=parameters,
        slots=list(slots.values()),
        slot_names=[path[-1] for path in slots],
        rules=rules,
        norm_types={p: is_wide(p, dtypes) for p in dict.fromkeys([recorded, *needed])},
    )


def _match(config: ClipConfig, parameters: Mapping[str, Parameter]) -> dict[str, int]:
    """Which list of policies each parameter gets: 0 for the main one, else 1 + the group."""
    chain_of = dict.fromkeys(parameters, 0)
    for index, group in reversed(list(enumerate(config.groups))):
        matched = [name for name in parameters if fnmatch.fnmatchcase(name, group.match)]
        if not matched:
            near = difflib.get_close_matches(group.match, parameters, n=3, cutoff=0.3)
            nearest = near or list(parameters)[:3]
            msg = (
                f"groups[{index}].match is {group.match!r} and matches no parameter; "
                f"nearest names: {', '.join(nearest)}. Correct the pattern or remove the group."
            )
            raise ConfigError(msg)
        chain_of.update(dict.fromkeys(matched, index + 1))
    return chain_of


def _rule(
    policy: Policy, chain: str, measured: Sequence[tuple[str, ...]], device: torch.device
) -> Rule:
    depth = _LEVELS.index(policy.measured[0])
    covers = tuple(i for i, path in enumerate(measured) if path[0] == chain)
    own = list(dict.fromkeys(measured[i][: depth + 1] for i in covers))
    index = {path: i for i, path in enumerate(own)}
    owners = [index.get(path[: depth + 1], len(own)) for path in measured]
    owner = torch.tensor(owners, device=device)
    members = owner == torch.arange(len(own), device=device).unsqueeze(1)
    names = tuple(path[-1] if depth else "global" for path in own)
    same = len(own) == len(measured)
    return Rule(policy, names, covers, None if same else members, owner)
