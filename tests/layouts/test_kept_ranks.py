"""Ranks that tests share: what goes wrong in one test doesn't reach the next."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_on_ranks


def seen(rank, world):
    """What a test finds, on processes that another may have used."""
    with warnings.catch_warnings(record=True) as said:
        warnings.warn("once", UserWarning, stacklevel=1)
    total = torch.ones(1)
    dist.all_reduce(total)
    launched = (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["TORCHELASTIC_RUN_ID"])
    left = os.environ.get("LEFT"), torch.get_default_dtype(), float(torch.rand(1))
    return os.getpid(), (launched, left, len(said), float(total))


def leaving(rank, world):
    os.environ["LEFT"] = "something"
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    from accelerate import Accelerator

    Accelerator.multi_device = True
    return os.getpid()


def without_accelerate(rank, world):
    from accelerate import Accelerator

    return isinstance(vars(Accelerator)["multi_device"], property)


def test_the_next_test_finds_them_as_they_were():
    before = run_on_ranks(seen, 2)
    left = run_on_ranks(leaving, 2)
    after = run_on_ranks(seen, 2)
    assert [pid for pid, _ in before] == left == [pid for pid, _ in after]
    for rank, (_, found) in enumerate(after):
        launched, (environment, dtype, _), warned, total = found
        assert found == before[rank][1]
        assert launched == (str(rank), "2", "test")
        assert (environment, dtype) == (None, torch.float32)
        assert (warned, total) == (1, 2.0)
    assert run_on_ranks(without_accelerate, 2) == [True, True]


def raising(rank, world):
    if rank == 1:
        msg = "on one rank"
        raise ValueError(msg)
    dist.all_reduce(torch.ones(1))  # which the other never joins


def dying(rank, world):
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def hanging(rank, world):
    if rank == 0:
        time.sleep(600)


def destroying(rank, world):
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fn", "options", "error"),
    [
        (
            raising,
            {},
            (RuntimeError, r"(?s)rank 1 of 2 raised.*in raising.*: on one rank"),
        ),
        (dying, {}, (RuntimeError, r"rank 1 of 2 stopped:\nexit code 7|rank 0 of 2 raised")),
        (hanging, {"timeout": 1}, (TimeoutError, r"ranks \[0\] of 2 did not answer in 1 seconds")),
        (destroying, {}, None),
        (seen, {"fresh": True}, None),
    ],
)
def test_ranks_are_replaced(fn, options, error):
    before = {pid for pid, _ in run_on_ranks(seen, 2)}
    if error is None:
        run_on_ranks(fn, 2, **options)
    else:
        with pytest.raises(error[0], match=error[1]):
            run_on_ranks(fn, 2, **options)
    after = {pid for pid, _ in run_on_ranks(seen, 2)}
    assert before.isdisjoint(after) == (fn is not seen)
