"""Every way to train x every fault, on two ranks: what reaches the optimizer, and equal state."""

import contextlib
import functools
import gc
import tempfile
from pathlib import Path

import pytest
import torch
from support.nets import filled
from support.ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradclip import ConfigError, GradientClipper
from gradclip.testing import Fault, InjectedError, inject

STEPS = 6
AT = 3
CLIP = {
    "policies": [
        {"type": "zclip", "warmup_steps": 2, "max_norm": None},
        {"type": "norm", "max_norm": 0.5},
    ],
    "recorder": {},
    "log": {"every_n_steps": 1},
}
FAULTS = {
    "NaN on one rank": (Fault("nan", AT, rank=1),),
    "no gradient on one rank": (Fault("no_gradient", AT, rank=1),),
    "a hook raises": (Fault("backward", AT),),
    "the step raises": (Fault("step", AT),),
    "a full disk at a NaN": (Fault("record", 1, rank=0), Fault("nan", AT, rank=1)),
}


def net():
    return filled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), 1)


def rows(rank, number):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(2 * number + rank)) * 9


class Reached:
    """What each step of an Adam without memory was made with: its average is the gradient."""

    def __init__(self, optimizer, last_record):
        self.norms, self.wrong = [], []
        self.optimizer, self.last_record = optimizer, last_record
        optimizer.register_step_post_hook(self.look)

    def look(self, *_):
        record = self.last_record()
        grads = [s["exp_avg"].double() for s in self.optimizer.state.values()]
        norm = float(torch.stack([grad.norm() for grad in grads]).norm())
        if record.skipped:
            return
        self.norms.append(norm)
        if not abs(norm / float(record.clipped_norm) - 1) < 1e-5 or not norm <= 0.5 * (1 + 1e-5):
            self.wrong.append((len(self.norms), norm, float(record.clipped_norm)))


def memoryless(parameters):
    return torch.optim.Adam(parameters, lr=0.01, betas=(0.0, 0.0))


def end(model, clipper, reached, faults):
    state = clipper.state_dict()
    counts = {name: float(count) for name, count in state["counts"].items()}
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "states": [policy["state"] for policy in state["policies"]],
        "counts": counts,
        "norms": reached.norms,
        "wrong": reached.wrong,
        "happened": faults.happened,
    }


def plain(rank, planned, folder):
    own = net()
    model = DistributedDataParallel(own)
    optimizer = memoryless(model.parameters())
    clipper = GradientClipper(CLIP, own, optimizer)
    clipper.recorder.folder = Path(folder)
    clipper.attach(optimizer)
    reached = Reached(optimizer, lambda: clipper.last_record)
    with inject(optimizer, *planned) as faults:
        for number in range(STEPS):
            try:
                optimizer.zero_grad()
                model(rows(rank, number)).square().mean().backward()
                optimizer.step()
            except InjectedError:
                model = DistributedDataParallel(own)  # the one before waits for the rest
    return end(own, clipper, reached, faults)


def lightning(rank, planned, folder):
    from lightning.pytorch.strategies import DDPStrategy
    from support.lit import Small, trainer_of

    from lightning_clip import GradientClip

    module = Small(by_step=True)
    optimizer = memoryless(module.parameters())
    module.configure_optimizers = lambda: optimizer
    module.loss = lambda inputs: module.net(inputs * 9).square().mean()
    clip = GradientClip(CLIP)
    reached = Reached(optimizer, lambda: clip.last_record)

    def fit():
        trainer = trainer_of(clip, strategy=DDPStrategy(), devices=2, default_root_dir=folder)
        trainer.fit(module, range(STEPS))

    with inject(optimizer, *planned) as faults:
        try:
            fit()
        except InjectedError:
            fit()
    del rank
    return end(module, clip.clippers[0], reached, faults)


