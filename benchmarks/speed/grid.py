"""One rank of a large job, as it sees itself: no cluster needed.

The process group is torch's `fake` one, which sends nothing; parameters are those of a 70 B
transformer, cut by `parallelize_module` and `fully_shard` as they would be, and the shards of
this rank are real.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.speed.pairs import Effort
from benchmarks.speed.rows import Point, Row
from gradclip import ClipByNorm, GradientClipper
from tests.support.comms import CountComms

PART = "grid"
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
        tp: Ranks along which tensor parallelism cuts; 1 for no such axis.
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
            if tp > 1:
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


class Seen(NamedTuple):
    """What one rank sees.

    Attributes:
        values: Of the whole model.
        held: Of this rank.
        plan: Seconds that building the clipper took.
        ours: Bytes of each message of our step.
        theirs: The same of torch's; None if it wasn't asked for.
    """

    values: int
    held: int
    plan: float
    ours: list[int]
    theirs: list[int] | None


def seen(dp: int, tp: int, shrink: int, layers: int, *, torchs: bool) -> Seen:
    """Act as one of dp x tp ranks."""
    named = shards(dp, tp, shrink, layers)
    start = time.perf_counter()
    clipper = GradientClipper(ClipByNorm(max_norm=1.0), named)
    plan = time.perf_counter() - start
    with CountComms() as ours:
        clipper.clip()
    theirs = None
    if torchs:
        with CountComms() as counted:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        theirs = counted.messages
    values = sum(p.numel() for _, p in named)
    held = sum(p.to_local().numel() for _, p in named if isinstance(p, DTensor))
    dist.destroy_process_group()
    return Seen(values, held, plan, ours.messages, theirs)


def large(effort: Effort) -> Iterator[Row]:
    """4 ranks with narrow layers, and 1024 with whole ones: about as much on each rank."""
    for dp, tp, shrink in ((2, 2, 64),) if effort.quick else ((2, 2, 16), (128, 8, 1)):
        found = seen(dp, tp, shrink, 4 if effort.quick else LAYERS, torchs=False)
        values = f"{found.values / 1e9:.2f} B values, {found.held / 1e6:.0f} M on each"
        what = f"{dp} x {tp} ranks, {values}"
        yield Row(PART, what, "", "messages a step", len(found.ours))
        yield Row(PART, what, "", "bytes a step", sum(found.ours))
        yield Row(PART, what, "", "s, plan", found.plan)


def growth(effort: Effort) -> Iterator[Point]:
    """Bytes that one rank sends in a step; FSDP2 alone, since torch can't mix meshes."""
    for ranks in (2, 8, 1024) if effort.quick else (2, 4, 16, 64, 256, 1024):
        found = seen(ranks, 1, 8, 4, torchs=True)
        assert found.theirs is not None
        yield Point("ranks", "gradclip", ranks, sum(found.ours))
        yield Point("ranks", "torch", ranks, sum(found.theirs))


CASES = {"grid of ranks": large, "growth with ranks": growth}
