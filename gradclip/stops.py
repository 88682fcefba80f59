"""What withholds a step or stops the run, as far as the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradclip.errors import ConfigError, NonFiniteError, SkipLimitError
from gradclip.layouts import mean_loss
from gradclip.types import Kernel, Layout, Verdict

__all__ = ["WAY_OUT", "Losses", "is_withheld", "where_not_finite"]

WAY_OUT = "on_nonfinite is 'raise'; 'skip' withholds such steps instead."


class Losses:
    """The losses of the backward passes since the last step."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def observe(self, loss: Tensor | float) -> None:
        """Take one in, 0-d."""
        self._seen.append(torch.as_tensor(loss, dtype=torch.float64).detach())

    def mean(self, device: torch.device) -> Tensor:
        """Their mean, and over ranks, 0-d float64; begins anew.

        Raises:
            ConfigError: If no rank has one.
        """
        own = torch.stack(self._seen).mean() if self._seen else None
        self._seen = []
        found = mean_loss(own, device)
        if found is None:
            msg = (
                "clip: a policy watches the loss, and no rank has given one; call "
                "clipper.clip(loss=loss), or clipper.observe_loss(loss) after each backward, or "
                "set watch to 'norm'."
            )
            raise ConfigError(msg)
        return found


def is_withheld(verdict: Verdict, where: Callable[[], str]) -> bool:
    """Whether the step is withheld: the one host read, where something can withhold it.

    Args:
        verdict: What was decided.
        where: Tells where gradients aren't finite.

    Raises:
        NonFiniteError: If a policy is to stop at so many steps in a row that aren't finite.
        SkipLimitError: If one is to stop at so many withheld steps in a row.
    """
    if verdict.skip is None or not bool(verdict.skip):
        return False
    if verdict.stop is None or not bool(verdict.stop):
        return True
    if not bool(verdict.finite):
        msg = (
            f"{where()} So it was for the last max_consecutive steps of 'skip_nonfinite'. Raise or "
            "remove that bound, or look at data, learning rate and loss scale."
        )
        raise NonFiniteError(msg)
    msg = (
        "clip: steps were withheld max_consecutive times in a row, and the next is beyond the "
        "bound too; gradients are unchanged. fallback is 'raise'; 'accept' or 'clip' takes such a "
        "step and starts anew from its level. Look at data and learning rate."
    )
    raise SkipLimitError(msg)


def where_not_finite(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> str:
    """Which parameters on this rank have a gradient that isn't finite."""

    def is_finite(part: Tensor) -> bool:
        return not part.numel() or bool(kernel.peaks([[part]]).isfinite())

    bad = [name for name, p in parameters.items() if not all(map(is_finite, layout.held(p)))]
    where = f"on this rank in {', '.join(bad[:5])}" if bad else "on another rank"
    if len(bad) > 5:
        where += f" and {len(bad) - 5} more"
    return f"clip: a gradient is NaN or infinite, {where}; gradients are unchanged."
