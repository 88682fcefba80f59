"""Optimizers that step inside backward, whose gradients are gone before a clip could see them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch.nn import Parameter

from gradclip.errors import ConfigError

__all__ = ["BackwardWatch", "refuse_marked"]

_logger = logging.getLogger("gradclip")

_WAY_OUT = (
    "Clipping needs every gradient before any is applied: step after backward, with one "
    "optimizer, after clip(); or leave these parameters out of what is clipped."
)


def refuse_marked(parameters: Mapping[str, Parameter]) -> None:
    """Refuse parameters that `torch.distributed.optim._apply_optimizer_in_backward` marked.

    It leaves the optimizers on each parameter, in an attribute read in torch 2.13.

    Raises:
        ConfigError: If one is marked.
    """
    found = {
        name: f"{type(optimizer).__name__} of _apply_optimizer_in_backward"
        for name, parameter in parameters.items()
        for optimizer in getattr(parameter, "_in_backward_optimizers", ())
    }
    if found:
        raise ConfigError(_stepped(list(found), f"stepped by {next(iter(found.values()))}"))


class BackwardWatch:
    """Sees that hooks stepped an optimizer in backward, in the steps before a first gradient.

    Such a parameter has a hook on its gradient, no gradient is left when `clip` looks, and it was
    written to since the clipper was built: torch counts the writes to each tensor. A hook that
    doesn't step (a logger's, a sharding framework's) leaves the gradient there.

    Args:
        parameters: Those that are clipped, by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._writes = {p: p._version for p in parameters.values()}

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
        for p, writes in list(self._writes.items()):
            if p.grad is not None:
                del self._writes[p]
            elif _has_hooks(p) and p._version != writes:
                stepped.add(p)
        if stepped:
            names = [name for name, p in parameters.items() if p in stepped]
            msg = _stepped(names, "written to, and its gradient dropped, by a hook")
            if not any(p.grad is not None for p in parameters.values()):
                raise ConfigError(msg)
            _logger.warning("%s", msg)
            self._writes.clear()  # said once
        return bool(self._writes)


def _has_hooks(parameter: Parameter) -> bool:
    """Whether a hook runs on its gradient: private attributes of tensors, read in torch 2.13."""
    return bool(parameter._post_accumulate_grad_hooks or parameter._backward_hooks)


def _stepped(names: list[str], how: str) -> str:
    shown = ", ".join(map(repr, names[:3]))
    more = "" if len(names) <= 3 else f" (and {len(names) - 3} more)"
    return (
        f"An optimizer steps inside backward: {shown}{more} is {how} as soon as its gradient is "
        f"accumulated, so that no gradient is left to clip. Allowed: hooks that don't step. "
        f"{_WAY_OUT}"
    )
