"""The noise scale of ranks that each see a share is that of one process that sees all."""

import pytest
import torch
from support.comms import CountComms
from support.nets import uneven_net
from support.ranks import run_on_ranks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradclip import ClipByNorm, ConfigError, GradientClipper, LayoutError, NoiseScale

SMALL, PARTS, STEPS = 2, 4, 14


def samples(step):
    return torch.randn(SMALL * PARTS, 5, generator=torch.Generator().manual_seed(step))


def estimate(net, mine, each, spoiled=()):
    """Accumulate this rank's micro-batches; the estimates, and bytes sent by the statistic."""
    noise = NoiseScale(
        net.parameters(),
        small_batch=SMALL,
        large_batch=SMALL * PARTS,
        loss_divided_by=each,
        decay=0.9,
    )
    clipper = GradientClipper(ClipByNorm(max_norm=0.05), net.named_parameters())
    with CountComms() as comms:
        for step in range(STEPS):
            net.zero_grad()
            parts = samples(step).split(SMALL)[mine]
            if step in spoiled:
                parts[-1][0, 0] = float("nan")
            for index, part in enumerate(parts):
                if isinstance(net, DistributedDataParallel):
                    net.require_backward_grad_sync = index == len(parts) - 1
                (net(part).square().mean() / each).backward()
            record = clipper.clip()
            comms.messages.clear()
            noise.update(record)
            sent = list(comms.messages)
    return {key: float(value) for key, value in noise.as_metrics().items()}, sent


def on_ranks(rank, world, spoiled):
    each = PARTS // world
    net = DistributedDataParallel(uneven_net(1))
    mine = slice(rank * each, (rank + 1) * each)
    return estimate(net, mine, each, spoiled if rank == 1 else ())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spoiled", [(), (5,)])
def test_ddp_with_and_without_accumulation_is_one_process(world, spoiled):
    want, none = estimate(uneven_net(1), slice(None), PARTS, spoiled)
    assert none == []
    answers = run_on_ranks(on_ranks, world, spoiled)
    for found, sent in answers:
        assert found == pytest.approx(want, rel=1e-5)
        assert sent == [8]
        assert found == answers[0][0]
    assert want["clip/noise"] > 0


def sharded(rank, world):
    told = []
    flat = FullyShardedDataParallel(uneven_net(1), device_id=torch.device("cpu"))
    for net in (fully_shard(uneven_net(1)), flat):
        try:
            NoiseScale(net.parameters(), small_batch=2, large_batch=8)
        except LayoutError as error:
            told.append(str(error))
    try:
        NoiseScale(uneven_net(1).parameters(), small_batch=2, large_batch=6)
    except ConfigError as error:
        told.append(str(error))
    return told


def test_sharded_parameters_and_uneven_shares_are_refused():
    for first, second, third in run_on_ranks(sharded, 2):
        assert "is sharded (DTensor, FSDP or DeepSpeed)" in first
        assert "supported: plain parameters, in one process or under DDP" in second
        assert "small_batch 2 and large_batch 6 on 2 ranks; allowed" in third
