"""Which parameters are clipped, what they are called, and what is known of them."""

from __future__ import annotations

import gc
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.plan.groups import Fact, for_each
from gradclip.plan.in_backward import refuse_marked
from gradclip.plan.rates import kinds_of

__all__ = [
    "Named",
    "as_pairs",
    "collect_parameters",
    "configs_for",
    "facts_of",
    "frozen_names",
    "grad_dtype",
    "group_names",
    "in_place",
    "refuse_differentiable",
    "told_apart",
]

Named = Module | Mapping[str, Parameter] | Iterable[tuple[str, Parameter]]
"""A model, or names of its parameters as from `model.named_parameters()`."""

_WRAPPERS = (
    "_forward_module.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)
"""What Fabric, FSDP1, activation checkpointing and torch.compile put into names."""
_PARALLEL = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
"""Modules that hold the user's own as `module`, which may be a name of the user's too."""


def in_place(policy: Any, named: Any, optimizer: Any) -> tuple[Any, Any, Any]:
    """The three as given, also where no policy was: `GradientClipper(model, optimizer)`."""
    if isinstance(policy, Module | Iterator | ItemsView) or hasattr(policy, "param_groups"):
        return None, policy, named if optimizer is None else optimizer
    return policy, named, optimizer


def told_apart(named: Any, optimizer: Any) -> tuple[Any, Any]:
    """The names and the optimizer, also where the optimizer was given in the place of the names.

    Raises:
        ConfigError: If what stands for the optimizer is none.
    """
    if hasattr(named, "param_groups") and not isinstance(named, Module):
        named, optimizer = optimizer, named
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        msg = (
            f"optimizer is a {type(optimizer).__name__}; allowed: an optimizer of torch or one "
            "like it, with param_groups. Write GradientClipper(policy, model, optimizer)."
        )
        raise ConfigError(msg)
    return named, optimizer


def as_pairs(named: Named | None) -> list[tuple[str, Parameter]]:
    """Names and parameters.

    Raises:
        ConfigError: If there are parameters without names, or something else.
    """
    if isinstance(named, Module):
        return list(named.named_parameters())
    if isinstance(named, Mapping):
        named = named.items()
    one = isinstance(named, Tensor) or not isinstance(named, Iterable | None)
    found: list[Any] = [named] if one else list(named or ())
    for item in found:
        match item:
            case (str(), Tensor()):
                continue
        msg = (
            f"named_parameters holds a {type(item).__name__} without a name; allowed: a model, or "
            "pairs of a name and a parameter, as patterns, metrics and saved state go by names. "
            "Write GradientClipper(policy, model), or model.named_parameters() in place of "
            "model.parameters()."
        )
        raise ConfigError(msg)
    return found


def collect_parameters(
    named_parameters: Named | None, optimizer: Optimizer | None
) -> dict[str, Parameter]:
    """The parameters to clip, by name, each once.

    With an optimizer these are its parameters; names come from `named_parameters`, else from the
    optimizer's own `param_names`, else from their index in it. They are those of the unwrapped
    model, so that patterns, metrics and saved state mean the same under every wrapper. A tied
    parameter has the first of its names.

    Raises:
        ConfigError: If neither is given, there is no parameter, two have one name, one is stepped
            inside backward, or derivatives go through the optimizer's step.
    """
    if named_parameters is None and optimizer is None:
        msg = (
            "GradientClipper got neither named_parameters nor optimizer; give at least one, as in "
            "GradientClipper(policy, named_parameters=model.named_parameters(), optimizer=opt)."
        )
        raise ConfigError(msg)
    refuse_differentiable(optimizer)
    names: dict[Parameter, str] = {}
    model = named_parameters if isinstance(named_parameters, Module) else None
    for name, parameter in _unwrapped(as_pairs(named_parameters), model):
        names.setdefault(parameter, name)
    if optimizer is not None:
        listed: dict[Parameter, str] = {}
        for index, group in enumerate(optimizer.param_groups):
            held = group["params"]
            own = group.get("param_names", ())
            if len(own) != len(held):  # none, or left behind when parameters were replaced
                own = [f"group{index}.{column}" for column in range(len(held))]
            listed |= zip(held, own, strict=True)
        unnamed = [(name, p) for p, name in listed.items() if p not in names]
        names |= {p: name for name, p in _unwrapped(unnamed)}
        names = {p: names[p] for p in listed}
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
    refuse_marked(found)
    return found


def frozen_names(
    named_parameters: Named | None, optimizers: Sequence[Optimizer | Any]
) -> list[str]:
    """Names of parameters that need no gradient and that no optimizer has yet.

    Args:
        named_parameters: The model, or names.
        optimizers: Whose parameters are clipped; with none all are, and nothing comes later.
    """
    if not optimizers:
        return []
    held = {p for opt in optimizers for group in opt.param_groups for p in group["params"]}
    pairs = as_pairs(named_parameters)
    frozen = [(name, p) for name, p in pairs if not p.requires_grad and p not in held]
    model = named_parameters if isinstance(named_parameters, Module) else None
    return [name for name, _ in _unwrapped(frozen, model)]


def grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient; where any is allowed, the widest it may be."""
    own = getattr(parameter, "grad_dtype", parameter.dtype) if parameter.is_leaf else None
    if own is not None:
        return own
    if not parameter.is_leaf:
        return parameter.dtype
    return torch.complex128 if parameter.is_complex() else torch.float64


def refuse_differentiable(optimizer: Optimizer | None) -> None:
    """Refuse an optimizer whose step is part of a graph.

    Raises:
        ConfigError: If it was built with `differentiable=True`.
    """
    groups = getattr(optimizer, "param_groups", ())
    if any(group.get("differentiable", False) for group in groups):
        msg = (
            f"{type(optimizer).__name__} has differentiable=True: derivatives go through its step, "
            "and would leave out clipping, which changes gradients in place. Allowed: "
            "differentiable=False. To differentiate through clipping, write it as part of the loss."
        )
        raise ConfigError(msg)


def _unwrapped(
    named: Sequence[tuple[str, Parameter]], model: Module | None = None
) -> list[tuple[str, Parameter]]:
    """The same with the names in the user's own model.

    A `module.` is dropped where DDP or one like it put it there, and stays where it is the user's:
    the names alone don't tell, the wrapper itself does.

    Args:
        named: Names under all wrappers.
        model: Where they come from; None looks for wrappers among all live objects.
    """
    named = [(_without_wrappers(name), p) for name, p in named]
    if not any("module." in name for name, _ in named):
        return named
    outer: dict[Parameter, list[str]] = {}
    for thing in gc.get_objects() if model is None else model.modules():
        kind = type(thing)
        if issubclass(kind, Module) and any(base.__name__ in _PARALLEL for base in kind.__mro__):
            for name, p in thing.named_parameters():
                outer.setdefault(p, []).append(_without_wrappers(name))
    return [(_inside(name, outer.get(p, ())), p) for name, p in named]


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _inside(name: str, outer: Iterable[str]) -> str:
    """A parameter's name without the `module.` of each wrapper in which it has an outer name."""
    for own in sorted(outer, key=len, reverse=True):
        if f".{name}".endswith(f".{own}"):
            name = name.removesuffix(own) + own.removeprefix("module.")
    return name


def group_names(optimizer: Optimizer) -> list[str]:
    """What an optimizer's parameter groups are called: by their `name`, else `group<i>`.

    Groups that share a name are told apart by their index: `decay.0` and `decay.2`.
    """
    names = [str(g.get("name", f"group{i}")) for i, g in enumerate(optimizer.param_groups)]
    unique = [n if names.count(n) == 1 else f"{n}.{i}" for i, n in enumerate(names)]
    if len(set(unique)) == len(unique):
        return unique
    return [f"{name}.{i}" for i, name in enumerate(names)]


def facts_of(
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Fact]:
    """What a plan needs to know of each parameter.

    Args:
        parameters: By name.
        optimizer: What steps them, if known.
        shapes: Of whole parameters, where units are measured; else empty.

    """
    groups: dict[Parameter, str] = {}
    if optimizer is not None:
        for group, label in zip(optimizer.param_groups, group_names(optimizer), strict=True):
            groups |= dict.fromkeys(group["params"], label)
    kinds = kinds_of(optimizer) if optimizer is not None else ()
    return {
        name: Fact(groups.get(p, "group0"), grad_dtype(p), kinds, shapes.get(name, ()))
        for name, p in parameters.items()
    }


def configs_for(
    config: ClipConfig,
    named_parameters: Named,
    optimizers: Sequence[Optimizer],
) -> list[ClipConfig]:
    """What each of several optimizers' clippers is to be built with.

    A group may match parameters of one of them alone (`match: "generator.*"`), which is no error
    for the others.

    Args:
        config: For all of them.
        named_parameters: The model, or names as from `model.named_parameters()`.
        optimizers: Each with parameters of its own.

    Returns:
        One for each optimizer, without the groups that match none of its parameters.

    Raises:
        ConfigError: If a group matches no parameter of any of them.
    """
    named = named_parameters
    if not isinstance(named, Module):
        named = as_pairs(named)
    facts = [facts_of(collect_parameters(named, opt), opt, {}) for opt in optimizers]
    return for_each(config, facts, frozen_names(named, optimizers))
