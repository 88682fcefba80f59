"""`stage: after_backward` on ranks whose every backward reduces: as one process, or refused."""

import pytest
import torch
from support.gradients import small_model
from support.micro_batches import LIMIT, Program, config_of
from support.ranks import run_on_ranks

from gradclip import ClipByNorm, ConfigError, GradientClipper

NAN = float("nan")


def on_ranks(rank, world):
    """Parameters after two steps of two micro-batches, with one spike, under each layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (world,))
    wraps = {
        "DDP": DistributedDataParallel,
        "DDP views": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
        "FSDP2": lambda m: fully_shard(m, mesh=mesh),
        "FSDP1": lambda m: FullyShardedDataParallel(
            m, use_orig_params=True, device_id=torch.device("cpu")
        ),
    }
    found = {}
    for name, wrap in wraps.items():
        model = small_model()
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        config = config_of(ClipByNorm(max_norm=LIMIT))
        clipper = GradientClipper(config, wrapped.named_parameters(), optimizer)
        count = 1 if name == "FSDP1" else 2
        records = []
        for step in range(2):
            optimizer.zero_grad()
            for micro in range(count):
                size = NAN if (step, micro, rank) == (1, 1, 1) else 1.0 + 5 * micro
                seed = 10 * step + micro + 100 * (rank if count == 2 else 0)
                inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
                loss = wrapped(inputs).square().mean() * size / count
                with clipper.micro_batch(share=1 / count):
                    loss.backward()
            record = clipper.clip()
            optimizer.step()
            records += [float(record.clipped_norm), float(record.dropped)]
        if name == "FSDP1":
            try:
                for _ in range(2):
                    optimizer.zero_grad()
                    loss = wrapped(inputs).sum()
                    with clipper.micro_batch():
                        loss.backward()  # of one that was given up, at first
                with clipper.micro_batch():
                    pass
            except ConfigError as error:
                found["refused"] = str(error)
        found[name] = records
        if name != "FSDP1":
            whole = [getattr(p, "full_tensor", p.clone)().detach() for p in model.parameters()]
            found[name] = (records, whole)
    return found


def test_ranks_that_reduce_each_backward_agree_with_one_process():
    first, second = run_on_ranks(on_ranks, 2)
    records, wanted = first["DDP"]
    assert records[1::2] == [0, 1]
    for found in (first, second):
        for name in ("DDP", "DDP views", "FSDP2"):
            assert found[name][0] == pytest.approx(records, rel=1e-5), name
            for p, q in zip(found[name][1], wanted, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
        assert "the second of a step" in found["refused"]
        assert found["FSDP1"][1::2] == [0, 0]
    one = Program(config_of(ClipByNorm(max_norm=LIMIT)))
    for step in range(2):
        one.optimizer.zero_grad()
        for micro in range(2 - step):
            parts = [one.alone(10 * step + micro + 100 * r, 1.0 + 5 * micro) for r in range(2)]
            with one.clipper.micro_batch(share=0.5):
                for p, *grads in zip(one.model.parameters(), *parts, strict=True):
                    p.grad = sum(grads) / 2 / 2
        one.clipper.clip()
        one.optimizer.step()
    for p, q in zip(one.params, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
