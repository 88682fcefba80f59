"""References that keep nothing alive.

What is put on a user's object (a hook, a replaced method, an attribute) is held by that object. If
it held the object in turn, only the cycle collector would free the two, and until that runs a
model and its optimizer take up memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import ParamSpec, TypeVar
from weakref import WeakMethod, ref

__all__ = ["weak", "weakly"]

P = ParamSpec("P")
T = TypeVar("T")


def weak(value: T) -> Callable[[], T | None]:
    """What gives an object for as long as something else keeps it alive, and None afterwards.

    Args:
        value: The object. None, and what Python can't refer to weakly (slots), is held and always
            given.

    Returns:
        Called without arguments, gives the object or None.
    """
    try:
        return ref(value)
    except TypeError:
        return lambda: value


def weakly(method: Callable[P, T]) -> Callable[P, T | None]:
    """The same method, for somebody who isn't to keep its object alive.

    Args:
        method: Of an object; any other function is given back as it is.

    Returns:
        What calls the method; once its object is gone, it does nothing and returns None.
    """
    if not isinstance(method, MethodType):
        return method
    known = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        alive = known()
        return None if alive is None else alive(*args, **kwargs)

    return call
