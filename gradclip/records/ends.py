"""Flight records are written before their process ends, in whatever way it does."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.util import Finalize
from types import FrameType
from typing import Protocol
from weakref import WeakSet

__all__ = ["close_at_end"]


class _Closes(Protocol):
    def close(self) -> None: ...


_closing: WeakSet[_Closes] = WeakSet()
_process = 0
_minds_forks = False


def close_at_end(recorder: _Closes) -> None:
    """Call `close` of this recorder when the process ends: by itself, or by SIGTERM.

    Workers of `multiprocessing` (`mp.spawn`, notebook launchers) end by `os._exit`, which runs
    `multiprocessing`'s own finalizers and nothing else.

    SIGTERM is waited for in the main thread alone, and only where its default was in force: no
    other handler is replaced. Its default follows. A handler that is installed later replaces
    this one, and may call it.

    Args:
        recorder: Kept by a weak reference. Its `close` raises nothing.
    """
    global _process
    if _process != os.getpid():  # the first one; those of a parent process are the parent's
        _process = os.getpid()
        _closing.clear()
        Finalize(None, _close_all, exitpriority=0)
    _closing.add(recorder)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _mind_forks()


def _close_all() -> None:
    for recorder in list(_closing):
        recorder.close()


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    del frame
    _close_all()
    if signal.getsignal(signum) == _on_sigterm:  # else a handler that came later called this one
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


def _mind_forks() -> None:
    """Forked processes, such as those that load data, end by SIGTERM as they would without us."""
    global _minds_forks
    if not _minds_forks and hasattr(os, "register_at_fork"):
        _minds_forks = True
        os.register_at_fork(after_in_child=_leave_sigterm)


def _leave_sigterm() -> None:
    if signal.getsignal(signal.SIGTERM) == _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
