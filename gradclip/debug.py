"""`debug: true`: what has to hold around a clipping step is measured; if it doesn't, an error."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradclip.drivers.scaler import Scalers
from gradclip.errors import ConfigError, DebugError
from gradclip.layouts.local import local_part
from gradclip.measure import combine, measure
from gradclip.policies import ElementPolicy
from gradclip.types import Verdict

if TYPE_CHECKING:
    from gradclip.clipper import GradientClipper

__all__ = ["Checks"]


class Checks:
    """Checks a clipper's steps, on the host, at two more reads of the gradients each.

    Args:
        clipper: Whose steps; nothing is done unless its configuration says `debug: true`.
        optimizer: Whose step follows, if one was given.

    Raises:
        ConfigError: If `debug` is true and a DeepSpeed engine makes the steps.
    """

    def __init__(self, clipper: GradientClipper, optimizer: Any | None) -> None:
        self._clipper: GradientClipper = weakref.proxy(clipper)  # which ends with its last user
        self._optimizer = optimizer
        self._is_on = clipper.config.debug
        if not self._is_on:
            return
        if clipper._zero is not None:
            msg = (
                "debug is true with a DeepSpeed engine, which keeps gradients to itself until its "
                "step and steps with copies of them; allowed: debug false. Set debug to false, or "
                "look for the fault on one process or under DDP or FSDP."
            )
            raise ConfigError(msg)
        self._scalers = Scalers()
        self._seen: dict[Tensor, tuple[TensorWeakRef, int]] = {}
        self._norms = torch.zeros(0)
        self._factor: Tensor | None = None
        self._folded: Verdict | None = None
        if isinstance(optimizer, Optimizer):
            known = weakref.ref(self)  # an optimizer may outlive its clipper

            def after_step(*_: object) -> None:
                if (checks := known()) is not None:
                    checks._after_step()

            optimizer.register_step_post_hook(torch.compiler.disable(after_step))

    def before(self, factor: Tensor | None, *, told: bool) -> None:
        """Check that gradients are new and unscaled, and measure them.

        Args:
            factor: 0-d, what they are said to be multiplied by.
            told: The caller knows of a loss scale.

        Raises:
            DebugError: If not.
        """
        if not self._is_on:
            return
        clipper = self._clipper
        clipper._now()
        self.refuse_stale()
        scale = clipper._loss_scale
        known = told or scale.is_live
        found = None if known else self._scalers.scale_of(self._optimizer)
        if found is not None:
            msg = (
                f"debug: clip: a GradScaler of this process multiplies losses by {found:g} and "
                "hasn't unscaled this optimizer's gradients; allowed: gradients whose scale the "
                "clipper knows. Build it with scaler=scaler, or call scaler.unscale_(optimizer) "
                "before clip(). If it scales another model's loss, set debug to false."
            )
            raise DebugError(msg)
        self._norms, self._factor, self._folded = self._measured(), factor, None

    def after(self, verdict: Verdict) -> None:
        """Check what was done to the gradients that `before` measured.

        Raises:
            DebugError: If a norm is above what was decided.
        """
        if not self._is_on:
            return
        skipped = verdict.skip is not None and bool(verdict.skip)
        if bool(verdict.finite) and not skipped:
            if self._clipper._on.effect.folds:
                self._folded = verdict  # gradients change in the step
            else:
                self._compare(verdict, self._factor, "gradients were written")
        self.remember()

    def refuse_stale(self) -> None:
        """Check that gradients were written to since the last step.

        Raises:
            DebugError: If one wasn't.
        """
        if not self._is_on:
            return
        held = self._clipper._on.plan.parameters
        stale = [name for name, p in held.items() if p.grad is not None and self._is_seen(p)]
        if stale:
            every = len(stale) == sum(p.grad is not None for p in held.values())
            more = f" and {len(stale) - 5} more" if len(stale) > 5 else ""
            found = "all gradients are" if every else f"the gradients of {stale[:5]}{more} are"
            msg = (
                f"debug: clip: {found} as the last clip or step left them, so a backward is "
                "missing, or zero_grad was left out and they would be used again; allowed: "
                "gradients written since. Call optimizer.zero_grad() after each step, a backward "
                "before clip(), and clip() once a step."
            )
            raise DebugError(msg)

    def remember(self) -> None:
        """What gradients are like now, to tell whether any is written to."""
        if self._is_on:
            self._seen = {
                p: (TensorWeakRef(p.grad), local_part(p.grad)._version)
                for p in self._clipper._on.plan.parameters.values()
                if p.grad is not None
            }

    def _is_seen(self, parameter: Tensor) -> bool:
        known, grad = self._seen.get(parameter), parameter.grad
        if known is None or grad is None:
            return False
        return known[0]() is grad and known[1] == local_part(grad)._version

    def _after_step(self) -> None:
        """A folded step leaves clipped gradients behind; others may leave anything."""
        verdict, self._folded = self._folded, None
        with torch.no_grad():
            if verdict is not None:
                if self._factor is not None:
                    self._norms = self._norms / self._factor
                self._compare(verdict, None, f"{type(self._optimizer).__name__} stepped")
            self.remember()

    def _measured(self) -> Tensor:
        on = self._clipper._on
        grads, norm_type = on.layout.collect(on.plan.slots), on.plan.recorded
        asked = {norm_type: on.plan.norm_types[norm_type]}
        (norms,) = measure([(on.plan.as_measured(grads.counted), asked)], on.layout, on.kernel)
        return norms[norm_type]

    def _compare(self, verdict: Verdict, factor: Tensor | None, done: str) -> None:
        """Each measured slot is at most its norm before times its coefficient, and the limit."""
        plan, norm_type = self._clipper._on.plan, self._clipper.norm_type
        policies = [rule.policy for rule in plan.rules]
        if any(isinstance(policy, ElementPolicy) and policy.alone for policy in policies):
            return  # what was carried over is added
        rough, floor = _tolerance(plan.parameters.values(), norm_type)
        after, bounds = self._measured(), self._norms * verdict.coef
        if factor is not None:
            after, bounds = after / factor, bounds / factor
        if bool((after > bounds * (1 + rough) + floor).any()):
            worst = int((after - bounds).argmax())
            whole = len(plan.slot_names) == 1
            name = "all gradients" if whole else f"{plan.slot_names[worst]!r}"
            _fail(
                name if plan.unit_map is None else "a unit",
                after[worst],
                bounds[worst],
                verdict,
                done,
            )
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
    return rough, tiny * sum(p.numel() for p in held) ** (1 / norm_type)


def _fail(name: str, found: Tensor, bound: Tensor, verdict: Verdict, done: str) -> None:
    msg = (
        f"debug: clip: the norm of {name} is {float(found):.9g} after {done}; allowed: at most "
        f"{float(bound):.9g}, by the limit {float(verdict.limit):.9g} and the coefficient "
        f"{float(verdict.coef.min()):.9g}. Something else writes these gradients (another hook, "
        "another clipping), or gradclip is at fault: compare with kernel='reference' and apply: "
        "in_place."
    )
    raise DebugError(msg)
