"""Several real ranks: the norms, limits and gradients of one process holding everything."""

import functools
import shutil
import tempfile

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support.lit import After, Before, Small, adamw, trainer_of
from support.ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard

from gradclip import ZClip
from lightning_clip import GradientClip

POLICY = ZClip(warmup_steps=5, max_norm=None)


class Sharded(Small):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


def outcome(clip, before, after):
    """What a rank saw, as plain numbers and whole tensors."""
    return {
        "norms": [float(record.grad_norm) for record in after.records],
        "limits": after.limits,
        "before": before.norms,
        "left": after.grads,
        "steps": clip.state_dict()["clippers"][0]["counts"]["steps"],
    }


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def train(kind, world, optimizer=adamw, **options):
    clip, before = GradientClip(POLICY), Before()
    after = After(clip)
    after.on_train_batch_end = lambda *_: None
    strategy = {
        "one": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    }[kind]()
    trainer = trainer_of(before, clip, after, strategy=strategy, devices=world, **options)
    module = (Sharded if kind == "fsdp2" else Small)(optimizer, by_step=True)
    return trainer, module, clip, (clip, before, after)


def fitted(world, kind, precision="32-true"):
    trainer, module, _, seen = train(kind, world, precision=precision)
    trainer.fit(module, range(20))
    assert trainer.world_size == world
    return outcome(*seen)


def on_rank(rank, world, folder):
    return {
        "ddp": fitted(world, "ddp"),
        "fsdp2": fitted(world, "fsdp2"),
        "bf16": fitted(world, "fsdp2", "bf16-true"),
        "scaled": scaled(world),
        "resumed": resume_sharded(world, folder),
    }


@functools.cache
def answers():
    folder = tempfile.mkdtemp()
    try:
        return run_on_ranks(on_rank, 2, folder, timeout=150)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_are_one_process(kind):
    ranks = [answer[kind] for answer in answers()]
    alone = fitted(1, "one")

    assert min(alone["limits"]) < float("inf")
    assert max(n / li for n, li in zip(alone["norms"], alone["limits"], strict=True)) > 1
    for key in ("norms", "limits"):
        assert ranks[0][key] == ranks[1][key]
        assert ranks[0][key] == pytest.approx(alone[key], rel=1e-6)
    assert ranks[0]["norms"] == pytest.approx(ranks[0]["before"], rel=1e-6)
    for ours, theirs, want in zip(ranks[0]["left"], ranks[1]["left"], alone["left"], strict=True):
        for got, other, expected in zip(ours, theirs, want, strict=True):
            assert torch.equal(got, other)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_two_sharded_ranks_in_bf16():
    ranks = [answer["bf16"] for answer in answers()]
    assert ranks[0]["limits"] == ranks[1]["limits"]
    assert min(ranks[0]["limits"]) < float("inf")
    assert ranks[0]["norms"] == pytest.approx(ranks[0]["before"], rel=1e-6)


def scaled(world):
    """Ordinary and fused, from a scale that overflows at first."""
    found = []
    for optimizer in (adamw, fused):
        live = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=live)
        trainer, module, _, seen = train("fsdp2", world, optimizer, plugins=[plugin])
        trainer.fit(module, range(20))
        _, before, after = seen
        norms = [float(record.grad_norm) for record in after.records]
        skipped = [bool(record.skipped) for record in after.records]
        found.append((norms, skipped, live.get_scale(), before.norms))
    return found


def test_sharded_ranks_withhold_an_overflow_together():
    ordinary, in_step = zip(*(answer["scaled"] for answer in answers()), strict=True)
    for (norms, skipped, scale, _), other in (ordinary, in_step):
        assert any(skipped)
        assert (skipped, scale) == other[1:3]
        assert norms == pytest.approx(other[0], rel=0, nan_ok=True)
        assert scale == 2.0 ** (24 - sum(skipped))
    norms, skipped, _, before = ordinary[0]
    for norm, want, skip in zip(norms, before, skipped, strict=True):
        assert skip or norm == pytest.approx(want, rel=1e-6)
    assert in_step[0][1] == skipped
    for norm, want, skip in zip(in_step[0][0], norms, skipped, strict=True):
        assert skip or norm == pytest.approx(want, rel=1e-3)


def resume_sharded(world, folder):
    trainer, module, _, (_, _, whole) = train("fsdp2", world)
    trainer.fit(module, range(20))

    trainer, module, _, _ = train("fsdp2", world, max_steps=8, max_epochs=-1)
    trainer.fit(module, range(20))
    trainer.save_checkpoint(f"{folder}/at.ckpt")

    trainer, module, clip, (_, _, after) = train("fsdp2", world, max_steps=20, max_epochs=-1)
    trainer.fit(module, range(20), ckpt_path=f"{folder}/at.ckpt")
    return whole.limits, after.limits, clip.state_dict()["steps"]


def test_a_sharded_run_resumes_with_its_state():
    for whole, resumed, steps in (answer["resumed"] for answer in answers()):
        assert resumed == whole[8:]
        assert steps == [20]
