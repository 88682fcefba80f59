"""Attributes of other objects, replaced and put back: the one mechanism for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
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
            value: Its value until `undo`, which puts back the one before whatever it is by then.
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
                After `undo` it is called no more, also where somebody wrapped the replacement,
                which then stays in place and only passes on.
        """
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs) if self.is_on else method(*args, **kwargs)

        wrapper.replaced_by = self
        wrapper.before = vars(owner).get(name, _MISSING)
        setattr(owner, name, wrapper)

        def put_back() -> None:
            if vars(owner).get(name) is wrapper:
                _restore(owner, name, _alive(wrapper.before))

        self._stack.callback(put_back)

    def callback(self, undo: Callable[[], object]) -> None:
        """Call this too when all is undone."""
        self._stack.callback(undo)

    def undo(self) -> None:
        """Put everything back, the last first; twice is once."""
        self.is_on = False
        self._stack.close()


def _alive(value: Any) -> Any:
    """A replacement, or what stood below those that were undone while another one lay on them."""
    while not getattr(value, "replaced_by", _ON).is_on:
        value = value.before
    return value


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is not _MISSING:
        setattr(owner, name, before)
    elif name in vars(owner):
        delattr(owner, name)


_ON = Patches()
