"""One small model under every layout that Accelerate knows, on CPU processes."""

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import ParallelismConfig
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import accelerate_clip
from support.accelerate_cpu import joined, with_fsdp, with_tensor_parallel
from support.nets import parallel_net


def sharding(version, **options):
    if version == 1:
        options["sync_module_states"] = False
    # A new one each time: Accelerate turns the policy's name into a function in place.
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="SIZE_BASED_WRAP",
        min_num_params=20,
        **options,
    )


def fsdp1(orig=True, **options):
    return lambda **given: with_fsdp(sharding(1, use_orig_params=orig, **options), **given)


def fsdp2(**sizes):
    make = with_tensor_parallel if "tp_size" in sizes else with_fsdp
    parallel = {"parallelism_config": ParallelismConfig(**sizes)} if sizes else {}
    return lambda **given: make(sharding(2), **parallel, **given)


LAYOUTS = {
    "ddp": (joined, 2),
    "fsdp1": (fsdp1(), 2),
    "fsdp1 grad op": (fsdp1(reshard_after_forward="SHARD_GRAD_OP"), 2),
    "fsdp1 flat": (fsdp1(orig=False), 2),
    "fsdp2": (fsdp2(), 2),
    "tp": (lambda: with_tensor_parallel(parallelism_config=ParallelismConfig(tp_size=2)), 2),
    "hsdp": (fsdp2(dp_replicate_size=2, dp_shard_size=2), 4),
    "fsdp2 tp": (fsdp2(dp_shard_size=2, tp_size=2), 4),
}
"""By name: what makes the accelerator, and the number of ranks."""


def prepare(accelerator, policy, net=None):
    """Clip, model and optimizer of what the net trains."""
    clip = accelerate_clip.enable(accelerator, policy)
    net = net or parallel_net()
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
    trained = [p for p in net.parameters() if p.requires_grad]
    return clip, *accelerator.prepare(net, torch.optim.SGD(trained, **options))


def share(accelerator, rows):
    """The rows of this rank; those of one tensor-parallel group are the same."""
    parallel = accelerator.parallelism_config
    cut = parallel.tp_size if parallel is not None else 1
    return rows[accelerator.process_index // cut :: accelerator.num_processes // cut]


def rows_of(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 4, generator=generator) * (6.0 if step % 7 == 6 else 1.0)
