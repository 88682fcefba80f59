"""Run a function on several real processes over gloo, with a deadline.

Ranks are kept: the next test on as many ranks uses the same processes and the same process group.
Starting two costs a third of a second, starting a first mesh and backward in them as much again.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
START = 180
"""Seconds until new ranks must be ready."""


def run_on_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60, fresh: bool = False
) -> list[Any]:
    """Call `fn(rank, world, *args)` on `world` processes and return what each rank returned.

    The process group is initialised, and the variables that launchers set are in the environment,
    so that Lightning and Accelerate join it. A rank that raises fails the test with its traceback;
    a rank that hasn't answered by the deadline fails it too. In both cases the processes are
    killed, and the next test gets new ones.

    Args:
        fn: Stands at the top of its file; arguments and results are pickled.
        world: How many ranks.
        timeout: Seconds until all must have answered.
        fresh: Use processes that no other test uses, for what `support.settle` neither puts back
            nor notices.
    """
    ranks = None if fresh else _kept.pop(world, None)
    ranks = ranks or Ranks(world)
    try:
        answers = ranks.run(fn, args, timeout)
    except BaseException:
        ranks.stop()
        raise
    if fresh or ranks.spent:
        ranks.stop()
    else:
        _kept[world] = ranks
    return answers


class Ranks:
    """Processes that wait for functions to run, one after the other."""

    def __init__(self, world: int) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        mp.set_forkserver_preload(["support.warm"])
        context = mp.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory()
        self.spent = False
        self.lines: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank,
                args=(rank, world, f"file://{self.folder.name}/store", theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)
        try:
            self.gather(START)  # not counted for a test: the first ranks import everything
        except BaseException:
            self.stop()
            raise

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """One result for each rank.

        Raises:
            RuntimeError: If a rank raised or died.
            TimeoutError: If one didn't answer in time.
        """
        # As bytes: a tensor that is sent itself would be shared between processes.
        task = pickle.dumps((inspect.getfile(fn), fn.__name__, args))
        for line in self.lines:
            line.send_bytes(task)
        return self.gather(timeout)

    def gather(self, timeout: float) -> list[Any]:
        """What each rank answers; errors as `run` says."""
        deadline = time.monotonic() + timeout
        found: dict[int, Any] = {}
        try:
            while waiting := [line for i, line in enumerate(self.lines) if i not in found]:
                ready = wait(waiting, max(0, deadline - time.monotonic()))
                if not ready:
                    late = [i for i in range(len(self.lines)) if i not in found]
                    msg = f"ranks {late} of {len(self.lines)} did not answer in {timeout} seconds"
                    raise TimeoutError(msg)
                for line in ready:
                    rank = self.lines.index(line)
                    ok, value, spent = pickle.loads(line.recv_bytes())
                    self.spent |= spent
                    if not ok:
                        msg = f"rank {rank} of {len(self.lines)}:\n{value}"
                        raise RuntimeError(msg)
                    found[rank] = pickle.loads(value)
        except (EOFError, ConnectionError):
            for process in self.processes:
                process.join(1)
            codes = {i: p.exitcode for i, p in enumerate(self.processes) if p.exitcode is not None}
            msg = f"ranks died, with exit codes {codes}"
            raise RuntimeError(msg) from None
        return [found[rank] for rank in range(len(self.lines))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for line in self.lines:
            line.close()
        self.folder.cleanup()


_kept: dict[int, Ranks] = {}
"""Ranks that wait for the next test, by their number."""


def _rank(rank: int, world: int, store: str, line: Connection) -> None:
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

    from support.settle import is_spent, settled

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    line.send_bytes(pickle.dumps((True, pickle.dumps("ready"), False)))
    while True:
        try:
            task = line.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            with settled():
                path, name, args = pickle.loads(task)
                answer = True, pickle.dumps(_load(path, name)(rank, world, *args))
        except BaseException:
            answer = False, traceback.format_exc()
        line.send_bytes(pickle.dumps((*answer, is_spent())))


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function by file and name: the test runner's module names mean nothing here."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
