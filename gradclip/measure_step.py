"""All that a step measures, in the messages of one measure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradclip.measure import Source, measure
from gradclip.scopes import Plan
from gradclip.types import Collected, Kernel, Layout, Measurable

__all__ = ["measure_each", "measure_step"]

Norms = dict[float, Tensor]


def measure_step(
    plan: Plan,
    grads: Collected,
    probes: Mapping[int, Measurable],
    layout: Layout,
    kernel: Kernel,
) -> tuple[Norms, dict[int, Tensor], Norms | None]:
    """Norms of gradients, of what element policies make of them, and of weights.

    Args:
        plan: What is asked for.
        grads: This rank's.
        probes: What element policies measure in place of gradients, by rule.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.

    Returns:
        For each p the norms of the measured slots; by rule those of its probe; for each p those
        of the weights, None where no policy asks.
    """
    sources: list[tuple[Source, Mapping[float, bool]]] = [
        (plan.cut_up(grads.counted), plan.norm_types),
        *((probe, plan.probe_types[index]) for index, probe in probes.items()),
    ]
    if plan.weight_types:
        weights = layout.weights(plan.slots).counted
        sources.append((plan.cut_up(weights), plan.weight_types))
    norms, *more = measure(sources, layout, kernel)
    probed = {i: more.pop(0)[p] for i, types in plan.probe_types.items() for p in types}
    return norms, probed, more[0] if more else None


def measure_each(
    plan: Plan, layout: Layout, kernel: Kernel, grad_scale: Tensor | None = None
) -> Tensor:
    """The recorded norm of each parameter; one more read, and message where ranks share them.

    Args:
        plan: Whose parameters to tell apart.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.
        grad_scale: 0-d factor that the gradients still carry.
    """
    assert plan.each is not None
    grads = layout.collect(list(plan.each.values())).counted
    [norms] = measure([(grads, {plan.recorded: plan.norm_types[plan.recorded]})], layout, kernel)
    found = norms[plan.recorded]
    return found if grad_scale is None else found / grad_scale
