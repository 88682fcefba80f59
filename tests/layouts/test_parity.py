"""The same gradients, cut in any way: one norm, limit, coefficient and result, on every rank."""

import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from support.comms import CountComms
from support.cuts import CELLS, alone, build, copied
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, GradientClipper

NORMS = (1.0, 2.0, 3.0, 9.0, math.inf)
SCOPES = ("global", "group", "parameter")
PLACES = [(name, world) for name, (_, _, worlds) in CELLS.items() for world in worlds]
MESSAGES = {9.0: 2}
"""A large p finds the scale it needs first."""


LIMITS = {"global": 0.5, "group": 0.3, "parameter": 0.1}


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


def cell(rank, world, name):
    """Every norm and scope on the same gradients; per case the record, messages, coefficient."""
    built = build(name, rank, world)
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
    before = [(p, copied(p.grad)) for _, p in built.named]
    found = {}
    for norm_type, scope in itertools.product(NORMS, SCOPES):
        if scope == "parameter" and name.endswith("flat"):
            continue
        limit = LIMITS[scope] * (20 if norm_type == 1 else 1)
        policy = ClipByNorm(max_norm=limit, norm_type=norm_type, scope=scope)
        optimizer = torch.optim.SGD(groups)
        clipper = GradientClipper(policy, built.named, optimizer, **built.options)
        for comms in (CountComms(), CountComms()):  # the first step also agrees on a few things
            for p, grad in before:
                p.grad = copied(grad)
            with comms:
                record = clipper.clip()
        total, coef, clipped = oracle(whole, second, scope, norm_type, limit)
        after = built.whole()
        for key, want in clipped.items():
            tolerance = 8e-3 if "mixed" in name else 1e-6
            torch.testing.assert_close(after[key], want, rtol=tolerance, atol=1e-12)
        assert float(record.grad_norm) == pytest.approx(float(total), rel=1e-6)
        assert float(record.coef) == pytest.approx(coef, rel=1e-6)
        assert bool(record.clipped) == (coef < 1)
        metrics = {key: value.clone() for key, value in record.as_metrics().items()}
        found[norm_type, scope] = metrics, comms.messages, coef
    return found, (built.sums, built.partial)


ranks = functools.cache(run_on_ranks)


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_every_norm_and_scope_equals_one_process(name, world):
    answers = ranks(cell, world, name)
    first, (sums, partial) = answers[0]
    assert any(coef < 1 for _, _, coef in first.values())
    for found, _ in answers:
        for key, (metrics, messages, _) in found.items():
            for metric, value in metrics.items():
                torch.testing.assert_close(
                    value, first[key][0][metric], rtol=0, atol=0, equal_nan=True
                )
            wanted = partial + sums * MESSAGES.get(key[0], 1)
            assert len(messages) == wanted, key


def test_the_table_in_the_documentation_is_what_was_counted():
    page = (Path(__file__).parents[2] / "docs/layouts.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d, ]+) \| (\d) \| (\d) \|$", page, re.MULTILINE)
    assert {name: worlds for name, worlds, *_ in rows} == {
        name: ", ".join(map(str, worlds)) for name, (*_, worlds) in CELLS.items()
    }
    for name, worlds, *counts in rows:
        for world in worlds.split(", "):
            _, counted = ranks(cell, int(world), name)[0]
            assert list(map(int, counts)) == list(counted), name
