"""The losses of the backward passes since the last step, for policies that watch the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from gradclip.errors import ConfigError
from gradclip.layouts import mean_loss

__all__ = ["Losses"]


class Losses:
    """This rank's losses since the last step."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def observe(self, loss: Tensor | float) -> None:
        """Take one in."""
        if not isinstance(loss, Tensor):
            loss = torch.tensor(loss, dtype=torch.float64, device="cpu")
        self._seen.append(loss.detach())

    def forget(self) -> None:
        """Begin anew."""
        self._seen = []

    @property
    def any(self) -> bool:
        """Whether one was taken in since the last step."""
        return bool(self._seen)

    def mean(self, device: torch.device) -> Tensor:
        """Their mean, and over ranks, 0-d float64; begins anew.

        Args:
            device: Where decisions are made.

        Raises:
            ConfigError: If no rank has one, or one isn't a single number.
        """
        seen, self._seen = self._seen, []
        shapes = [tuple(loss.shape) for loss in seen if loss.numel() != 1]
        if shapes:
            msg = (
                f"clip: a loss has shape {shapes[0]}; allowed: one number, what backward is called "
                "on. Pass the mean over the batch."
            )
            raise ConfigError(msg)
        found = mean_loss(seen, device)
        if found is None:
            msg = (
                "clip: a policy watches the loss, and no rank has given one; call "
                "clipper.clip(loss=loss), or clipper.observe_loss(loss) after each backward, or "
                "set watch to 'norm'."
            )
            raise ConfigError(msg)
        return found
