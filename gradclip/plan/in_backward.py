"""Optimizers that use gradients inside backward, before a clip could see them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import CellType
from typing import Any

from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from gradclip.errors import ConfigError
from gradclip.private import comm_hooks, gradient_hooks, optimizers_in_backward, writes

__all__ = ["BackwardWatch", "refuse_marked", "refuse_taken"]

_logger = logging.getLogger("gradclip")

_WAY_OUT = (
    "Clipping needs every gradient before any is applied: step after backward, with one "
    "optimizer, after clip(); or leave these parameters out of what is clipped."
)


def refuse_marked(parameters: Mapping[str, Parameter]) -> None:
    """Refuse parameters that `torch.distributed.optim._apply_optimizer_in_backward` marked.

    Raises:
        ConfigError: If one is marked.
    """
    found = {
        name: f"{type(optimizer).__name__} of _apply_optimizer_in_backward"
        for name, parameter in parameters.items()
        for optimizer in optimizers_in_backward(parameter)
    }
    if found:
        raise ConfigError(_stepped(list(found), f"stepped by {next(iter(found.values()))}"))


def refuse_taken(
    parameters: Mapping[str, Parameter], optimizer: Any | None, model: Module | None
) -> None:
    """Refuse an optimizer that takes gradients while backward runs, and a model that steps then.

    Offloading optimizers copy each gradient to the host in a hook of their own, and step with the
    copies. DDP's `_register_fused_optim` steps in the hook that reduces gradients.

    Args:
        parameters: Those that are clipped, by name.
        optimizer: Their optimizer, if there is one.
        model: Their model, if it is known.

    Raises:
        ConfigError: If one does.
    """
    for name, parameter in parameters.items() if optimizer is not None else ():
        if any(_is_of(optimizer, hook) for hook in gradient_hooks(parameter)):
            who = type(optimizer).__name__
            msg = (
                f"{who} has a hook of its own on the gradient of {name!r}, by which it uses or "
                "copies gradients while backward runs, so that clipping them afterwards would "
                f"change nothing. Allowed: optimizers that read .grad in step(). {_WAY_OUT}"
            )
            raise ConfigError(msg)
    for hook in comm_hooks(model) if isinstance(model, DistributedDataParallel) else ():
        if "optim" in getattr(hook, "__qualname__", ""):
            raise ConfigError(_stepped(list(parameters), "stepped by DDP's _register_fused_optim"))


def _is_of(owner: Any, hook: Callable[..., Any]) -> bool:
    """Whether a hook is a method of an object, or a function made in one."""
    if getattr(hook, "__self__", None) is owner:
        return True
    cells = getattr(hook, "__closure__", None) or ()
    return any(cell != CellType() and cell.cell_contents is owner for cell in cells)


class BackwardWatch:
    """Sees that hooks stepped an optimizer in backward, in the steps before a first gradient.

    Such a parameter has a hook on its gradient, no gradient is left when `clip` looks, and it was
    written to since the clipper was built: torch counts the writes to each tensor. A hook that
    doesn't step (a logger's, a sharding framework's) leaves the gradient there.

    Args:
        parameters: Those that are clipped, by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._writes = {p: writes(p) for p in parameters.values()}

    def look(self, parameters: Mapping[str, Parameter]) -> bool:
        """Check the parameters that never had a gradient; the others are watched no more.

        Where others have one, a warning has to do: loading a checkpoint writes to parameters too,
        and a parameter may be unused.

        Args:
            parameters: Their names.

        Returns:
            Whether any is left to watch.

        Raises:
            ConfigError: If parameters were stepped in backward, and none has a gradient.
        """
        stepped: set[Parameter] = set()
        for p, before in list(self._writes.items()):
            if p.grad is not None:
                del self._writes[p]
            elif gradient_hooks(p) and writes(p) != before:
                stepped.add(p)
        if stepped:
            names = [name for name, p in parameters.items() if p in stepped]
            msg = _stepped(names, "written to, and its gradient dropped, by a hook")
            if not any(p.grad is not None for p in parameters.values()):
                raise ConfigError(msg)
            _logger.warning("%s", msg)
            self._writes.clear()  # said once
        return bool(self._writes)


def _stepped(names: list[str], how: str) -> str:
    shown = ", ".join(map(repr, names[:3]))
    more = "" if len(names) <= 3 else f" (and {len(names) - 3} more)"
    return (
        f"An optimizer steps inside backward: {shown}{more} is {how} as soon as its gradient is "
        f"accumulated, so that no gradient is left to clip. Allowed: hooks that don't step. "
        f"{_WAY_OUT}"
    )
