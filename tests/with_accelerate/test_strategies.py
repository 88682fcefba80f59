"""The same model under every layout: norms, coefficients and parameters of one process."""

import functools

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ParallelismConfig
from support.accelerate_cpu import joined, with_fsdp, with_tensor_parallel
from support.nets import parallel_net, whole_parameters
from support.ranks import run_on_ranks
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import accelerate_clip

STEPS = 8
POLICIES = {
    "norm": {"policies": [{"type": "norm", "max_norm": 2.0}]},
    "zclip": {"policies": [{"type": "zclip", "warmup_steps": 3, "max_norm": 8.0}]},
    "value": {"policies": [{"type": "value", "clip_value": 0.2}]},
    "parameter": {
        "policies": [{"type": "norm", "max_norm": 0.6, "scope": "parameter"}],
        "log": {"per_parameter": True},
    },
}


def sharding(version, **options):
    # A new one each time: Accelerate turns the policy's name into a function in place.
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="SIZE_BASED_WRAP",
        min_num_params=20,
        **options,
    )


def fsdp1(**options):
    return with_fsdp(sharding(1, sync_module_states=False, **options))


LAYOUTS = {
    "ddp": (joined, 2),
    "fsdp1": (lambda: fsdp1(use_orig_params=True), 2),
    "fsdp1 grad op": (
        lambda: fsdp1(use_orig_params=True, reshard_after_forward="SHARD_GRAD_OP"),
        2,
    ),
    "fsdp1 flat": (lambda: fsdp1(use_orig_params=False), 2),
    "fsdp2": (lambda: with_fsdp(sharding(2)), 2),
    "tp": (lambda: with_tensor_parallel(parallelism_config=ParallelismConfig(tp_size=2)), 2),
    "hsdp": (
        lambda: with_fsdp(
            sharding(2),
            parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2),
        ),
        4,
    ),
    "fsdp2 tp": (
        lambda: with_tensor_parallel(
            sharding(2), parallelism_config=ParallelismConfig(dp_shard_size=2, tp_size=2)
        ),
        4,
    ),
}
"""By name: what makes the accelerator, and the number of ranks."""


def prepare(accelerator, policy):
    clip = accelerate_clip.enable(accelerator, policy)
    net = parallel_net()
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.tp_enabled:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net, accelerator.torch_device_mesh["tp"], plan)
        net.tp_size = parallel.tp_size
    options = {"lr": 0.05, "momentum": 0.5}
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None
    if plugin is not None and plugin.fsdp_version == 1 and not plugin.use_orig_params:
        net = accelerator.prepare(net)
        return clip, net, accelerator.prepare(torch.optim.SGD(net.parameters(), **options))
    return clip, *accelerator.prepare(net, torch.optim.SGD(net.parameters(), **options))


def share(accelerator, rows):
    """The rows of this rank; those of one tensor-parallel group are the same."""
    parallel = accelerator.parallelism_config
    cut = parallel.tp_size if parallel is not None else 1
    return rows[accelerator.process_index // cut :: accelerator.num_processes // cut]


def rows_of(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 4, generator=generator) * (6.0 if step % 7 == 6 else 1.0)


def train(accelerator, policy):
    clip, net, optimizer = prepare(accelerator, POLICIES[policy])
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(net(share(accelerator, rows_of(step))).square().mean())
        if policy == "value":
            accelerator.clip_grad_value_(net.parameters(), 0.2)
        elif step % 2:  # every other step is clipped by the optimizer's hook
            norm = accelerator.clip_grad_norm_(net.parameters(), 2.0)
            assert torch.equal(norm, clip.last_record.grad_norm)
        optimizer.step()
        seen.append({key: value.clone() for key, value in clip.last_record.as_metrics().items()})
    return seen, whole_parameters(net)


def fresh():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def on_rank(rank, world, name):
    found = {}
    for policy in POLICIES:
        if can(name, policy):
            fresh()
            found[policy] = train(LAYOUTS[name][0](), policy)
    return found


def can(name, policy):
    """Flat parameters can't be told apart."""
    return (name, policy) != ("fsdp1 flat", "parameter")


CASES = [(name, policy) for name in LAYOUTS for policy in POLICIES if can(name, policy)]

ranks = functools.cache(run_on_ranks)


@functools.cache
def alone(policy):
    fresh()
    return train(Accelerator(cpu=True), policy)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_every_layout_does_what_one_process_does(name, policy):
    want_metrics, want_parameters = alone(policy)
    assert any(step["clip/clipped"] for step in want_metrics)
    answers = [found[policy] for found in ranks(on_rank, LAYOUTS[name][1], name)]
    for metrics, parameters in answers:
        for step, first, want in zip(metrics, answers[0][0], want_metrics, strict=True):
            assert step.keys() == want.keys()
            for key, value in step.items():
                assert torch.equal(value, first[key]) or value.isnan(), key
                torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6, equal_nan=True)
        for got, first, want in zip(parameters, answers[0][1], want_parameters, strict=True):
            assert torch.equal(got, first)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
