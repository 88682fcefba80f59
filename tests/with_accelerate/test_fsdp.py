"""FSDP and what users do with it: a part of the parameters, accumulation, errors, checkpoints."""

import functools
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from support.accelerate_cpu import fresh
from support.accelerate_layouts import LAYOUTS, prepare, rows_of, share
from support.nets import parallel_net
from support.ranks import run_on_ranks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

import accelerate_clip
from gradclip import ConfigError, NonFiniteError

NORM = {"policies": [{"type": "norm", "max_norm": 2.0}]}
ADAPTIVE = {"policies": [{"type": "zclip", "scope": "parameter", "warmup_steps": 2}]}


def make(name, **options):
    fresh()
    return Accelerator(cpu=True, **options) if name == "alone" else LAYOUTS[name][0](**options)


def half_frozen():
    net = parallel_net()
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def subset(name, scaled):
    """The trained parameters alone, under a loss scale that must be taken off exactly once."""
    accelerator = make(name, mixed_precision="fp16" if scaled else "no")
    if scaled:
        accelerator.native_amp = True
        accelerator.scaler = ShardedGradScaler(device="cpu", init_scale=64.0)
    clip, net, optimizer = prepare(accelerator, NORM, half_frozen())
    norms = []
    for step in range(4):
        accelerator.backward(net(share(accelerator, rows_of(step))).float().square().mean())
        trained = (p for p in net.parameters() if p.requires_grad)
        norms.append(accelerator.clip_grad_norm_(trained, 2.0).clone())
        optimizer.step()
        optimizer.zero_grad()
    return norms, float(clip.last_record.clipped_norm)


def two_models(name):
    """Same shapes, one clipped alone: lists of parameters are told apart by identity."""
    accelerator = make(name)
    accelerate_clip.enable(accelerator, NORM)
    nets = [accelerator.prepare(parallel_net(seed)) for seed in (0, 1)]
    first, second = (torch.optim.SGD(net.parameters(), lr=0.05) for net in nets)
    first, second = accelerator.prepare(first, second)
    rows = share(accelerator, rows_of(0))
    accelerator.backward(sum(net(rows).square().mean() for net in nets))
    norms = [accelerator.clip_grad_norm_(nets[0].parameters(), 2.0).clone()]
    first.step()
    return [*norms, accelerator.clip_grad_norm_(nets[1].parameters(), 2.0).clone()]


def raising(name):
    """A NaN on one rank: every rank raises, and every gradient keeps its bits."""
    accelerator = make(name)
    _, net, optimizer = prepare(accelerator, NORM | {"on_nonfinite": "raise"})
    accelerator.backward(net(share(accelerator, rows_of(0))).square().mean())
    held = [p.grad for p in net.parameters() if p.grad is not None]
    grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in held]
    if accelerator.process_index == 1:
        next(grad for grad in grads if grad.numel()).view(-1)[0] = torch.nan
    before = [grad.clone() for grad in grads]
    with pytest.raises(NonFiniteError) as error:
        accelerator.clip_grad_norm_(net.parameters(), 2.0)
    with pytest.raises(NonFiniteError):
        optimizer.step()
    pairs = zip(grads, before, strict=True)
    same = all(torch.equal(grad.nan_to_num(7.0), old.nan_to_num(7.0)) for grad, old in pairs)
    return str(error.value), same


def accumulating(name, each):
    """Two batches a step; the norms returned in between, and those of the steps."""
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=each)
    accelerator = make(name, gradient_accumulation_plugin=plugin)
    clip, net, optimizer = prepare(accelerator, NORM)
    between, steps = [], []
    for step in range(6):
        with accelerator.accumulate(net):
            accelerator.backward(net(share(accelerator, rows_of(step))).square().mean())
            norm = accelerator.clip_grad_norm_(net.parameters(), 2.0)
            (steps if accelerator.sync_gradients else between).append(float(norm))
            optimizer.step()
            optimizer.zero_grad()
    assert clip.steps[0] == 3
    return between, steps


def taken_over(name, state):
    """Clip state saved by one process, loaded here; names and bits as they were."""
    clip, *_ = prepare(make(name), ADAPTIVE)
    clip.load_state_dict(state)
    return clip.state_dict()


