"""FSDPStrategy, by norm, which Lightning itself refuses: precision, overflow, errors, resuming."""

import functools

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from support.lit import Logged, trainer_of
from support.lit_layouts import STRATEGIES, Plain, fsdp1, scaler_plugin
from support.ranks import run_on_ranks

from gradclip import ConfigError, NonFiniteError
from lightning_clip import GradientClip

NORM = {"policies": [{"type": "norm", "max_norm": 2.0}]}


class Watch(Callback):
    """Placed before the clipper: this rank's gradients, and the norm of all, by torch alone."""

    def __init__(self):
        self.norms, self.grads = [], []

    def on_before_optimizer_step(self, _trainer, _module, optimizer):
        held = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.grads = [grad.clone() for grad in held if grad is not None]
        total = torch.zeros((), dtype=torch.float64)
        for grad in self.grads:
            total += grad.double().square().sum()
        dist.all_reduce(total)
        self.norms.append(float(total.sqrt()))


def norms_of(metrics):
    return [float(step["clip/grad_norm"]) for step in metrics]


def in_bf16(rank, world):
    clip, watch, logged = GradientClip(NORM), Watch(), Logged()
    trainer = trainer_of(
        watch, clip, logged, strategy=fsdp1(), devices=world, precision="bf16-mixed"
    )
    trainer.fit(Plain(), range(8))
    return (
        watch.norms,
        norms_of(logged.metrics),
        [float(step["clip/clipped"]) for step in logged.metrics],
    )


def with_live_scaler(rank, world, *, fused=False):
    """A scale that overflows at first: withheld on every rank, and halved."""
    clip, watch, logged = GradientClip(NORM), Watch(), Logged()
    plugin = scaler_plugin(2.0**14)
    trainer = trainer_of(watch, clip, logged, strategy=fsdp1(), devices=world, plugins=[plugin])
    module = Plain()
    module.make_optimizer = functools.partial(module.make_optimizer, fused=fused)
    trainer.fit(module, range(8))
    skipped = [bool(step["clip/skipped"]) for step in logged.metrics]
    return watch.norms, norms_of(logged.metrics), skipped, plugin.scaler.get_scale()


def fused_with_live_scaler(rank, world):
    return with_live_scaler(rank, world, fused=True)


class Poison(Watch):
    """Puts a NaN into a gradient of one rank."""

    def on_before_optimizer_step(self, trainer, _module, optimizer):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            held = [p.grad for group in optimizer.param_groups for p in group["params"]]
            next(grad for grad in held if grad is not None)[0] = torch.nan
        super().on_before_optimizer_step(trainer, _module, optimizer)


def raising(rank, world):
    poison = Poison()
    clip = GradientClip(NORM | {"on_nonfinite": "raise"})
    trainer = trainer_of(poison, clip, strategy=fsdp1(), devices=world)
    with pytest.raises(NonFiniteError) as error:
        trainer.fit(Plain(), range(8))
    held = [p.grad for group in trainer.optimizers[0].param_groups for p in group["params"]]
    after = [grad for grad in held if grad is not None]
    pairs = zip(after, poison.grads, strict=True)
    same = [torch.equal(now.nan_to_num(7), old.nan_to_num(7)) for now, old in pairs]
    return str(error.value), trainer.global_step, same


class Stale(Plain):
    """An optimizer of parameters that FSDP doesn't hold."""

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def refused(rank, world):
    by_parameter = {"policies": [{"type": "norm", "max_norm": 2.0, "scope": "parameter"}]}
    named = NORM | {"groups": [{"match": "net.0.*", "policies": []}]}
    cases = [
        (by_parameter, Plain(), fsdp1(use_orig_params=False), {}),
        (NORM | {"log": {"per_parameter": True}}, Plain(), fsdp1(use_orig_params=False), {}),
        (named, Plain(), fsdp1(use_orig_params=False), {}),
        (NORM, Stale(), fsdp1(use_orig_params=False), {}),
        (NORM, Stale(), fsdp1(), {}),
        (NORM, Plain(), fsdp1(), {"gradient_clip_val": 1.0}),
    ]
    found = []
    for policy, module, strategy, options in cases:
        trainer = trainer_of(GradientClip(policy), strategy=strategy, devices=world, **options)
        with pytest.raises((ConfigError, ValueError)) as error:
            trainer.fit(module, range(2))
        found.append(f"{type(error.value).__name__}: {error.value}")
    return found


def accumulated(strategy, module, world):
    """Two batches a step."""
    clip, logged = GradientClip(NORM), Logged()
    trainer = trainer_of(clip, logged, strategy=strategy, devices=world, accumulate_grad_batches=2)
    trainer.fit(module, range(8))
    return norms_of(logged.metrics[1::2]), float(clip.clippers[0].state_dict()["counts"]["steps"])


