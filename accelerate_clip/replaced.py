"""Methods of an accelerator that are replaced, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Replaced"]


class Replaced:
    """Replaces methods of one object until `undo`.

    Args:
        owner: The object.

    Attributes:
        is_on: Whether they are replaced now.
    """

    def __init__(self, owner: object) -> None:
        self.is_on = True
        self._owner = owner
        self._undo: list[Callable[[], object]] = []

    def put(self, name: str, new: Callable[..., Any]) -> None:
        """Let this method of the owner's be another."""
        owner = self._owner
        old, was_own = getattr(owner, name), name in vars(owner)

        @functools.wraps(new)
        def new_or_old(*args: Any, **kwargs: Any) -> Any:
            # Whoever wrapped this one calls it still, once it's undone.
            return (new if self.is_on else old)(*args, **kwargs)

        def put_back() -> None:
            if vars(owner).get(name) is not new_or_old:
                return
            if was_own:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

        setattr(owner, name, new_or_old)
        self._undo.append(put_back)

    def also(self, undo: Callable[[], object]) -> None:
        """Call this too when all is undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back, the last first."""
        self.is_on = False
        while self._undo:
            self._undo.pop()()