def accelerate(rank, planned, folder):
    from support.accelerate_cpu import joined

    import accelerate_clip

    accelerator = joined(project_dir=folder)
    clip = accelerate_clip.enable(accelerator, CLIP)
    own = net()
    optimizer = memoryless(own.parameters())
    model, prepared = accelerator.prepare(own, optimizer)
    reached = Reached(optimizer, lambda: clip.clippers[0].last_record)
    with inject(optimizer, *planned) as faults:
        for number in range(STEPS):
            try:
                prepared.zero_grad()
                accelerator.backward(model(rows(rank, number)).square().mean())
                prepared.step()
            except InjectedError:
                model = DistributedDataParallel(own)
    return end(own, clip.clippers[0], reached, faults)


def trainer(rank, planned, folder):
    from support.accelerate_cpu import fresh
    from support.trainers import trainer as trainer_on

    from accelerate_clip import GradientClipCallback

    fresh()
    callback = GradientClipCallback(CLIP)
    hugging = trainer_on(folder, 2, [callback], save_strategy="no", max_grad_norm=0)
    model = hugging.model
    optimizer = hugging.optimizer = memoryless(model.parameters())
    reached = Reached(optimizer, lambda: callback.clip.clippers[0].last_record)
    with inject(optimizer, *planned) as faults:
        with contextlib.suppress(InjectedError):
            hugging.train()
        if any(fault.kind in ("backward", "step") for fault in faults.happened):
            # A new one, once the old one's DDP is gone, which waits for the rest of a backward.
            make = functools.partial(type(hugging), model, hugging.args, callbacks=[callback])
            rows = hugging.train_dataset
            del hugging
            gc.collect()
            again = make(train_dataset=rows)
            again.optimizer = optimizer
            again.train()
    del rank
    return end(model, callback.clip.clippers[0], reached, faults)


PROGRAMS = {f.__name__: f for f in (plain, lightning, accelerate, trainer)}


def on_rank(rank, world, program):
    assert world == 2
    found = {}
    for name, planned in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = PROGRAMS[program](rank, planned, folder)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_whatever_fails_ranks_end_alike_and_each_step_was_clipped(program, subtests):
    answers = run_on_ranks(on_rank, 2, program, timeout=90)
    for name, planned in FAULTS.items():
        with subtests.test(name):
            first, second = (answer[name] for answer in answers)
            assert {*first["happened"], *second["happened"]} == {*planned}
            spoilt = any(fault.kind == "nan" for fault in planned)
            for one in (first, second):
                assert not one["wrong"]
                assert len(one["norms"]) >= STEPS - 1
                assert one["counts"]["nonfinite"] == one["counts"]["skipped"] == spoilt
                assert all(bool(p.isfinite().all()) for p in one["parameters"])
            assert first["norms"] == second["norms"]
            assert first["counts"] == second["counts"]
            assert all(map(torch.equal, first["parameters"], second["parameters"]))
            for one, other in zip(first["states"], second["states"], strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fault_that_cannot_happen_is_refused():
    optimizer = memoryless(net().parameters())
    for fault in (Fault("Nan", 1), Fault("nan", -1)):
        with pytest.raises(ConfigError, match="can't happen; allowed: one of the kinds nan, no_"):
            inject(optimizer, fault).__enter__()
    assert not optimizer._optimizer_step_pre_hooks


def one_dies(rank, world):
    """The other one is told by its process group, and doesn't wait for ever."""
    import torch.distributed as dist

    model = DistributedDataParallel(net())
    optimizer = memoryless(model.parameters())
    GradientClipper(CLIP, model, optimizer).attach(optimizer)
    dist.barrier()
    with inject(optimizer, Fault("dead", 1, rank=1)):
        for number in range(STEPS):
            optimizer.zero_grad()
            model(rows(rank, number)).square().mean().backward()
            optimizer.step()


def test_a_rank_that_dies_ends_the_run():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 stopped|rank 0 of 2 raised"):
        run_on_ranks(one_dies, 2, timeout=60, fresh=True)
