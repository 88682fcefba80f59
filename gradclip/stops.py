"""What withholds a step or stops the run, as far as the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gradclip.errors import ConfigError, NonFiniteError, SkipLimitError
from gradclip.layouts import mean_loss
from gradclip.policies import Rule, SkipNonfinite
from gradclip.policies.skip import SkipPolicy
from gradclip.types import Kernel, Layout, Verdict

__all__ = ["Losses", "is_withheld", "where_not_finite"]


class Losses:
    """The losses of the backward passes since the last step."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def observe(self, loss: Tensor | float) -> None:
        """Take one in."""
        self._seen.append(torch.as_tensor(loss).detach())

    def forget(self) -> None:
        """Begin anew."""
        self._seen = []

    @property
    def any(self) -> bool:
        """Whether one was taken in since the last step."""
        return bool(self._seen)

    def mean(self, device: torch.device) -> Tensor:
        """Their mean, and over ranks, 0-d float64; begins anew.

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


def is_withheld(
    verdict: Verdict, rules: Iterable[Rule], where: Callable[[], str], *, raises: bool
) -> bool:
    """Whether the step is withheld: the one host read, where something can withhold it.

    Args:
        verdict: What was decided.
        rules: What decided.
        where: Tells where gradients aren't finite.
        raises: Whether a step that isn't finite is an error.

    Raises:
        NonFiniteError: If the step isn't finite and that is an error, or was so too many times in
            a row for a policy.
        SkipLimitError: If a policy withheld as many steps in a row as it may.
    """
    odd = verdict.skip
    if raises:
        bad = verdict.finite.logical_not()
        odd = bad if odd is None else odd | bad
    if odd is None or not bool(odd):
        return False
    policies = [rule.policy for rule in rules]
    finite = bool(verdict.finite)
    if raises and not finite:
        msg = f"{where()} on_nonfinite is 'raise'; 'skip' withholds such steps instead."
        raise NonFiniteError(msg)
    if verdict.stop is None or not bool(verdict.stop):
        return True
    if not finite:
        who = _bounds(p for p in policies if isinstance(p, SkipNonfinite))
        msg = (
            f"{where()} As many steps in a row as may be were withheld for that ({who}). Raise or "
            "remove max_consecutive, or look at data, learning rate and loss scale."
        )
        raise NonFiniteError(msg)
    who = _bounds(p for p in policies if isinstance(p, SkipPolicy) and p.fallback == "raise")
    msg = (
        f"clip: a step is beyond the bound {float(verdict.limit):.6g}, or its loss is, and as many "
        f"in a row as may be were withheld for that ({who}); gradients and state are unchanged. "
        "fallback is 'raise'; 'accept' or 'clip' takes such a step and starts anew from its "
        "level. Look at data and learning rate."
    )
    raise SkipLimitError(msg)


def _bounds(policies: Iterable[SkipNonfinite | SkipPolicy]) -> str:
    return ", ".join(f"{p.type!r}: max_consecutive {p.max_consecutive}" for p in policies)


def where_not_finite(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> str:
    """Which parameters on this rank have a gradient that isn't finite."""

    def is_finite(part: Tensor) -> bool:
        return not part.numel() or bool(kernel.peaks([[part]]).isfinite())

    bad = [name for name, p in parameters.items() if not all(map(is_finite, layout.held(p)))]
    where = f"on this rank in {', '.join(bad[:5])}" if bad else "on another rank"
    if len(bad) > 5:
        where += f" and {len(bad) - 5} more"
    return f"clip: a gradient is NaN or infinite, {where}; gradients are unchanged."
