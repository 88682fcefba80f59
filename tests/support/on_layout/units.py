"""Rows have one norm and one coefficient, however they are sharded; each element counts once."""

import pytest
import torch
import torch.distributed as dist

from gradclip import AGC, ClipByNorm, ClipByRMS, LayoutError
from support.comms import CountComms
from support.layouts import LAYOUTS, bits, network

POLICIES = {
    "norm": [ClipByNorm(max_norm=0.02, scope="unit")],
    "agc": [AGC(clip_factor=0.02, exclude=["2.*"]), ClipByNorm(max_norm=0.2)],
}
REFUSED = {"FSDP1 x TP": "fully_shard over tensor", "EP": "an expert", "EP, named group": "expert"}
WHOLE = ("DDP", "FSDP1", "FSDP1 flat", "FSDP1 HYBRID_SHARD flat", "FSDP2", "HSDP", "TP")


def rows(grad):
    return grad.reshape(grad.shape[0], -1) if grad.ndim > 1 else grad.reshape(1, -1)


def oracle(policy, whole, weights):
    """One process, float64, row by row."""
    clipped = {}
    for name, grad in whole.items():
        norms = rows(grad).norm(dim=1)
        if policy == "norm":
            limit = torch.full_like(norms, 0.02)
            coef = torch.where(norms > limit, limit / (norms + 1e-6), 1.0)
        else:
            limit = 0.02 * rows(weights[name].double()).norm(dim=1).clamp(min=1e-3)
            coef = torch.where(norms > limit, limit / norms.clamp(min=1e-6), 1.0)
            coef = torch.ones_like(coef) if name.startswith("2.") else coef
        clipped[name] = (rows(grad) * coef.unsqueeze(1)).view_as(grad)
    if policy == "agc":
        total = torch.cat([g.reshape(-1) for g in clipped.values()]).norm()
        scale = min(1.0, 0.2 / (float(total) + 1e-6))
        clipped = {name: grad * scale for name, grad in clipped.items()}
    return clipped


def shapes_of(named):
    """Of parameters on every rank, by name; whole where ranks hold them whole."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: tuple(p.shape) for name, p in named})
    return {name: shape for one in found for name, shape in one.items()}


def check(built, name):
    if name in WHOLE:
        built.renew()
        policy = ClipByRMS(max_rms=0.1, scope="global")
        elements = sum(p.numel() for p in network().parameters())
        limit = float(built.clipper(policy).clip().limit)
        assert limit == pytest.approx(0.1 * elements**0.5, rel=1e-12)
    if name.endswith("flat"):
        return None
    if name in REFUSED:
        with pytest.raises(LayoutError, match=REFUSED[name]):
            built.clipper(POLICIES["norm"])
        return "refused"
    shapes = shapes_of(built.named) if name.startswith("PP") else {}
    weights = {n: p.detach() for n, p in network().named_parameters()}
    layout, found = LAYOUTS[name], {}
    for key, policies in POLICIES.items():
        if key == "agc" and set(built.whole()) != set(weights):
            continue
        built.renew()
        clipper = built.clipper(policies)
        clipper.clip()  # the first step also agrees on a few things
        built.renew()
        whole = {n: g.view(shapes.get(n, g.shape)) for n, g in built.whole().items()}
        with CountComms() as comms:
            record = clipper.clip()
        after = built.whole()
        if dist.get_rank() == 0:
            wanted = oracle(key, whole, weights)
            for parameter, got in after.items():
                want = wanted[parameter].view_as(got)
                tolerance = 8e-3 if "mixed" in name else 1e-6
                # Parts that cancel out leave the rounding of the largest.
                near = 1e-6 * float(want.abs().max())
                torch.testing.assert_close(got, want, rtol=tolerance, atol=near)
            norm = torch.cat([g.reshape(-1) for g in wanted.values()]).norm()
            assert float(record.clipped_norm) == pytest.approx(float(norm), rel=1e-6)
        assert bool(record.clipped)
        assert len(comms.messages) == layout.sums + layout.partial
        metrics = {key: float(value) for key, value in record.as_metrics().items()}
        found[key] = metrics, bits(after)
    assert "norm" in found
    assert "agc" in found or name not in ("FSDP1", "TP")  # a whole network has both
    return found
