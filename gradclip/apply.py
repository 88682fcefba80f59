"""Effect: scale in place, change elements, or withhold the step."""

from __future__ import annotations

from torch import Tensor

from gradclip.memory import ElementMemory
from gradclip.scopes import Plan
from gradclip.types import Grads, Kernel, Verdict

__all__ = ["apply"]


def apply(
    verdict: Verdict,
    grads: Grads,
    plan: Plan,
    kernel: Kernel,
    memory: ElementMemory,
    grad_scale: Tensor | None = None,
) -> None:
    """Carry out a verdict on this rank's gradients.

    A step is withheld by dropping the gradients (`.grad = None`): every torch optimizer then
    leaves parameters and state, weight decay included, as they are.

    Args:
        verdict: The decision, equal on every rank.
        grads: All local gradients, one list per slot of the plan.
        plan: Whose gradients to drop, and how they are cut into what has coefficients.
        kernel: What writes this rank's gradients.
        memory: What changes elements and remembers them.
        grad_scale: 0-d factor that the gradients still carry.
    """
    if verdict.withheld:
        for parameter in plan.parameters.values():
            parameter.grad = None
        return
    kernel.scale_(plan.cut_up(grads), verdict.coef)
    for edit in verdict.edits:
        memory.edit_(edit, grads, kernel, grad_scale)
