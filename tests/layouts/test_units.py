"""Rows have one norm and one coefficient, however ranks have cut them."""

import functools

import pytest
import torch
import torch.distributed as dist
from support.comms import CountComms
from support.cuts import CELLS, build, copied, network
from support.ranks import run_on_ranks

from gradclip import AGC, ClipByNorm, ClipByRMS, GradientClipper, LayoutError

POLICIES = {
    "norm": [ClipByNorm(max_norm=0.02, scope="unit")],
    "agc": [AGC(clip_factor=0.02, exclude=["2.*"]), ClipByNorm(max_norm=0.2)],
}
REFUSED = {"FSDP1 x TP": "fully_shard over tensor", "EP": "an expert", "EP, named group": "expert"}
PLACES = [
    (name, world)
    for name, (_, _, worlds) in CELLS.items()
    for world in worlds
    if not name.endswith("flat")
]


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


def cell(rank, world, name):
    built = build(name, rank, world)
    if name in REFUSED:
        with pytest.raises(LayoutError, match=REFUSED[name]):
            GradientClipper(POLICIES["norm"], built.named, **built.options)
        return "refused"
    shapes = shapes_of(built.named) if name.startswith("PP") else {}
    weights = dict(network().named_parameters())
    before = [(p, copied(p.grad)) for _, p in built.named]
    found = {}
    for key, policies in POLICIES.items():
        if key == "agc" and set(built.whole()) != set(weights):
            continue
        for p, grad in before:
            p.grad = copied(grad)
        clipper = GradientClipper(policies, built.named, **built.options)
        with CountComms():
            clipper.clip()
        for p, grad in before:
            p.grad = copied(grad)
        whole = {n: g.view(shapes.get(n, g.shape)) for n, g in built.whole().items()}
        with CountComms() as comms:
            record = clipper.clip()
        wanted = oracle(key, whole, weights)
        for parameter, got in built.whole().items():
            want = wanted[parameter].view_as(got)
            tolerance = 8e-3 if "mixed" in name else 1e-6
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12)
        norm = torch.cat([g.reshape(-1) for g in wanted.values()]).norm()
        assert float(record.clipped_norm) == pytest.approx(float(norm), rel=1e-6)
        assert bool(record.clipped)
        assert len(comms.messages) == built.sums + built.partial
        found[key] = {key: value.clone() for key, value in record.as_metrics().items()}
    return found


ranks = functools.cache(run_on_ranks)


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_units_under_every_layout(name, world):
    answers = ranks(cell, world, name)
    first = answers[0]
    assert first == "refused" or "norm" in first
    for found in answers[1:]:
        assert found == first


def test_cells_with_a_whole_network_check_agc_too():
    assert set(ranks(cell, 2, "FSDP1")[0]) == set(ranks(cell, 2, "TP")[0]) == {"norm", "agc"}


def rms(rank, world):
    """The limit on the norm of all, which says how many elements were counted."""
    names = [name for name in CELLS if name in WHOLE and world in CELLS[name][2]]
    return {
        name: float(
            GradientClipper(ClipByRMS(max_rms=0.1, scope="global"), build(name, rank, world).named)
            .clip()
            .limit
        )
        for name in names
    }


WHOLE = ("DDP", "FSDP1", "FSDP1 flat", "FSDP1 HYBRID_SHARD flat", "FSDP2", "HSDP", "TP")


@pytest.mark.parametrize("world", [2, 4])
def test_every_element_is_counted_once_and_no_padding(world):
    elements = sum(p.numel() for p in network().parameters())
    for found in ranks(rms, world):
        for name, limit in found.items():
            assert limit == pytest.approx(0.1 * elements**0.5, rel=1e-12), name
