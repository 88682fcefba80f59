"""The steps of an optimizer, as its hooks see them: each once, whoever calls whom."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch.nn import Module
from torch.optim import Optimizer

from gradclip.errors import ConfigError
from gradclip.patches import Patches
from gradclip.private import has_step_hooks, make_step_hooks_run, steps_under_way, unhooked
from gradclip.weak import weak

__all__ = [
    "claim_steps",
    "closure_place",
    "follow_steps",
    "follow_while_alive",
    "is_within_its_own",
]

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called with the optimizer whose step it is, and the step's arguments (the optimizer first)."""

Owner = TypeVar("Owner")

_claimed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def follow_steps(
    optimizer: Any, patches: Patches, *, before: Hook | None = None, after: Hook | None = None
) -> list[Any]:
    """Call something before and after each step of an optimizer, once a step.

    A step within a step is part of the outer one: where `step` calls `super().step()`, or a
    wrapper (SAM, Lookahead) steps the optimizer that it holds. A wrapper whose other methods step
    that optimizer (`second_step`) makes a step, too.

    Args:
        optimizer: Whose steps.
        patches: Whose `undo` ends it.
        before: Called before the step; may return other arguments for it, as a hook of torch's.
            The optimizer keeps it, so it isn't to keep the optimizer (`gradclip.weak`).
        after: Called after a step that didn't raise; kept likewise.

    Returns:
        The optimizers that have the hooks: this one, and one that it wraps.

    Raises:
        ConfigError: If no hook of torch's would run in its steps.
    """
    family = [one for one in _family(optimizer) if has_step_hooks(one)]
    if not family:
        msg = (
            f"{type(optimizer).__name__} runs no step hooks, by which gradclip would clip before "
            "each step: it is no torch.optim.Optimizer, or its __init__ doesn't call that one's; "
            "allowed: optimizers that do. Attach the optimizer that it steps, or call clip() "
            "before each step."
        )
        raise ConfigError(msg)
    for one in family:
        _make_hooks_run(one, patches)
    may_nest = len(family) > 1 or _calls_another_step(optimizer)
    known = WeakSet(family)

    def is_part_of_another() -> bool:
        if not may_nest:
            return False
        return sum(one in known for one in steps_under_way()) > 1

    def run_before(one: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if before is None or is_part_of_another() else before(one, args, kwargs)

    def run_after(one: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if after is not None and not is_part_of_another():
            after(one, args, kwargs)

    # Where the step is compiled, hooks stay outside of the graph.
    for one in family:
        if before is not None:
            hook = torch.compiler.disable(run_before)
            patches.callback(one.register_step_pre_hook(hook).remove)
        if after is not None:
            hook = torch.compiler.disable(run_after)
            patches.callback(one.register_step_post_hook(hook).remove)
    return family


def follow_while_alive(
    owner: Owner,
    optimizer: Any,
    *,
    before: Callable[[Owner], object] | None = None,
    after: Callable[[Owner], object] | None = None,
) -> None:
    """`follow_steps` for as long as something lives, which the optimizer may outlive.

    Args:
        owner: What `before` and `after` are called with; the hooks don't keep it alive.
        optimizer: Whose steps.
        before: Called before each step.
        after: Called after each step that didn't raise.

    Raises:
        ConfigError: As `follow_steps`.
    """
    known, patches = ref(owner), Patches()

    def hook(run: Callable[[Owner], object]) -> Hook:
        def call(*_: object) -> None:
            if (one := known()) is not None:
                run(one)

        return call

    first, last = (run and hook(run) for run in (before, after))
    follow_steps(optimizer, patches, before=first, after=last)
    finalize(owner, patches.undo)


def is_within_its_own(optimizer: Any) -> bool:
    """Whether a step that calls another `step` of the same optimizer is under way."""
    if not _calls_another_step(optimizer):
        return False
    return sum(one is optimizer for one in steps_under_way()) > 1


def claim_steps(optimizer: Any, patches: Patches, who: str) -> None:
    """Refuse a second one to clip an optimizer's steps, as each step would be clipped twice.

    Args:
        optimizer: Whose steps.
        patches: Whose `undo` gives them free again.
        who: Clips them, for the error that the second one gets.

    Raises:
        ConfigError: If somebody else clips them.
    """
    for one in _family(optimizer):
        if one in _claimed:
            msg = (
                f"The steps of this {type(one).__name__} are clipped already, by {_claimed[one]}, "
                "so they would be clipped and counted twice; allowed: one. Undo the first (call "
                "remove() of the handle that attach returned), leave the second out, or build "
                "the optimizer anew."
            )
            raise ConfigError(msg)
    for one in _family(optimizer):
        _claimed[one] = who
        patches.callback(partial(_give_free, weak(one)))


def _give_free(known: Callable[[], Any]) -> None:
    if (one := known()) is not None:
        _claimed.pop(one, None)


def closure_place(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | str | None:
    """Where a call of `step` has its closure.

    Args:
        step: The function, as its class has it.
        args: Of the call, the optimizer first.
        kwargs: Of the call.

    Returns:
        An index into `args`, or a key of `kwargs`; None without a closure.
    """
    for name, value in kwargs.items():
        if "closure" in name and callable(value):
            return name
    place = _closure_index(step) if len(args) > 1 else None
    if place is None or place >= len(args):
        return None
    return place if callable(args[place]) and not isinstance(args[place], Module) else None


@cache
def _closure_index(step: Callable[..., Any]) -> int | None:
    """Where a function takes a closure by position: by its name, else first of any arguments."""
    named = unnamed = None
    for index, parameter in enumerate(inspect.signature(step).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            unnamed = index
        elif parameter.kind is not parameter.KEYWORD_ONLY and "closure" in parameter.name:
            named = index
    return unnamed if named is None else named


def _family(optimizer: Any) -> list[Any]:
    """The optimizer, and those it holds that step all of its parameters."""
    stepped = _parameters(optimizer)
    found = [optimizer]
    for one in _held(optimizer, depth=2):
        if all(one is not known for known in found) and stepped <= _parameters(one):
            found.append(one)
    return found


def _held(owner: Any, depth: int) -> Iterator[Any]:
    """The optimizers in an object's attributes, and in lists there."""
    values = list(getattr(owner, "__dict__", {}).values())
    for value in values:
        if isinstance(value, list | tuple):
            values.extend(value[:100])
        elif isinstance(value, Optimizer):
            yield value
            if depth:
                yield from _held(value, depth - 1)


def _parameters(optimizer: Any) -> set[Any]:
    return {p for group in optimizer.param_groups for p in group["params"]}


def _calls_another_step(optimizer: Any) -> bool:
    """Whether a class that it is made from has a `step` of its own, beside torch's empty one."""
    classes = type(optimizer).__mro__
    own = {unhooked(vars(cls)["step"]) for cls in classes if "step" in vars(cls)}
    return len(own) > 2 or "step" in vars(optimizer)


def _make_hooks_run(optimizer: Optimizer, patches: Patches) -> None:
    """See to it that each call of `step` runs the optimizer's hooks."""
    make_step_hooks_run(optimizer)
    if "step" in vars(optimizer) and not getattr(optimizer.step, "hooked", False):
        # Somebody put a function in the method's place (a schedule does), which may go past the
        # class's one. If it doesn't, that is a step within this one.
        known = weak(optimizer)

        def run_hooks(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            run = Optimizer.profile_hook_step(lambda _, *given, **more: step(*given, **more))
            return run(known(), *args, **kwargs)

        patches.wrap(optimizer, "step", run_hooks)
