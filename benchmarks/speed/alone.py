"""Processes that measure: each imports what it measures, and ends with it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

from benchmarks.speed import rivals
from benchmarks.speed.pairs import Effort, read_seconds
from benchmarks.speed.rows import Found, Point, Row, code_of

P = ParamSpec("P")
T = TypeVar("T")


def alone(call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What a call returns in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(call, *given, **named).result()


def found(module: str, name: str, effort: Effort) -> Found:
    """Measure one case of a module, in a process that is its own: what it prints goes nowhere."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    start = time.perf_counter()
    all_found = list(import_module(module).CASES[name](effort))
    seconds = time.perf_counter() - start
    rows = [one for one in all_found if isinstance(one, Row)]
    points = [one for one in all_found if isinstance(one, Point)]
    return Found(code_of(), rows, points, seconds)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    size = 1 << 30
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "read GB/s": round(size / read_seconds(size) / 1e9, 1),
        "versions": {
            package: rivals.installed(package)
            for package in (
                *("torch", "lightning", "accelerate", "transformers"),
                *rivals.PACKAGES,
            )
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line for line in file if "model name" in line).partition(": ")[2].strip()
    except (OSError, StopIteration):
        return "unknown processor"