def trained_alone():
    accelerator = make("alone")
    clip, net, optimizer = prepare(accelerator, ADAPTIVE)
    for step in range(4):
        accelerator.backward(net(rows_of(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return clip.state_dict()


def built_too_early():
    """An optimizer of the model's own parameters, which flat ones are about to replace."""
    accelerator = make("fsdp1 flat")
    accelerate_clip.enable(accelerator, NORM)
    net = parallel_net()
    with pytest.raises(ConfigError) as error:
        accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    return str(error.value)


def before_its_model():
    """An optimizer prepared before its model is wrapped: FSDP1 shards what the clipper holds."""
    accelerator = make("fsdp1")
    accelerate_clip.enable(accelerator, NORM)
    net = parallel_net()
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1))
    net = accelerator.prepare(net)
    accelerator.backward(net(share(accelerator, rows_of(0))).square().mean())
    norm = accelerator.clip_grad_norm_(net.parameters(), 2.0)
    optimizer.step()
    return [norm]


def on_rank(rank, world, name, state):
    return {
        "subset": subset(name, scaled=False),
        "scaled": subset(name, scaled=True) if name == "fsdp1" else None,
        "two": two_models(name) if name != "fsdp2" else None,
        "raising": raising(name) if name != "ddp" else None,
        "accumulating": accumulating(name, each=False),
        "each": accumulating(name, each=True),
        "state": taken_over(name, state),
        "early": built_too_early() if name == "fsdp1" else None,
        "before": before_its_model() if name == "fsdp1" else None,
    }


NAMES = ("ddp", "fsdp1", "fsdp2")


@functools.cache
def alone():
    return {
        "subset": subset("alone", scaled=False),
        "two": two_models("alone"),
        "accumulating": accumulating("alone", each=False),
        "state": trained_alone(),
    }


def answers(name, case):
    """What one process says, and what every rank does."""
    return alone().get(case), [found[case] for found in every_case(name)]


@functools.cache
def every_case(name):
    return run_on_ranks(on_rank, 2, name, alone()["state"])


def assert_norms(answers, want, rel=1e-6):
    for norms in answers:
        assert [float(n) for n in norms] == [float(n) for n in answers[0]]
        assert [float(n) for n in norms] == pytest.approx([float(n) for n in want], rel=rel)


def test_a_frozen_backbone():
    for name in NAMES:
        (want, _), found = answers(name, "subset")
        assert_norms([norms for norms, _ in found], want)
        assert all(clipped == pytest.approx(2.0) for _, clipped in found)


def test_a_frozen_backbone_under_a_live_scaler():
    """A second unscaling would be an error of torch, none a norm 64 times as large."""
    _, found = answers("fsdp1", "scaled")
    assert_norms([norms for norms, _ in found], alone()["subset"][0], rel=2e-2)
    assert all(clipped == pytest.approx(2.0) for _, clipped in found)


def test_two_models_of_the_same_shapes():
    for name in ("ddp", "fsdp1"):
        want, found = answers(name, "two")
        assert want[0] != want[1]
        assert_norms(found, want)


def test_all_ranks_raise_and_gradients_keep_their_bits():
    for name in ("fsdp1", "fsdp2"):
        _, found = answers(name, "raising")
        assert all(same for _, same in found)
        assert "on another rank" in found[0][0]
        assert "on this rank in 0.weight" in found[1][0]


def test_accumulation_clips_once_per_step():
    for name in NAMES:
        (_, want), found = answers(name, "accumulating")
        assert_norms([steps for _, steps in found], want)
        between = [norms for norms, _ in found]
        if name == "fsdp2":
            assert all(math.isnan(norm) for norms in between for norm in norms)
        else:  # each process's own: what it holds isn't reduced yet
            own = [found["accumulating"][0] for found in every_case("ddp")]
            assert between == [pytest.approx(norms) for norms in own]
            assert own[0] != own[1]


def test_accumulation_that_reduces_each_batch():
    for name in NAMES:
        between, want = alone()["accumulating"]
        _, found = answers(name, "each")
        assert_norms([steps for _, steps in found], want)
        assert_norms([norms for norms, _ in found], between)


def test_an_optimizer_built_too_early_is_refused():
    for message in answers("fsdp1", "early")[1]:
        assert "SGD holds no parameter of a prepared model" in message
        assert "Prepare the model first" in message


def test_an_optimizer_prepared_before_its_model():
    assert_norms(answers("fsdp1", "before")[1], alone()["two"][:1])


def test_state_of_one_process_is_taken_over():
    for name in NAMES:
        want, found = answers(name, "state")
        [saved] = want["clippers"][0]["policies"]
        assert saved["slots"] == [name for name, _ in parallel_net().named_parameters()]
        for state in found:
            [loaded] = state["clippers"][0]["policies"]
            assert loaded["slots"] == saved["slots"]
            torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0)
