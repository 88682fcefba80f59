"""A clipping step of `fully_shard` (FSDP2) on two ranks, against torch's own.

    python benchmarks/bench_ranks.py [--runs 5] [--repeats 15] [--layers 24] [--json FILE]

Two processes over gloo, one thread each, hold 288 tensors: the 12 of each of 24 transformer
layers. Both sides clip the same gradients in turn, ranks start each call together, and the ratio
is taken pair by pair on rank 0. Collectives are those of one call.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_step import alternate, middle, print_heads, print_row, write_json
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from gradclip import ClipByNorm, GradientClipper

RANKS = 2
# Name, width, and the aim without and with clipping; with it large gradients are bound by memory.
MODELS = (("small", 64, (0.45, 0.45)), ("GPT-2 medium", 1024, (0.45, None)))


class Layer(nn.Module):
    """The 12 parameters of a GPT-2 layer; nothing is computed with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, width)])

    def forward(self) -> None:
        """`fully_shard` asks for one."""


def sharded(width: int, layers: int) -> list[tuple[str, nn.Parameter]]:
    """The layers as this rank holds them, with a gradient for each parameter."""
    with torch.device("meta"):
        model = nn.Sequential(*(Layer(width) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    named = list(model.named_parameters())
    for _, p in named:
        p.grad = torch.empty_like(p)
        local(p.grad).normal_()
    return named


def local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def collectives(call: Callable[[], object]) -> int:
    with CommDebugMode() as comms:
        call()
    return comms.get_total_counts()


def compare(
    named: list[tuple[str, nn.Parameter]], clips: bool, options: argparse.Namespace
) -> tuple[list[tuple[float, float, float]], tuple[int, int]]:
    """Each run's ratio and milliseconds of both, and the collectives of both."""
    params = [p for _, p in named]
    norm = GradientClipper(ClipByNorm(max_norm=float("inf")), named).clip().grad_norm
    limit = float(norm) * (0.9999 if clips else 1e3)
    clipper = GradientClipper(ClipByNorm(max_norm=limit), named)
    grads = [local(p.grad) for p in params]
    saved = [grad.clone() for grad in grads]

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(params, limit)

    def before() -> None:
        torch._foreach_copy_(grads, saved)
        dist.barrier()

    runs = [alternate(clipper.clip, theirs, before, options.repeats) for _ in range(options.runs)]
    before()
    counts = collectives(clipper.clip), collectives(theirs)
    before()
    return runs, counts


def rank_main(rank: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    rows = []
    for name, width, aims in MODELS:
        named = sharded(width, options.layers)
        for clips, aim in zip((False, True), aims, strict=True):
            runs, (ours, theirs) = compare(named, clips, options)
            found, (low, high) = middle(runs)
            rows.append(
                {"gradients": name, "clips": clips, "ratio": found[0], "range": [low, high]}
                | {"aim": aim, "collectives": [ours, theirs]}
            )
            if rank == 0:
                note = f"{low:.3f} to {high:.3f}; collectives {ours} against {theirs}"
                print_row(f"{len(named)} tensors, {name}", clips, found, aim, note)
    if rank == 0:
        write_json(rows, options.json)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=24, help="of 12 tensors each")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {RANKS} ranks over gloo, 1 thread each")
    print_heads()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (f"{folder}/store", options), nprocs=RANKS)


if __name__ == "__main__":
    main()
