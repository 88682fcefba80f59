"""A step at 1024 ranks, as one of them sees it: no cluster needed.

    python benchmarks/bench_scale.py

The process group is torch's `fake` one, which sends nothing; parameters are those of a 70 B
transformer, cut by `parallelize_module` and `fully_shard` as they would be, and the shards of
this rank are real. Compares 4 ranks with 1024.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradclip import ClipByNorm, GradientClipper

HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 8192, 28672, 1024, 128256, 80


class Layer(nn.Module):
    """The parameters of one layer; nothing is computed with them."""

    def __init__(self, shrink: int) -> None:
        super().__init__()
        hidden, inner, keys = HIDDEN // shrink, INNER // shrink, KEYS // shrink
        widths = {"q": hidden, "k": keys, "v": keys, "o": hidden, "gate": inner, "up": inner}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(hidden, width, bias=False))
        self.down = nn.Linear(inner, hidden, bias=False)
        self.before, self.after = nn.RMSNorm(hidden), nn.RMSNorm(hidden)

    def forward(self) -> None:
        """`fully_shard` asks for one."""


PLAN = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
PLAN |= {name: RowwiseParallel() for name in ("o", "down")}


def shards(
    dp: int, tp: int, shrink: int = 1, layers: int = LAYERS
) -> list[tuple[str, nn.Parameter]]:
    """The model as rank 0 of dp x tp ranks holds it, with a gradient for each parameter.

    Args:
        dp: Ranks along which `fully_shard` cuts.
        tp: Ranks along which tensor parallelism cuts.
        shrink: Divides every width, for fewer ranks than the whole model needs.
        layers: How many there are.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=dp * tp)
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(VOCABULARY // shrink, HIDDEN // shrink),
            *(Layer(shrink) for _ in range(layers)),
            nn.Linear(HIDDEN // shrink, VOCABULARY // shrink, bias=False),
        )
    for layer in model:
        if isinstance(layer, Layer):
            parallelize_module(layer, mesh["tp"], PLAN)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    for p in model.parameters():
        assert isinstance(p, DTensor)
        grad = torch.full_like(p.to_local(), 1e-3)
        p.grad = DTensor.from_local(
            grad,
            p.device_mesh,
            p.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
    return list(model.named_parameters())


def main() -> None:
    for dp, tp, shrink in ((2, 2, 16), (128, 8, 1)):
        named = shards(dp, tp, shrink)
        start = time.perf_counter()
        clipper = GradientClipper(ClipByNorm(max_norm=1.0), named)
        planned = time.perf_counter() - start
        with CommDebugMode() as comms:
            clipper.clip()
        start = time.perf_counter()
        clipper.clip()
        step = time.perf_counter() - start
        values = sum(p.numel() for _, p in named)
        local = sum(p.to_local().numel() for _, p in named if isinstance(p, DTensor))
        sys.stdout.write(
            f"{dp} x {tp} ranks: {values / 1e9:.2f} B values in {len(named)} tensors, "
            f"{local / 1e6:.1f} M on this rank; plan {planned:.2f} s, step {step * 1e3:.0f} ms, "
            f"{comms.get_total_counts()} collective(s)\n"
        )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
