"""All cases by name, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from benchmarks.speed import counted, grid, growth, loops, once, options, ranks, steps
from benchmarks.speed.pairs import Effort
from benchmarks.speed.rows import Point, Row

_ORDER = (loops, steps, ranks, counted, once, options, growth, grid)
CASES: Mapping[str, Callable[[Effort], Iterable[Row | Point]]] = {
    name: case for module in _ORDER for name, case in module.CASES.items()
}
MODULES: Mapping[str, str] = {name: module.__name__ for module in _ORDER for name in module.CASES}
"""The module of each case."""
