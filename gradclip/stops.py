"""What withholds a step or stops the run, as far as the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gradclip.errors import ConfigError, NonFiniteError, SkipLimitError
from gradclip.layouts import mean_loss
from gradclip.plan.plan import Rule
from gradclip.policies import SkipNonfinite
from gradclip.policies.skip import SkipPolicy
from gradclip.types import Kernel, Layout, Verdict

__all__ = ["DeferredStop", "Losses", "is_withheld", "not_finite", "where_not_finite"]


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


class DeferredStop:
    """A policy's bound that was reached on the device, of which the host learns later.

    From then on every step is withheld, until the host looks, every so many steps, and raises.

    Args:
        every: Steps between two looks.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps = 0
        self.reached: Tensor | None = None
        self._odd: Tensor | None = None

    def look(self, verdict: Verdict, rules: Iterable[Rule]) -> None:
        """Take in a verdict; now and then look whether a bound was reached.

        Raises:
            NonFiniteError: If the bound is one on steps that aren't finite.
            SkipLimitError: If it is one on other steps.
        """
        if verdict.stop is None:
            return
        odd = verdict.stop & verdict.finite.logical_not()
        self.reached = verdict.stop if self.reached is None else self.reached | verdict.stop
        self._odd = odd if self._odd is None else self._odd | odd
        self._steps += 1
        if self._steps % self._every or not bool(self.reached):
            return
        reached, self.reached = self._odd, None
        self._odd = None
        when = f"clip: within the last {self._every} steps"
        if bool(reached):
            when += " gradients were NaN or infinite."
            raise _too_many_nonfinite(when, rules)
        when += " a norm or loss was beyond its bound"
        raise _too_many_skips(when, rules)


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
    finite = bool(verdict.finite)
    if raises and not finite:
        msg = f"{where()} on_nonfinite is 'raise'; 'skip' withholds such steps instead."
        raise NonFiniteError(msg)
    if verdict.stop is None or not bool(verdict.stop):
        return True
    if not finite:
        raise _too_many_nonfinite(where(), rules)
    beyond = f"clip: a step is beyond the bound {float(verdict.limit):.6g}, or its loss is"
    raise _too_many_skips(beyond, rules)


def _too_many_nonfinite(where: str, rules: Iterable[Rule]) -> NonFiniteError:
    who = _bounds(rule.policy for rule in rules if isinstance(rule.policy, SkipNonfinite))
    return NonFiniteError(
        f"{where} As many steps in a row as may be were withheld for that ({who}). Raise or "
        "remove max_consecutive, or look at data, learning rate and loss scale."
    )


def _too_many_skips(beyond: str, rules: Iterable[Rule]) -> SkipLimitError:
    policies = [rule.policy for rule in rules if isinstance(rule.policy, SkipPolicy)]
    who = _bounds(policy for policy in policies if policy.fallback == "raise")
    return SkipLimitError(
        f"{beyond}, and as many in a row as may be were withheld for that ({who}); gradients and "
        "state are unchanged. fallback is 'raise'; 'accept' or 'clip' takes such a step and starts "
        "anew from its level. Look at data and learning rate."
    )


def _bounds(policies: Iterable[SkipNonfinite | SkipPolicy]) -> str:
    return ", ".join(f"{p.type!r}: max_consecutive {p.max_consecutive}" for p in policies)


def where_not_finite(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> str:
    """Where gradients aren't finite, for an error."""
    bad = not_finite(parameters, layout, kernel)
    where = f"on this rank in {', '.join(bad[:5])}" if bad else "on another rank"
    if len(bad) > 5:
        where += f" and {len(bad) - 5} more"
    return f"clip: a gradient is NaN or infinite, {where}; gradients are unchanged."


def not_finite(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> list[str]:
    """Which parameters on this rank have a gradient that isn't finite; read on the host."""

    def is_finite(part: Tensor) -> bool:
        return not part.numel() or bool(kernel.peaks([[part]]).isfinite())

    return [name for name, p in parameters.items() if not all(map(is_finite, layout.held(p)))]
