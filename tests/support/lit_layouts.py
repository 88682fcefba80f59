"""One Lightning module under every strategy, on CPU processes."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from support.lit import Small
from support.nets import parallel_net

CPU = torch.device("cpu")


class CpuFSDP(FSDPStrategy):
    """FSDP1 on a CPU: the stock strategy asks for a GPU, also for its mesh."""

    def setup_environment(self) -> None:
        shape = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if shape:
            names = ("replicate", "shard")
            self.kwargs["device_mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=CPU,
            **self.kwargs,
        )


class Plain(Small):
    """Ranks share the rows of a batch, but for those of one tensor-parallel group."""

    def __init__(self) -> None:
        # Momentum: Lightning can't load the state of an optimizer that has none.
        super().__init__(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.5), by_step=True)
        self.net = parallel_net()

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows.to(next(self.parameters()).dtype)).float().square().mean()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.trainer.model.parameters())


class WrapsItself(Plain):
    """Parts of the module are FSDP1, the LightningModule isn't."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FullyShardedDataParallel):
            options = {"device_id": CPU, "use_orig_params": True}
            self.net[2] = FullyShardedDataParallel(self.net[2], **options)
            self.net = FullyShardedDataParallel(self.net, **options)


class Sharded(Plain):
    """fully_shard over every data-parallel rank."""

    def configure_model(self) -> None:
        shard(self.net, self.device_mesh["data_parallel"])


class Hybrid(Plain):
    """fully_shard within pairs of ranks, copied over the pairs."""

    def configure_model(self) -> None:
        shard(self.net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


class Tensor(Plain):
    """Tensor parallel; the last two layers are whole on every rank."""

    plan: ClassVar = {"0": ColwiseParallel(), "2": RowwiseParallel()}

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        mesh = self.device_mesh["data_parallel"]
        return rows[mesh.get_local_rank() :: mesh.size()]

    def configure_model(self) -> None:
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], self.plan)


class Sequence(Tensor):
    """Tensor parallel with a norm whose rows are cut, which leaves its gradients partial sums."""

    plan: ClassVar = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(output_layouts=Shard(0)),
        "3": SequenceParallel(sequence_dim=0),
        "4": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }


class TensorSharded(Tensor):
    """fully_shard over data-parallel ranks of what tensor parallelism left."""

    def configure_model(self) -> None:
        super().configure_model()
        shard(self.net, self.device_mesh["data_parallel"])


def shard(net: torch.nn.Module, mesh: Any) -> None:
    for module in (net[0], net[2], net):
        fully_shard(module, mesh=mesh)


def fsdp1(**options: Any) -> CpuFSDP:
    """Two FSDP modules, one within the other; the inner one's names carry the wrapper's.

    Checkpoints are sharded: putting whole ones together crashes in torch 2.13 on a CPU.
    """
    return CpuFSDP(auto_wrap_policy={torch.nn.LayerNorm}, state_dict_type="sharded", **options)


def tensor(data: int, size: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=size, save_distributed_checkpoint=False
    )


STRATEGIES = {
    "ddp": (Plain, DDPStrategy, 2),
    "fsdp1": (Plain, fsdp1, 2),
    "fsdp1 grad op": (Plain, lambda: fsdp1(sharding_strategy="SHARD_GRAD_OP"), 2),
    "fsdp1 no shard": (Plain, lambda: fsdp1(sharding_strategy="NO_SHARD"), 2),
    "fsdp1 flat": (Plain, lambda: fsdp1(use_orig_params=False), 2),
    "fsdp1 wraps itself": (WrapsItself, CpuFSDP, 2),
    "fsdp2": (Sharded, lambda: tensor(2, 1), 2),
    "tp": (Tensor, lambda: tensor(1, 2), 2),
    "sequence": (Sequence, lambda: tensor(1, 2), 2),
    "fsdp1 hybrid": (
        Plain,
        lambda: fsdp1(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)),
        4,
    ),
    "hsdp": (Hybrid, lambda: tensor(4, 1), 4),
    "fsdp2 tp": (TensorSharded, lambda: tensor(2, 2), 4),
}
"""By name: module, strategy and number of ranks."""


def scaler_plugin(scale: float) -> FSDPPrecision:
    """16-mixed whose scaler works on a CPU; the stock one is for a GPU, and off elsewhere."""
    plugin = FSDPPrecision("16-mixed")
    plugin.scaler = ShardedGradScaler(device="cpu", init_scale=scale)
    return plugin
