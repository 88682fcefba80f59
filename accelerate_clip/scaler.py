"""One loss scale for several optimizers: updated when all have stepped, as torch asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch.amp.grad_scaler import GradScaler

from accelerate_clip.step import Clipped
from gradclip.adapters import Patches, weak

__all__ = ["SharedScaler"]


class SharedScaler:
    """Puts off the update of a `GradScaler` while clipped gradients wait for their step.

    Accelerate updates the scaler in the step of each optimizer. That changes the scale, and lets
    the scaler forget which gradients it has unscaled. One backward for several optimizers would
    then be unscaled twice, or by another scale than it was made with.

    Args:
        scaler: The accelerator's; None if losses aren't scaled.
        patches: End this.
    """

    def __init__(self, scaler: GradScaler | None, patches: Patches) -> None:
        # All of them keep this.
        self._scaler = weak(scaler)
        self._clipped: WeakSet[Clipped] = WeakSet()
        self._stepped: WeakSet[Clipped] = WeakSet()
        self._stepping: Clipped | None = None
        if scaler is not None:
            patches.callback(self.catch_up)
            patches.wrap(scaler, "update", self._update)

    def follow(self, clipped: Iterable[Clipped]) -> None:
        """These are prepared now."""
        self._clipped = WeakSet(clipped)

    @contextmanager
    def step(self, one: Clipped) -> Iterator[None]:
        """Around the step of a prepared optimizer."""
        if one in self._stepped:  # so those that were waited for are left out this time
            self.catch_up()
        self._stepping = one
        try:
            yield
        finally:
            self._stepping = None

    def catch_up(self) -> None:
        """Make the update that was put off, if there is one."""
        scaler = self._scaler()
        if scaler is not None and self._stepped:
            scaler.update()

    def _update(self, update: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        now = self._stepping
        if now is not None and any(one.awaits_step for one in self._clipped if one is not now):
            self._stepped.add(now)
        else:
            self._stepped.clear()
            update(*args, **kwargs)
