"""Where a rank's part lies in a whole parameter: cut there, the whole gradient is the local one."""

import functools
import re

import pytest
import torch
from support.cuts import CELLS, build
from support.ranks import run_on_ranks

from gradclip import GradientClipper
from gradclip.errors import LayoutError
from gradclip.layouts import LocalLayout, region_of
from gradclip.layouts.local import local_part

REFUSED = {"FSDP1 flat", "FSDP1 NO_SHARD flat", "FSDP1 HYBRID_SHARD flat", "FSDP1 x TP"}
NAMES = [
    (name, world)
    for name, (_, _, worlds) in CELLS.items()
    for world in worlds
    if not {"EP", "PP", "partial", "sequence"} & set(re.findall(r"\w+", name))
]


def cut(rank, world, names):
    found = {}
    for name in names:
        cell = build(name, rank, world)
        GradientClipper({"policies": [{"type": "norm", "max_norm": 1.0}]}, cell.named)
        if name in REFUSED:
            with pytest.raises(LayoutError, match=r"use_orig_params=True|fully_shard"):
                [region_of(*named) for named in cell.named]
            found[name] = "refused"
            continue
        whole = cell.whole()
        held = 0
        for parameter, p in cell.named:
            place = region_of(parameter, p)
            part = place.of(whole[parameter])
            if p.grad is None:
                assert part.numel() == 0, (name, parameter)
                continue
            local = local_part(p.grad).double()
            assert torch.equal(part, local.view(part.shape)), (name, parameter)
            held += part.numel()
        found[name] = held
    return found


@functools.cache
def on(world):
    names = [name for name, ranks in NAMES if ranks == world]
    return run_on_ranks(cut, world, names)


@pytest.mark.parametrize(("name", "world"), NAMES, ids=lambda value: str(value))
def test_the_whole_cut_at_its_place_is_the_local_part(name, world):
    parts = [found[name] for found in on(world)]
    assert parts == ["refused"] * world or sum(parts) > 0


def test_a_plain_tensor_is_whole():
    p = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    place = LocalLayout({"p": p}).place("p", p)
    assert place.shape == (2, 3)
    assert torch.equal(place.of(p.detach()), p.detach())
