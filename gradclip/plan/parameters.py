"""Which parameters are clipped, what they are called, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gradclip.config import ClipConfig
from gradclip.errors import ConfigError
from gradclip.plan.groups import Fact, for_each
from gradclip.plan.in_backward import refuse_marked

__all__ = [
    "Named",
    "collect_parameters",
    "configs_for",
    "facts_of",
    "grad_dtype",
    "refuse_differentiable",
]

Named = Module | Iterable[tuple[str, Parameter]]
"""A model, or names of its parameters as from `model.named_parameters()`."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What FSDP1, activation checkpointing and torch.compile put into the names of parameters."""


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
    if isinstance(named_parameters, Module):
        named_parameters = named_parameters.named_parameters()
    named = list(named_parameters or ())
    for (_, parameter), name in zip(named, _unwrapped([name for name, _ in named]), strict=True):
        names.setdefault(parameter, name)
    if optimizer is not None:
        listed = [
            (parameter, _unwrapped(group.get("param_names", ())), f"group{index}", column)
            for index, group in enumerate(optimizer.param_groups)
            for column, parameter in enumerate(group["params"])
        ]
        names = {
            parameter: names.get(parameter, own[column] if own else f"{group}.{column}")
            for parameter, own, group, column in listed
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
    refuse_marked(found)
    return found


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


def _unwrapped(names: Iterable[str]) -> list[str]:
    """The names in the user's own model; DDP puts one `module.` before all of them."""
    names = list(names)
    for wrapper in _WRAPPERS:
        names = [name.replace(wrapper, "") for name in names]
    by_ddp = all(name.startswith("module.") for name in names)
    return [name.removeprefix("module.") for name in names] if by_ddp else names


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

    A parameter's optimizer group is named by its `name`, else `group<i>`.
    """
    groups: dict[Parameter, str] = {}
    for index, group in enumerate(optimizer.param_groups if optimizer else ()):
        groups |= dict.fromkeys(group["params"], str(group.get("name", f"group{index}")))
    stepping = getattr(optimizer, "stepping", optimizer)
    kinds = tuple(c.__name__ for c in type(stepping).__mro__[:-1]) if optimizer else ()
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
    named = named_parameters if isinstance(named_parameters, Module) else list(named_parameters)
    facts = [facts_of(collect_parameters(named, opt), opt, {}) for opt in optimizers]
    return for_each(config, facts)
