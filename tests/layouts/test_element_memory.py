"""Element policies and what they remember, however ranks have cut gradients: one process's."""

import functools

import pytest
import torch
import torch.distributed as dist
from support.comms import CountComms
from support.cuts import CELLS, build, copied, network
from support.ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from gradclip import GradientClipper, LayoutError, Spam, SpikeMax, UClip

POLICIES = {
    "spam": Spam(theta=1.5, warmup_steps=2),
    "spike_max": SpikeMax(decay=0.8),
    "uclip": UClip(limit=0.02),
    "uclip_norm": UClip(limit=0.3, kind="norm"),
}
MESSAGES = {"spam": 2, "spike_max": 2, "uclip": 2, "uclip_norm": 1}
SHARED = ("EP", "EP, named group")
UNSAVED = {
    **dict.fromkeys(SHARED, "an expert"),
    "FSDP1 x TP": "fully_shard over tensor",
    **dict.fromkeys(["FSDP1 flat", "FSDP1 NO_SHARD flat", "FSDP1 HYBRID_SHARD flat"], "FlatParam"),
}
PLACES = [(name, world) for name, (_, _, worlds) in CELLS.items() for world in worlds]
STEPS, SAVED = 7, 4
SIZES = (1.0, 0.5, 0.7, 1.0, 0.6, 6.0, 0.9)


def moved(grad, step, linear):
    """A gradient of another step: each element for itself, so that cutting doesn't matter."""
    if grad is None:
        return None
    grad = copied(grad)
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    local.mul_(SIZES[step] if linear else SIZES[step] * torch.cos(step + 40 * local))
    return grad


class Run:
    """The same steps on this rank's part and, whole, in one process."""

    def __init__(self, built, policy):
        self.built = built
        self.linear = built.partial > 0
        self.base = [(p, copied(p.grad)) for _, p in built.named]
        self.clipper = GradientClipper(policy, built.named, **built.options)
        found = [None] * dist.get_world_size()
        mine = {n: (tuple(p.shape), p.dtype) for n, p in built.named}
        dist.all_gather_object(found, mine)
        facts = {n: fact for one in found for n, fact in one.items()}
        whole = built.whole()
        self.rough = {n for n, (_, dtype) in facts.items() if dtype != torch.float32}
        known = {n: p.shape for n, p in network().named_parameters()}  # FSDP1 flattens
        self.one = {}
        for n, grad in whole.items():
            shape, dtype = facts.get(n, (grad.shape, torch.float32))
            shape = known.get(n, shape)
            shape = shape if grad.numel() == torch.Size(shape).numel() else grad.shape
            self.one[n] = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.alone = GradientClipper(policy, self.one.items())

    def step(self, step):
        for p, grad in self.base:
            p.grad = moved(grad, step, self.linear)
        for n, grad in self.built.whole().items():
            one = self.one[n]
            one.grad = None if grad is None else grad.to(one.dtype).view(one.shape)
        for p, grad in self.base:  # looking at them whole may have completed partial sums
            p.grad = moved(grad, step, self.linear)
        with CountComms() as comms:
            record = self.clipper.clip()
        want = self.alone.clip()
        for n, grad in self.built.whole().items():
            expected = self.one[n].grad.double().view(grad.shape)
            tolerance = 1e-2 if n in self.rough else 1e-5
            torch.testing.assert_close(grad, expected, rtol=tolerance, atol=1e-7)
        assert record.clipped == want.clipped
        torch.testing.assert_close(record.grad_norm, want.grad_norm, rtol=1e-6, atol=0)
        return {k: v.clone() for k, v in record.as_metrics().items()}, len(comms.messages)


def saved_alike(left, right, rough):
    left, right = (one["policies"][0].get("elements", {}) for one in (left, right))
    assert left.keys() == right.keys()
    for name, own in left.items():
        for key, value in own.items():
            tolerance = 2e-2 if name in rough else 1e-5
            torch.testing.assert_close(value, right[name][key], rtol=tolerance, atol=1e-7)


def policies_of(name, built):
    """Those that can be had there; what can't be saved is refused when built."""
    for key, policy in POLICIES.items():
        if name in UNSAVED and policy.saves:
            with pytest.raises(LayoutError, match=UNSAVED[name]):
                GradientClipper(policy, built.named, **built.options)
            policy = policy.model_copy(update={"save": False})
        if not (key == "spike_max" and name.endswith("flat")):
            yield key, policy


def cell(rank, world, name):
    built = build(name, rank, world)
    base = [(p, copied(p.grad)) for _, p in built.named]
    found = {}
    for key, policy in policies_of(name, built):
        for p, grad in base:
            p.grad = copied(grad)
        run = Run(built, policy)
        metrics = [run.step(step) for step in range(SAVED)]
        state, alone = run.clipper.state_dict(), run.alone.state_dict()
        saved_alike(state, alone, run.rough)
        if policy.saves and policy.memory:
            assert state["policies"][0]["elements"]
            run.clipper = GradientClipper(policy, built.named, **built.options)
            run.alone = GradientClipper(policy, run.one.items())
            run.clipper.load_state_dict(alone)
            run.alone.load_state_dict(state)
        metrics += [run.step(step) for step in range(SAVED, STEPS)]
        assert metrics[1][1] == built.sums * MESSAGES[key] + built.partial, key
        assert any(bool(one["clip/clipped"]) for one, _ in metrics[2:]), key
        found[key] = [repr(one) for one, _ in metrics]
    return found


ranks = functools.cache(run_on_ranks)


@pytest.mark.parametrize(("name", "world"), PLACES)
def test_elements_and_their_memory_are_one_processs(name, world):
    first, *others = ranks(cell, world, name)
    assert len(first) >= 3
    assert all(other == first for other in others)
