"""Attributes of other objects, replaced and put back: the one mechanism for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

__all__ = ["Patches"]

_MISSING = object()


class Patches:
    """Attributes that are replaced until `undo`.

    Attributes:
        is_on: Whether they are replaced now.

    Example:
        >>> class Engine:
        ...     def step(self):
        ...         return "step"
        >>> engine, patches = Engine(), Patches()
        >>> patches.wrap(engine, "step", lambda step: "clip and " + step())
        >>> engine.step()
        'clip and step'
        >>> patches.undo()
        >>> engine.step()
        'step'
    """

    def __init__(self) -> None:
        self.is_on = True
        self._stack = ExitStack()

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Give an attribute another value.

        Args:
            owner: An instance, a class or a module.
            name: Of the attribute; it need not exist.
            value: Its value until `undo`, which puts back the one before, whatever it is by then.
        """
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._stack.callback(_restore, owner, name, before)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Run something around a method.

        Args:
            owner: An instance, or a class whose instances are all to be changed.
            name: Of the method.
            around: Called in its place with the method as it was, then the arguments of the call.
                After `undo` it is called no more. Where somebody else wrapped the replacement in
                the meantime, it stays in place and only passes on.
        """
        before = vars(owner).get(name, _MISSING)
        wrapper = _Wrapper(self, getattr(owner, name), around, before, name)
        setattr(owner, name, wrapper)

        def put_back() -> None:
            if vars(owner).get(name) is wrapper:
                _restore(owner, name, _alive(before))

        self._stack.callback(put_back)

    def hook(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, to be kept in somebody's list of hooks.

        After `undo`, and in a copy of its owner, it does nothing.
        """
        return _Wrapper(self, _do_nothing, partial(_call, call), _MISSING, "")

    def callback(self, undo: Callable[[], object]) -> None:
        """Call this too when all is undone."""
        self._stack.callback(undo)

    def undo(self) -> None:
        """Put everything back, the last first; twice is once."""
        self.is_on = False
        self._stack.close()


class _Wrapper:
    """Stands for a method; where its owner is copied or pickled, the copy has the method itself.

    Nothing that it holds of ours reaches a copy, which is what it would be without us.
    """

    # Not in `__dict__`, which `functools.wraps` copies: torch's schedulers wrap an optimizer's
    # step.
    __slots__ = ("__dict__", "__weakref__", "_around", "_method", "_name", "before", "patches")

    def __init__(
        self,
        patches: Patches,
        method: Callable[..., Any],
        around: Callable[..., Any],
        before: Any,
        name: str,
    ) -> None:
        functools.update_wrapper(self, method)
        self.patches, self.before, self._name = patches, before, name
        self._method, self._around = method, around
        patches.callback(self._let_go)

    def _let_go(self) -> None:
        """Hold nothing of ours any more, as it may stay in place or in a list for long."""
        self._around = _do_nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.patches.is_on:
            return self._around(self._method, *args, **kwargs)
        return self._method(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        is_bound = getattr(self._method, "__self__", None) is not None
        return self if instance is None or is_bound else MethodType(self, instance)

    @property
    def __func__(self) -> _Wrapper:
        """What torch's schedulers take out of an optimizer's `step`, and bind to it anew."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        owner = getattr(self._method, "__self__", None)
        if owner is not None and self.before is _MISSING:
            # By the name that it has there: a decorated method may call itself something else.
            return getattr, (owner, self._name)
        return _unwrapped, (self._method,)


def _do_nothing(*_: Any, **__: Any) -> None:
    """What copies have in the place of a hook."""


def _call(call: Callable[..., Any], _: object, *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _alive(value: Any) -> Any:
    """What stood below wrappers that were undone while another one lay on them."""
    while isinstance(value, _Wrapper) and not value.patches.is_on:
        value = value.before
    return value


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)
