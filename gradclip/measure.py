"""Measure and reduce: from local gradients to norms that are equal on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradclip.plan.plan import Plan
from gradclip.types import Collected, Grads, Kernel, Layout, Measurable, Units

__all__ = [
    "Measured",
    "Source",
    "measure",
    "measure_each",
    "measure_recorded",
    "measure_step",
]

Norms = dict[float, Tensor]

Source = Grads | Units | Measurable | Tensor
"""What can be measured; a tensor was measured earlier: float64 (slots,), what a kernel gives."""


def measure(
    sources: Sequence[tuple[Source, Mapping[float, bool]]],
    layout: Layout,
    kernel: Kernel,
    flag: Tensor | None = None,
) -> tuple[list[dict[float, Tensor]], Tensor | None]:
    """The p-norm of each slot, for each p, over all ranks.

    Sums of powers are added over ranks in one message, and the root is taken after that. Maxima
    (p = inf) are a second message, which a wide p needs too: scaled by it, powers stay in range.

    Args:
        sources: What this rank adds to the norms (gradients, parameters, what element policies
            make of them), one list per slot or divided into units; and for each p whether it is
            wide (see `gradclip.norms.is_wide`). The same p and slots on every rank.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.
        flag: Float64 of shape (1,), 0 or 1, that travels in the same messages; None for none.

    Returns:
        For each source and p a float64 tensor of shape (its slots,) on the layout's first device,
        NaN or inf where an element is; and the flag, above 0 if it was on any rank.
    """
    device = layout.devices[0]
    norms: list[dict[float, Tensor]] = [{} for _ in sources]
    ranged = [i for i, (_, p) in enumerate(sources) if math.inf in p or any(p.values())]
    if ranged:
        local = [_peaks(sources[i][0], kernel).to(device) for i in ranged]
        peaks, flag = _reduced(layout.max, local, flag)
        for i, peak in zip(ranged, peaks, strict=True):
            norms[i][math.inf] = peak
    exponents = {i: _exponent(norms[i][math.inf]) for i in ranged}
    summed = [(i, p) for i, (_, types) in enumerate(sources) for p in types if p != math.inf]
    local = [
        _power_sums(
            sources[i][0], kernel, p, torch.exp2(-exponents[i]) if sources[i][1][p] else None
        ).to(device)
        for i, p in summed
    ]
    if local:
        sums, flag = _reduced(layout.sum, local, flag)
        for (i, p), total in zip(summed, sums, strict=True):
            root = total.sqrt() if p == 2.0 else total.pow(1.0 / p)
            norms[i][p] = root * torch.exp2(exponents[i]) if sources[i][1][p] else root
    asked = zip(sources, norms, strict=True)
    return [{p: found[p] for p in types} for (_, types), found in asked], flag


def _reduced(
    reduce: Callable[[Tensor], Tensor], values: Sequence[Tensor], flag: Tensor | None
) -> tuple[Sequence[Tensor], Tensor | None]:
    """Values over all ranks, and the flag that travels with them."""
    message = [*values] if flag is None else [*values, flag]
    if len(message) == 1:
        return [reduce(message[0])], None
    found = reduce(torch.cat(message)).split([len(part) for part in message])
    return (found, None) if flag is None else (found[:-1], found[-1])


def _peaks(source: Source, kernel: Kernel) -> Tensor:
    if isinstance(source, Tensor):
        return source
    return kernel.peaks(source) if isinstance(source, Sequence | Units) else source.peaks(kernel)


def _power_sums(source: Source, kernel: Kernel, norm_type: float, scale: Tensor | None) -> Tensor:
    if isinstance(source, Tensor):
        return source
    if isinstance(source, Sequence | Units):
        return kernel.power_sums(source, norm_type, scale)
    return source.power_sums(kernel, norm_type, scale)


def _exponent(peaks: Tensor) -> Tensor:
    """Powers of two that bring each peak to about 1; 0 where there is nothing to scale."""
    usable = torch.isfinite(peaks) & (peaks > 0)
    return torch.where(usable, peaks, 1.0).log2().floor().clamp(-1000, 1000)


class Measured(NamedTuple):
    """What is measured in one look.

    Attributes:
        norms: For each p the norms of the measured slots.
        probed: The norms of each probe, by index of its rule.
        weights: For each p the norms of the weights; None where no policy asks.
        has_gradient: Any rank holds a gradient; a 0-d bool where ranks hold parts.
        update: Float64 of shape (2,): the norms of the change that an earlier step made and of the
            parameters before it, 0 without such a step; None where nobody asks.
    """

    norms: Norms
    probed: dict[int, Tensor]
    weights: Norms | None
    has_gradient: Tensor | bool
    update: Tensor | None


def measure_step(
    plan: Plan,
    grads: Collected,
    probes: Mapping[int, Measurable],
    layout: Layout,
    kernel: Kernel,
    update: Tensor | None = None,
) -> Measured:
    """Norms of gradients, of what element policies make of them, and of weights.

    A gradient of zeros has the norm of none at all, so whether there is one is found out beside.

    Args:
        plan: Which norms are asked for.
        grads: This rank's gradients.
        probes: What element policies measure in place of gradients, by index of their rule.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.
        update: What was found after an earlier step (`gradclip.updates`), to be added up over ranks
            in the same message; on every rank or on none.
    """
    sources: list[tuple[Source, Mapping[float, bool]]] = [
        (_as_measured(plan, grads.counted), plan.norm_types),
        *((probe, plan.probe_types[index]) for index, probe in probes.items()),
    ]
    if plan.weight_types:
        weights = layout.weights(plan.slots).counted
        sources.append((_as_measured(plan, weights), plan.weight_types))
    if update is not None:
        sources.append((update, {2.0: False}))
    holds = any(grads.all)
    has_gradient: Tensor | bool = holds
    if layout.reduces:
        device = layout.devices[0]
        flag = torch.full((1,), float(holds), dtype=torch.float64, device=device)
        (norms, *more), found = measure(sources, layout, kernel, flag)
        assert found is not None
        has_gradient = found.squeeze(0) > 0
    else:  # every rank holds every gradient
        (norms, *more), _ = measure(sources, layout, kernel)
    probed = {i: more.pop(0)[p] for i, types in plan.probe_types.items() for p in types}
    weight_norms = more.pop(0) if plan.weight_types else None
    if update is not None:
        update = more.pop(0)[2.0]
    return Measured(norms, probed, weight_norms, has_gradient, update)


def measure_recorded(plan: Plan, grads: Collected, layout: Layout, kernel: Kernel) -> Tensor:
    """The recorded norm alone, of each measured slot or unit; arguments as for `measure_step`."""
    asked = {plan.recorded: plan.norm_types[plan.recorded]}
    [norms], _ = measure([(_as_measured(plan, grads.counted), asked)], layout, kernel)
    return norms[plan.recorded]


def measure_each(
    plan: Plan, layout: Layout, kernel: Kernel, grad_scale: Tensor | None = None
) -> Tensor:
    """The norm of each parameter, for the log. Reads all gradients once more.

    Ranks that share parameters exchange one more message.

    Args:
        plan: Which parameters, and the p that is recorded.
        layout: How measures combine over ranks.
        kernel: What measures this rank's tensors.
        grad_scale: 0-d factor that the gradients still carry.

    Returns:
        Float64 of shape (parameters,), without the factor.
    """
    assert plan.each is not None
    grads = layout.collect(list(plan.each.values())).counted
    asked = {plan.recorded: plan.norm_types[plan.recorded]}
    [norms], _ = measure([(grads, asked)], layout, kernel)
    found = norms[plan.recorded]
    return found if grad_scale is None else found / grad_scale


def _as_measured(plan: Plan, grads: Grads) -> Grads | Units:
    return grads if plan.unit_map is None else plan.unit_map.units(grads)