def accumulating(rank, world):
    found = {}
    for name in ("ddp", "fsdp1", "fsdp2"):
        module, strategy, _ = STRATEGIES[name]
        found[name] = accumulated(strategy(), module(), world)
    return found


def every_case(rank, world):
    cases = (in_bf16, with_live_scaler, raising, refused, accumulating, fused_with_live_scaler)
    return [case(rank, world) for case in cases]


ranks = functools.cache(run_on_ranks)


def test_norms_in_bf16():
    for answer in ranks(every_case, 2):
        before, logged, clipped = answer[0]
        assert logged == pytest.approx(before, rel=1e-6)
        assert any(clipped)


def test_a_live_scaler():
    _, first, skipped, scale = ranks(every_case, 2)[0][1]
    assert any(skipped)
    assert not all(skipped)
    assert scale == 2.0 ** (14 - sum(skipped))
    for answer in ranks(every_case, 2):
        before, logged, *rest = answer[1]
        assert rest == [skipped, scale]
        assert logged == pytest.approx(first, rel=0, nan_ok=True)
        for norm, want, skip in zip(logged, before, skipped, strict=True):
            assert skip or norm == pytest.approx(want, rel=1e-6)


def test_a_live_scaler_and_a_fused_optimizer():
    for answer in ranks(every_case, 2):
        _, logged, *rest = answer[1]
        _, fused, *same = answer[5]
        assert same == rest
        for norm, want, skip in zip(fused, logged, rest[0], strict=True):
            assert skip or norm == pytest.approx(want, rel=1e-3)


def test_all_ranks_raise_and_gradients_keep_their_bits():
    answers = [answer[2] for answer in ranks(every_case, 2)]
    for message, steps, same in answers:
        assert "gradients are unchanged" in message
        assert steps == 2
        assert same
        assert all(same)
    assert "on another rank" in answers[0][0]
    assert "on this rank in net." in answers[1][0]


def test_what_cannot_work_says_the_way_out():
    for answer in ranks(every_case, 2):
        parameter, logged, named, flat, orig, trainer = answer[3]
        for message in (parameter, logged):
            assert message.startswith("ConfigError")
            assert "Wrap with use_orig_params=True" in message
        assert "groups[0].match is 'net.0.*' and matches no parameter" in named
        assert "self.trainer.model.parameters()" in flat
        assert orig.startswith("ConfigError: Optimizer 0 (SGD) holds no parameter of Stale")
        assert "self.parameters() in configure_optimizers" in orig
        assert "Trainer(gradient_clip_val=1.0) and GradientClip" in trainer


def test_accumulation_clips_once_per_step():
    norms, steps = accumulated("auto", Plain(), 1)
    assert steps == 4
    for answer in ranks(every_case, 2):
        for got, counted in answer[4].values():
            assert counted == steps
            assert got == pytest.approx(norms, rel=1e-5)


ADAPTIVE = {
    "policies": [{"type": "zclip", "scope": "parameter", "warmup_steps": 2, "max_norm": None}],
    "log": {"per_parameter": True},
}


def part(name, until, ckpt, save, world):
    """One stretch of a run, from a checkpoint to the next."""
    module, strategy, _ = STRATEGIES[name]
    logged = Logged()
    trainer = trainer_of(
        GradientClip(ADAPTIVE),
        logged,
        strategy=strategy(),
        devices=world,
        max_steps=until,
        max_epochs=-1,
    )
    trainer.fit(module(), range(8), ckpt_path=ckpt)
    trainer.save_checkpoint(save)
    return logged.metrics


def moving(rank, world, folder):
    """From DDP to FSDP1 and on, and to FSDP2."""
    start, middle = f"{folder}/ddp.ckpt", f"{folder}/fsdp1"
    first = part("ddp", 3, None, start, world)
    second = part("fsdp1", 5, start, middle, world)
    third = part("fsdp1", 8, middle, f"{folder}/last", world)
    return first + second + third, part("fsdp2", 5, start, f"{folder}/fsdp2.ckpt", world)


def alone(ckpt=None):
    logged = Logged()
    trainer = trainer_of(GradientClip(ADAPTIVE), logged, max_steps=8, max_epochs=-1)
    trainer.fit(Plain(), range(8), ckpt_path=ckpt)
    return logged.metrics


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_checkpoint_moves_between_strategies(tmp_path):
    want = alone()
    assert len({float(step["clip/limit"]) for step in want}) > 4
    answers = run_on_ranks(moving, 2, str(tmp_path))
    back = alone(tmp_path / "fsdp2.ckpt")
    for through_fsdp1, through_fsdp2 in answers:
        for metrics in (through_fsdp1, want[:3] + through_fsdp2 + back):
            for got, expected in zip(metrics, want, strict=True):
                assert got.keys() == expected.keys()
                for key, value in got.items():
                    torch.testing.assert_close(
                        value, expected[key], rtol=1e-5, atol=1e-6, equal_nan=True, msg=key
                    )
