"""Run a function on several real processes over gloo, with a deadline."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def run_on_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `fn(rank, world, *args)` on fresh processes and return what each rank returned.

    `fn` stands at the top of its file; arguments and results are pickled. The process group is
    initialised, and the variables that launchers set are in the environment, so that Lightning
    and Accelerate join it. A rank that raises fails the test with its traceback; ranks that
    haven't answered by the deadline are killed.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    mp.set_forkserver_preload(["support.warm"])
    context = mp.get_context("forkserver")
    answers: Any = context.Queue()
    where = (inspect.getfile(fn), fn.__name__)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        ranks = [
            context.Process(
                target=_rank, args=(where, rank, world, store, answers, args), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            return _gather(ranks, answers, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.join(1)
                if process.is_alive():
                    process.kill()


def _gather(ranks: list[Any], answers: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, ok, value = answers.get(timeout=0.5)
        except queue.Empty:
            missing = [i for i in range(len(ranks)) if i not in found]
            if time.monotonic() > deadline:
                msg = f"ranks {missing} did not answer in time"
                raise TimeoutError(msg) from None
            dead = [i for i in missing if ranks[i].exitcode not in (None, 0)]
            if dead:
                msg = f"ranks {dead} died with {[ranks[i].exitcode for i in dead]}"
                raise RuntimeError(msg) from None
            continue
        if not ok:
            msg = f"rank {rank} of {len(ranks)}:\n{value}"
            raise RuntimeError(msg)
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(len(ranks))]


def _rank(
    where: tuple[str, str], rank: int, world: int, store: str, answers: Any, args: tuple[Any, ...]
) -> None:
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="1",
            TORCHELASTIC_RUN_ID="test",
        )
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        # As bytes: a tensor put into the queue itself would be shared with a process about to end.
        answers.put((rank, True, pickle.dumps(_load(*where)(rank, world, *args))))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function by file and name: the test runner's module names mean nothing here."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
