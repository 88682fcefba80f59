"""What withholds a step or stops the run, as far as the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from gradclip.errors import NonFiniteError, SkipLimitError
from gradclip.plan.plan import Rule
from gradclip.policies.skip import SkipNonfinite, SkipPolicy
from gradclip.types import Kernel, Layout, Verdict

__all__ = ["DeferredStop", "nonfinite_names", "refuse_stop", "shown", "where_nonfinite"]


class DeferredStop:
    """A policy's bound that was reached on the device, of which the host learns later.

    From then on every step is withheld, until the host checks, every so many steps, and raises.

    Args:
        every: Steps between two checks.

    Attributes:
        reached: 0-d bool, a bound was reached since the last check; None before the first step
            whose policies have one.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps = 0
        self.reached: Tensor | None = None
        self._nonfinite: Tensor | None = None

    def check(self, verdict: Verdict, rules: Iterable[Rule]) -> None:
        """Remember the verdict; every `every` steps, check on the host whether a bound was reached.

        Raises:
            NonFiniteError: If the bound is one on steps that aren't finite.
            SkipLimitError: If it is one on other steps.
        """
        if verdict.stop is None:
            return
        nonfinite = verdict.stop & verdict.finite.logical_not()
        self.reached = verdict.stop if self.reached is None else self.reached | verdict.stop
        self._nonfinite = nonfinite if self._nonfinite is None else self._nonfinite | nonfinite
        self._steps += 1
        if self._steps % self._every or not bool(self.reached):
            return
        by_nonfinite = bool(self._nonfinite)
        self.reached = self._nonfinite = None
        when = f"clip: within the last {self._every} steps"
        if by_nonfinite:
            when += " gradients were NaN or infinite."
            raise _too_many_nonfinite(when, rules)
        when += " a norm or loss was beyond its bound"
        raise _too_many_skips(when, rules)


def refuse_stop(
    verdict: Verdict, rules: Iterable[Rule], where: Callable[[], str], *, raises: bool
) -> None:
    """Raise if a step that isn't to be taken is to stop the run; read on the host.

    Args:
        verdict: What was decided: the step is withheld, or not finite.
        rules: What decided.
        where: Tells where gradients aren't finite.
        raises: Whether a step that isn't finite is an error.

    Raises:
        NonFiniteError: If the step isn't finite and that is an error, or was so too many times in
            a row for a policy.
        SkipLimitError: If a policy withheld as many steps in a row as it may.
    """
    finite = bool(verdict.finite)
    if raises and not finite:
        msg = f"{where()} on_nonfinite is 'raise'; 'skip' withholds such steps instead."
        raise NonFiniteError(msg)
    if verdict.stop is None or not bool(verdict.stop):
        return
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


def where_nonfinite(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> str:
    """Where gradients aren't finite, for an error."""
    names = nonfinite_names(parameters, layout, kernel)
    where = f"on this rank in {shown(names)}" if names else "on another rank"
    return f"clip: a gradient is NaN or infinite, {where}; gradients are unchanged."


def nonfinite_names(parameters: Mapping[str, Tensor], layout: Layout, kernel: Kernel) -> list[str]:
    """Which parameters on this rank have a gradient that isn't finite; read on the host."""

    def is_finite(part: Tensor) -> bool:
        return not part.numel() or bool(kernel.peaks([[part]]).isfinite())

    return [name for name, p in parameters.items() if not all(map(is_finite, layout.held(p)))]


def shown(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
