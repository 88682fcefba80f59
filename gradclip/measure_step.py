"""All that a step measures, in the messages of one measure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradclip.measure import Source, measure
from gradclip.scopes import Plan
from gradclip.types import Collected, Kernel, Layout, Measurable

__all__ = ["measure_step"]

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
