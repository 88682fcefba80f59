"""Attributes of other objects, replaced and put back: the one mechanism for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any
from weakref import ref

from gradclip.errors import ConfigError
from gradclip.weak import weak

__all__ = ["Patches"]

_MISSING = object()


class Patches:
    """Attributes that are replaced until `undo`.

    Neither this nor what is put in a method's place keeps the owner of an attribute alive.

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
        self._stack.callback(_put_back, weak(owner), name, before)

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
        wrapper = _Wrapper(getattr(owner, name), around, owner, before, name)
        setattr(owner, name, wrapper)
        self._stack.callback(_end, weak(owner), ref(wrapper))

    def hook(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, to be kept in somebody's list of hooks.

        After `undo`, and in a copy of its owner, it does nothing.
        """
        hook = _Wrapper(_do_nothing, partial(_call, call))
        self._stack.callback(_end, weak(None), ref(hook))
        return hook

    def callback(self, undo: Callable[[], object]) -> None:
        """Call this too when all is undone."""
        self._stack.callback(undo)

    def undo(self) -> None:
        """Put everything back, the last first; twice is once."""
        self.is_on = False
        self._stack.close()


class _Wrapper:
    """Stands for a method; in a deep copy of its owner it only passes on.

    Nothing that it holds of ours reaches a copy, which does what it would without us.

    Args:
        method: What it stands for.
        around: What is called in its place; None passes on.
        owner: Has it as an attribute; None for a hook, which somebody else keeps.
        before: What the owner had in the attribute.
        name: Of the attribute.
    """

    # Not in `__dict__`, which `functools.wraps` copies: torch's schedulers wrap an optimizer's
    # step.
    __slots__ = ("__dict__", "__weakref__", "_around", "_before", "_method", "_name", "_owner")

    def __init__(
        self,
        method: Callable[..., Any],
        around: Callable[..., Any] | None,
        owner: Any = None,
        before: Any = _MISSING,
        name: str = "",
    ) -> None:
        # As functools.wraps, but for `__wrapped__`, which would keep the owner alive.
        self.__dict__.update(getattr(method, "__dict__", {}))
        for known in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(method, known):
                setattr(self, known, getattr(method, known))
        self._around, self._method = around, method
        self._before, self._name = before, name
        self._owner: Callable[[], Any] | None = None
        if isinstance(method, MethodType) and method.__self__ is owner:
            self._method, self._owner = method.__func__, weak(owner)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method as it was.

        Raises:
            ConfigError: If its owner is gone.
        """
        if self._owner is None:
            return self._method
        if (owner := self._owner()) is None:
            msg = (
                f"{self._name} was called, and the object whose method it is is gone: the script "
                "kept the method alone, and gradclip, which stands in its place, keeps nothing "
                "alive; allowed: calls while the object is alive. Keep it in a variable, too."
            )
            raise ConfigError(msg)
        return MethodType(self._method, owner)

    def put_back(self, owner: Any) -> None:
        """Only pass on from now on, and give the owner back what it had, if this is still there.

        Args:
            owner: None if it is gone, or has no such attribute.
        """
        self._around = None  # it may stay in place or in a list for long
        if owner is not None and vars(owner).get(self._name) is self:
            _restore(owner, self._name, self.below())

    def below(self) -> Any:
        """What the owner had, without wrappers that were undone while this one lay on them."""
        value = self._before
        while isinstance(value, _Wrapper) and value._around is None:
            value = value._before
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method, around = self.__wrapped__, self._around
        return method(*args, **kwargs) if around is None else around(method, *args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        is_bound = self._owner is not None or hasattr(self._method, "__self__")
        return self if instance is None or is_bound else MethodType(self, instance)

    @property
    def __func__(self) -> _Wrapper:
        """What torch's schedulers take out of an optimizer's `step`, and bind to it anew."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        if not self._is_of_class:
            return copy.deepcopy(self.__wrapped__, memo)
        owner = copy.deepcopy(self.__wrapped__.__self__, memo)  # type: ignore[attr-defined]
        return _Wrapper(getattr(owner, self._name), None, owner, name=self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles, which can be loaded where gradclip isn't installed, if this is of a class.

        What is loaded then keeps itself alive by its own method, until the cycle collector runs.
        """
        if self._is_of_class:
            # By the name that it has there: a decorated method may call itself something else.
            return getattr, (self.__wrapped__.__self__, self._name)  # type: ignore[attr-defined]
        return _unwrapped, (self.__wrapped__,)

    @property
    def _is_of_class(self) -> bool:
        """Whether the owner would have the method without the attribute."""
        return self._owner is not None and self._before is _MISSING


def _do_nothing(*_: Any, **__: Any) -> None:
    """What copies have in the place of a hook."""


def _call(call: Callable[..., Any], _: object, *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _end(owner: Callable[[], Any], wrapper: Callable[[], _Wrapper | None]) -> None:
    if (one := wrapper()) is not None:
        one.put_back(owner())


def _put_back(owner: Callable[[], Any], name: str, value: Any) -> None:
    if (one := owner()) is not None:
        _restore(one, name, value)


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is not _MISSING:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)
