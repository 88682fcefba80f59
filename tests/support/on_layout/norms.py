"""Every norm and scope on the same gradients: one process's norm, coefficient and result."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from gradclip import ClipByNorm
from support.comms import CountComms
from support.layouts import LAYOUTS, alone, bits, network

NORMS = (1.0, 2.0, 3.0, 9.0, math.inf)
LIMITS = {"global": 0.5, "group": 0.3, "parameter": 0.1}
MESSAGES = {9.0: 2}
"""A large p finds the scale it needs first."""


def oracle(whole, groups, scope, norm_type, limit):
    """One process, float64, formula by formula."""

    def slot_of(name):
        return {"global": 0, "group": name in groups, "parameter": name}[scope]

    slots = {}
    for name, grad in whole.items():
        slots.setdefault(slot_of(name), []).append(grad.reshape(-1))
    norms = {slot: torch.linalg.vector_norm(torch.cat(g), norm_type) for slot, g in slots.items()}
    coefs = {slot: min(1.0, limit / (float(n) + 1e-6)) for slot, n in norms.items()}
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())), norm_type)
    return total, min(coefs.values()), {n: g * coefs[slot_of(n)] for n, g in whole.items()}


def check(built, name):
    built.renew()
    whole = built.whole()
    for key, grad in alone().items() if set(whole) == set(alone()) else ():
        rough = "mixed" in name
        torch.testing.assert_close(whole[key], grad, rtol=1e-4, atol=3e-2 if rough else 1e-6)
    second = set(list(whole)[len(whole) // 2 :])
    groups = [
        {"params": params, "name": str(want)}
        for want in (False, True)
        if (params := [p for n, p in built.named if (n in second) == want])
    ]
    layout, found = LAYOUTS[name], {}
    for norm_type, scope in itertools.product(NORMS, LIMITS):
        if scope == "parameter" and name.endswith("flat"):
            continue
        case = norm_type, scope
        limit = LIMITS[scope] * (20 if norm_type == 1 else 1)
        policy = ClipByNorm(max_norm=limit, norm_type=norm_type, scope=scope)
        clipper = built.clipper(policy, torch.optim.SGD(groups))
        for comms in (CountComms(), CountComms()):  # the first step also agrees on a few things
            built.renew()
            with comms:
                record = clipper.clip()
        after = built.whole()
        if dist.get_rank() == 0:
            total, coef, clipped = oracle(whole, second, scope, norm_type, limit)
            for key, want in clipped.items():
                tolerance = 8e-3 if "mixed" in name else 1e-6
                # Parts that cancel out leave the rounding of the largest.
                near = 1e-6 * float(want.abs().max())
                torch.testing.assert_close(after[key], want, rtol=tolerance, atol=near)
            assert float(record.grad_norm) == pytest.approx(float(total), rel=1e-6), case
            assert float(record.coef) == pytest.approx(coef, rel=1e-6), case
            assert bool(record.clipped) == (coef < 1), case
        sent = layout.partial + layout.sums * MESSAGES.get(norm_type, 1)
        assert len(comms.messages) == sent, case
        metrics = {key: float(value) for key, value in record.as_metrics().items()}
        found[case] = metrics, bits(after)
    assert any(metrics["clip/clipped"] for metrics, _ in found.values())
    return found | {"update": update(built, name, is_whole=set(whole) == set(alone()))}


def update(built, name, *, is_whole):
    """SGD moves parameters by its rate times the clipped norm; no message of its own says so."""
    optimizer = torch.optim.SGD([p for _, p in built.named], lr=8.0)
    config = {"policies": [ClipByNorm(max_norm=0.5)], "log": {"update_norm_every": 1}}
    clipper = built.clipper(config, optimizer)
    values = [p.detach().clone() for _, p in built.named]
    for comms in (CountComms(), CountComms()):
        built.renew()
        with comms:
            record = clipper.clip()
        optimizer.step()
        with torch.no_grad():
            for (_, p), value in zip(built.named, values, strict=True):
                p.copy_(value)
    assert len(comms.messages) == LAYOUTS[name].partial + LAYOUTS[name].sums
    metrics, rough = clipper.flush(), 2e-2 if "mixed" in name else 1e-5
    moved, ratio = metrics["clip/update_norm"], metrics["clip/update_ratio"]
    assert moved == pytest.approx(8.0 * float(record.clipped_norm), rel=rough)
    if is_whole:
        weights = torch.nn.utils.parameters_to_vector(network().parameters()).norm()
        assert moved / ratio == pytest.approx(float(weights), rel=rough)
    return moved, ratio
