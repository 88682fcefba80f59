"""`debug: true`: check before and after each step that gradients are fresh and within the limit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradclip.config import ClipConfig
from gradclip.core import Core, Sources
from gradclip.errors import ConfigError, DebugError
from gradclip.layouts.local import local_part
from gradclip.measure import measure_recorded
from gradclip.norms import combine
from gradclip.policies import ElementPolicy
from gradclip.private import writes
from gradclip.steps import follow_while_alive
from gradclip.types import Beginning, Given, Grads, Step, Verdict

__all__ = ["CheckedCore"]


class CheckedCore(Core):
    """A core that compares gradients before and after `write`, on the host.

    Costs two more reads of the gradients for each step.

    Args:
        config: As for `Core`.
        sources: As for `Core`.
        in_engine: A DeepSpeed engine makes the steps.

    Raises:
        ConfigError: If a DeepSpeed engine makes the steps, and as `Core`.
    """

    def __init__(self, config: ClipConfig, sources: Sources, *, in_engine: bool) -> None:
        if in_engine:
            msg = (
                "debug is true with a DeepSpeed engine, which keeps gradients to itself until its "
                "step and steps with copies of them; allowed: debug false. Set debug to false, or "
                "look for the fault on one process or under DDP or FSDP."
            )
            raise ConfigError(msg)
        super().__init__(config, sources)
        self._seen: dict[Tensor, tuple[TensorWeakRef, int]] = {}
        self._norms = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._folded: Step | None = None
        if isinstance(sources.optimizer, Optimizer):
            follow_while_alive(self, sources.optimizer, after=CheckedCore._after_step)

    def look(self, given: Given, since: Beginning | None = None) -> Step:
        """As `Core.look`, of gradients that are new.

        Raises:
            DebugError: If they aren't.
        """
        self.current()
        self.refuse_stale()
        self._norms, self._folded = self._measured(), None
        return super().look(given, since)

    def write(self, step: Step, grads: Grads | None = None) -> None:
        """As `Core.write`, and measure again.

        Raises:
            DebugError: If a norm is above what was decided.
        """
        super().write(step, grads)
        verdict = step.verdict
        skipped = verdict.skip is not None and bool(verdict.skip)
        if bool(verdict.finite) and not skipped:
            if self.machinery.effect.folds(in_step=step.given.in_step):
                self._folded = step  # gradients change in the step
            else:
                self._compare(verdict, step.given.grad_scale, "gradients were written")
        self._remember()

    def withhold(self, skip: Tensor | None, given: Given) -> None:
        """As `Core.withhold`."""
        super().withhold(skip, given)
        self._remember()

    def refuse_stale(self) -> None:
        """Check that gradients were written to since the last step.

        Raises:
            DebugError: If one wasn't.
        """
        held = {n: p for n, p in self.machinery.plan.parameters.items() if p.grad is not None}
        stale = [name for name, p in held.items() if self._is_seen(p)]
        if stale:
            which = "all gradients are"
            if len(stale) < len(held):
                more = f" and {len(stale) - 5} more" if len(stale) > 5 else ""
                which = f"the gradients of {stale[:5]}{more} are"
            msg = (
                f"debug: clip: {which} as the last clip or step left them, so a backward is "
                "missing, or zero_grad was left out and they would be used again; allowed: "
                "gradients written since. Call optimizer.zero_grad() after each step, a backward "
                "before clip(), and clip() once a step."
            )
            raise DebugError(msg)

    def _remember(self) -> None:
        """What gradients are like now, to tell whether any is written to."""
        self._seen = {
            p: (TensorWeakRef(p.grad), writes(local_part(p.grad)))
            for p in self.machinery.plan.parameters.values()
            if p.grad is not None
        }

    def _is_seen(self, parameter: Tensor) -> bool:
        known, grad = self._seen.get(parameter), parameter.grad
        if known is None or grad is None:
            return False
        return known[0]() is grad and known[1] == writes(local_part(grad))

    def _after_step(self) -> None:
        """A folded step leaves clipped gradients behind; others may leave anything."""
        step, self._folded = self._folded, None
        with torch.no_grad():
            if step is not None:
                if step.given.grad_scale is not None:
                    self._norms = self._norms / step.given.grad_scale
                self._compare(step.verdict, None, f"{self.sources.stepper} stepped")
            self._remember()

    def _measured(self) -> Tensor:
        on = self.machinery
        grads = on.layout.collect(on.plan.slots)
        return measure_recorded(on.plan, grads, on.layout, on.kernel)

    def _compare(self, verdict: Verdict, factor: Tensor | None, done: str) -> None:
        """Each measured slot is at most its norm before times its coefficient, and the limit."""
        plan = self.machinery.plan
        norm_type = plan.recorded
        policies = [rule.policy for rule in plan.rules]
        if any(isinstance(policy, ElementPolicy) and policy.alone for policy in policies):
            return  # what was carried over is added
        rough, floor = _tolerance(plan.parameters.values(), norm_type)
        after, bounds = self._measured(), self._norms * verdict.coef
        if factor is not None:
            after, bounds = after / factor, bounds / factor
        if bool((after > bounds * (1 + rough) + floor).any()):
            worst = int((after - bounds).argmax())
            name = "all gradients"
            if plan.unit_map is not None:
                name = "a unit"
            elif len(plan.slot_names) > 1:
                name = f"{plan.slot_names[worst]!r}"
            _fail(name, after[worst], bounds[worst], verdict, done)
        total, limit = combine(after, norm_type), verdict.limit
        whole = plan.split_by is None and not any(policy.withholds for policy in policies)
        if whole and bool(total > limit * (1 + rough) + floor):
            _fail("all gradients", total, limit, verdict, done)


def _tolerance(parameters: Iterable[Tensor], norm_type: float) -> tuple[float, float]:
    """By what rounding of each element may raise a norm: relative, and absolute."""
    held = list(parameters)
    kinds = [torch.finfo(dtype) for dtype in {p.dtype for p in held}]
    rough = max(1e-5, *(kind.eps for kind in kinds))
    tiny = max(kind.smallest_normal * kind.eps for kind in kinds)
    elements = sum(p.numel() for p in held if not is_lazy(p))
    return rough, tiny * elements ** (1 / norm_type)


def _fail(name: str, found: Tensor, bound: Tensor, verdict: Verdict, done: str) -> None:
    msg = (
        f"debug: clip: the norm of {name} is {float(found):.9g} after {done}; allowed: at most "
        f"{float(bound):.9g}, by the limit {float(verdict.limit):.9g} and the coefficient "
        f"{float(verdict.coef.min()):.9g}. Something else writes these gradients (another hook, "
        "another clipping), or gradclip is at fault: compare with kernel='reference' and apply: "
        "in_place."
    )
    raise DebugError(msg)
