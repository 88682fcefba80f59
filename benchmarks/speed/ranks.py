"""Steps on two ranks over gloo, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.speed import rivals
from benchmarks.speed.pairs import Effort, in_turn
from benchmarks.speed.rows import Row
from benchmarks.speed.steps import WORDS
from gradclip import ClipByNorm, GradientClipper

PART = "ranks"
RANKS = 2
LAYERS = 24
DEADLINE = 600.0


class Layer(nn.Module):
    """The 12 parameters of a GPT-2 layer; nothing is computed with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])

    def forward(self) -> None:
        """`fully_shard` asks for one."""


def layers_of(width: int, layers: int = LAYERS) -> nn.Sequential:
    """So many layers, without memory."""
    with torch.device("meta"):
        return nn.Sequential(*(Layer(width) for _ in range(layers)))


def fsdp2(width: int) -> nn.Module:
    """Layers of `fully_shard` as this rank holds them, with gradients."""
    model = layers_of(width)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
        local(p.grad).normal_()
    return model


def fsdp1(width: int) -> FullyShardedDataParallel:
    """The same of `FullyShardedDataParallel`; gradients are this rank's parts."""
    model = layers_of(width).to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    layers = nn.Sequential(*(FullyShardedDataParallel(layer, **options) for layer in model))
    sharded = FullyShardedDataParallel(layers, **options)
    for p in sharded.parameters():
        p.grad = torch.randn_like(p)
    return sharded


def local(tensor: Tensor | None) -> Tensor:
    """This rank's part."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_turn_on_ranks(
    model: nn.Module, ours: Callable[[], object], theirs: Callable[[], object], effort: Effort
) -> Row:
    """Both in turn; ranks start each call together, and make the same number of calls."""
    grads = [local(p.grad) for p in model.parameters()]
    saved = [grad.clone() for grad in grads]

    def before() -> None:
        torch._foreach_copy_(grads, saved)
        dist.barrier()

    together = effort._replace(seconds=float("inf"), pairs=min(effort.pairs, 25))
    timed = in_turn(ours, theirs, together, before)
    before()
    return timed.row(PART, "", "")


def on_fsdp2(width: int, effort: Effort) -> list[Row]:
    """`norm` against torch's function, and against a loop as in torchtitan."""
    model = fsdp2(width)
    params = list(model.parameters())
    whole = GradientClipper(ClipByNorm(max_norm=float("inf")), model.named_parameters()).clip()
    size = "GPT-2 medium's" if width == 1024 else f"width {width}"
    found = []
    for clips in (False, True):
        limit = float(whole.grad_norm) * (0.9 if clips else 1e3)
        clipper = GradientClipper(ClipByNorm(max_norm=limit), model.named_parameters())
        for peer, theirs in {
            "torch": partial(torch.nn.utils.clip_grad_norm_, params, limit),
            "loop as in torchtitan": rivals.titan(model, limit),
        }.items():
            aims = {False: 0.35, True: 0.40 if width < 1024 else None}
            timed = in_turn_on_ranks(model, clipper.clip, theirs, effort)
            what = f"FSDP2, 288 tensors, {size}, {WORDS[clips]}"
            aim = aims[clips] if peer == "torch" else None
            found.append(replaced(timed, what, peer, aim))
    return found


def on_fsdp1(width: int, effort: Effort) -> list[Row]:
    """`norm` against the method of `FullyShardedDataParallel`."""
    model = fsdp1(width)
    found = []
    for clips in (False, True):
        limit = 1e-3 if clips else 1e9
        clipper = GradientClipper(ClipByNorm(max_norm=limit), model)
        timed = in_turn_on_ranks(model, clipper.clip, partial(model.clip_grad_norm_, limit), effort)
        what = f"FSDP1, 288 tensors, width {width}, {WORDS[clips]}"
        found.append(replaced(timed, what, "FSDP.clip_grad_norm_", None))
    return found


def replaced(row: Row, what: str, peer: str, aim: float | None) -> Row:
    """The row, by this name."""
    return Row(PART, what, peer, row.unit, row.ours, row.theirs, row.ratio, row.low, row.high, aim)


def _rank(
    rank: int, folder: str, call: Callable[[int, Effort], list[Row]], width: int, effort: Effort
) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        return call(width, effort)
    finally:
        dist.destroy_process_group()


def two_ranks(
    call: Callable[[int, Effort], list[Row]], width: int, effort: Effort
) -> Iterator[Row]:
    """What rank 0 of two processes finds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, fresh.Pool(RANKS) as pool:
        given = [(rank, folder, call, width, effort) for rank in range(RANKS)]
        yield from pool.starmap_async(_rank, given, chunksize=1).get(DEADLINE)[0]


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    "FSDP2 width 64": partial(two_ranks, on_fsdp2, 64),
    "FSDP2 GPT-2 medium": partial(two_ranks, on_fsdp2, 1024),
    "FSDP1 width 64": partial(two_ranks, on_fsdp1, 64),
}
