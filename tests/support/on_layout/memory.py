"""Element policies and what they remember of each element: one process's, saved and loaded too."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gradclip import GradientClipper, LayoutError, Spam, SpikeMax, UClip
from support.comms import CountComms
from support.layouts import LAYOUTS, bits, copied, network

POLICIES = {
    "spam": Spam(theta=1.5, warmup_steps=2),
    "spike_max": SpikeMax(decay=0.8),
    "uclip": UClip(limit=0.02),
    "uclip_norm": UClip(limit=0.3, kind="norm"),
}
MESSAGES = {"spam": 2, "spike_max": 2, "uclip": 2, "uclip_norm": 1}
UNSAVED = {
    **dict.fromkeys(["EP", "EP, named group"], "an expert"),
    "FSDP1 x TP": "fully_shard over tensor",
    **dict.fromkeys(["FSDP1 flat", "FSDP1 NO_SHARD flat", "FSDP1 HYBRID_SHARD flat"], "FlatParam"),
}
STEPS, SAVED = 7, 4
SIZES = (1.0, 0.5, 0.7, 1.0, 0.6, 6.0, 0.9)


def moved(grad, step, linear):
    """A gradient of another step: each element for itself, so that sharding doesn't matter."""
    if grad is None:
        return None
    grad = copied(grad)
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    local.mul_(SIZES[step] if linear else SIZES[step] * torch.cos(step + 40 * local))
    return grad


class Run:
    """The same steps on this rank's part and, on the first rank, whole in one process."""

    def __init__(self, built, name, policy, messages):
        self.built, self.name, self.messages = built, name, messages
        self.linear = LAYOUTS[name].partial > 0
        built.renew()
        self.clipper = built.clipper(policy)
        found = [None] * dist.get_world_size()
        mine = {n: (tuple(p.shape), p.dtype) for n, p in built.named}
        dist.all_gather_object(found, mine)
        facts = {n: fact for one in found for n, fact in one.items()}
        self.whole = built.whole()
        self.rough = {n for n, (_, dtype) in facts.items() if dtype != torch.float32}
        known = {n: p.shape for n, p in network().named_parameters()}  # FSDP1 flattens
        self.one = {}
        for n, grad in self.whole.items():
            shape, dtype = facts.get(n, (grad.shape, torch.float32))
            shape = known.get(n, shape)
            shape = shape if grad.numel() == torch.Size(shape).numel() else grad.shape
            self.one[n] = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.alone = GradientClipper(policy, self.one.items())

    def step(self, step):
        for (_, p), grad in zip(self.built.named, self.built.grads, strict=True):
            p.grad = moved(grad, step, self.linear)
        comms = CountComms()
        with comms if step == 1 else contextlib.nullcontext():
            record = self.clipper.clip()
        after = self.built.whole()
        if dist.get_rank() == 0:
            self.compare(step, record, after)
        if step == 1:
            layout = LAYOUTS[self.name]
            assert len(comms.messages) == layout.sums * self.messages + layout.partial
        return {k: float(v) for k, v in record.as_metrics().items()}, bits(after)

    def compare(self, step, record, after):
        for n, grad in self.whole.items():
            one = self.one[n]
            one.grad = moved(grad.to(one.dtype).view(one.shape), step, self.linear)
        want = self.alone.clip()
        for n, grad in after.items():
            expected = self.one[n].grad.double().view(grad.shape)
            tolerance = 1e-2 if n in self.rough else 1e-5
            torch.testing.assert_close(grad, expected, rtol=tolerance, atol=1e-7)
        assert record.clipped == want.clipped
        torch.testing.assert_close(record.grad_norm, want.grad_norm, rtol=1e-6, atol=0)

    def exchange(self, policy):
        """Save both, compare, and go on with new clippers that each load what the other saved."""
        state = self.clipper.state_dict()
        saved = [self.alone.state_dict()]
        dist.broadcast_object_list(saved)
        if dist.get_rank() == 0:
            saved_alike(state, saved[0], self.rough)
        if policy.saves and policy.memory:
            assert state["policies"][0]["elements"]
            self.clipper = self.built.clipper(policy)
            self.clipper.load_state_dict(saved[0])
            self.alone = GradientClipper(policy, self.one.items())
            self.alone.load_state_dict(state)


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
                built.clipper(policy)
            policy = policy.model_copy(update={"save": False})
        if not (key == "spike_max" and name.endswith("flat")):
            yield key, policy


def check(built, name):
    found = {}
    for key, policy in policies_of(name, built):
        run = Run(built, name, policy, MESSAGES[key])
        steps = [run.step(step) for step in range(SAVED)]
        run.exchange(policy)
        steps += [run.step(step) for step in range(SAVED, STEPS)]
        assert any(metrics["clip/clipped"] for metrics, _ in steps[2:]), key
        found[key] = steps
    assert len(found) >= 3
    return found
