"""The same gradients under every layout: one process's answers, and the same bits on every rank."""

import re
from pathlib import Path

import pytest
import torch
from support.layouts import LAYOUTS, PLACES, build
from support.on_layout import faults, memory, norms, regions, units
from support.ranks import run_on_ranks

from gradclip.layouts import LocalLayout


def on_rank(rank, world, name):
    """What every check found; each of them compares with one process by itself."""
    built = build(name, rank, world)
    agreed = {
        "norms": norms.check(built, name),
        "units": units.check(built, name),
        "memory": memory.check(built, name),
        "faults": faults.check(built, name),
    }
    return agreed, regions.check(built, name)


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_every_layout_equals_one_process_on_every_rank(name, world):
    answers = run_on_ranks(on_rank, world, name, timeout=180)
    for check, found in answers[0][0].items():
        for agreed, _ in answers[1:]:
            assert repr(agreed[check]) == repr(found), check  # as text: a NaN equals itself there
    held = [region for _, region in answers]
    assert held in ([None] * world, ["refused"] * world) or sum(held) > 0


def test_the_table_in_the_documentation_is_what_was_counted():
    page = (Path(__file__).parents[2] / "docs/layouts.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d, ]+) \| (\d) \| (\d) \|$", page, re.MULTILINE)
    assert {name: (worlds, int(sums), int(partial)) for name, worlds, sums, partial in rows} == {
        name: (", ".join(map(str, layout.worlds)), layout.sums, layout.partial)
        for name, layout in LAYOUTS.items()
    }


def test_a_plain_tensor_is_whole():
    p = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    region = LocalLayout({"p": p}).region("p", p)
    assert region.shape == (2, 3)
    assert torch.equal(region.of(p.detach()), p.detach())
