"""Optimizers that step inside backward, whose gradients are gone before a clip could see them."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradclip.errors import ConfigError

__all__ = ["refuse_lost_gradients", "refuse_steps_in_backward"]

_WAY_OUT = (
    "Clipping needs every gradient before any is applied: step after backward, with one "
    "optimizer, after clip(); or leave these parameters out of what is clipped."
)


def refuse_steps_in_backward(parameters: Mapping[str, Parameter]) -> None:
    """Check that no parameter is stepped as soon as its gradient is accumulated.

    Told from what `torch.distributed.optim._apply_optimizer_in_backward` leaves on parameters,
    and from the code of their hooks: one that calls a method `step` steps an optimizer. Other
    hooks (a sharding framework's, a logger's) may stay.

    Raises:
        ConfigError: If one is.
    """
    found: dict[str, str] = {}
    told: dict[Any, bool] = {}
    for name, parameter in parameters.items():
        for optimizer in getattr(parameter, "_in_backward_optimizers", ()):
            found[name] = f"{type(optimizer).__name__} of _apply_optimizer_in_backward"
        for hook in _hooks(parameter):
            code = _code(hook)
            if code is not None and told.setdefault(code, _steps(code)):
                found[name] = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    if found:
        msg = (
            f"An optimizer steps inside backward: {_listed(list(found))} is stepped by "
            f"{next(iter(found.values()))} as soon as its gradient is accumulated, so that no "
            f"gradient is left to clip. Allowed: hooks that don't step. {_WAY_OUT}"
        )
        raise ConfigError(msg)


def refuse_lost_gradients(
    parameters: Mapping[str, Parameter], norms: Tensor, steps: Tensor
) -> None:
    """Explain why no rank has ever had a gradient, where hooks may have taken them.

    Without hooks a step without gradients is a step like any other, and nothing is read.

    Args:
        parameters: None of which has a gradient on this rank.
        norms: Of all ranks' gradients.
        steps: 0-d, those so far that had one.

    Raises:
        ConfigError: If a parameter has hooks that run in backward, whatever their code.
    """
    if not any(map(_hooks, parameters.values())) or bool(norms.any()) or bool(steps):
        return
    refuse_steps_in_backward(parameters)
    if hooked := [name for name, parameter in parameters.items() if _hooks(parameter)]:
        code = _code(_hooks(parameters[hooked[0]])[0])
        hook = "a hook" if code is None else f"the hook {code.co_name} ({code.co_filename})"
        msg = (
            f"clip: no parameter has had a gradient, on any rank, and {_listed(hooked)} has "
            f"{hook}, which runs in backward and may step an optimizer and drop the gradient. "
            f"{_WAY_OUT} If it doesn't step, call clip() only after a backward."
        )
        raise ConfigError(msg)


def _hooks(parameter: Parameter) -> list[Callable[..., Any]]:
    """Hooks on a parameter's gradient: a private attribute of tensors, read in torch 2.13."""
    kinds: list[Mapping[int, Callable[..., Any]] | None]
    kinds = [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return [hook for hooks in kinds for hook in (hooks or {}).values()]


def _code(hook: Callable[..., Any]) -> CodeType | None:
    """The code of a function, method, partial, decorated function or callable object."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = inspect.unwrap(getattr(hook, "__func__", hook))
    if not hasattr(hook, "__code__"):
        hook = getattr(type(hook).__call__, "__func__", type(hook).__call__)
    return getattr(hook, "__code__", None)


def _steps(code: CodeType) -> bool:
    """Whether a method `step` is called, here or in a function inside; reading one is no call."""
    return "step" in _called(code)


def _called(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        # Since 3.12 loading a method is a flag of loading an attribute.
        flagged = sys.version_info >= (3, 12) and instruction.opname == "LOAD_ATTR"
        if instruction.opname == "LOAD_METHOD" or (flagged and (instruction.arg or 0) & 1):
            yield str(instruction.argval)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _called(const)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} (and {len(names) - 3} more)"
