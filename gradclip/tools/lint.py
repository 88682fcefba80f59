"""What is wrong with how a run was clipped, and the line to change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from gradclip.errors import ConfigError
from gradclip.tools.curves import Bools, Floats, Steps, Thinned
from gradclip.tools.replay import kept_steps, sparseness
from gradclip.tools.report import with_clipped
from gradclip.tools.run import Run
from gradclip.tools.trace import Chunk

__all__ = ["Finding", "Lint", "lint", "lint_as_json", "lint_as_text"]

_ENOUGH = 200  # steps, to say that a limit never or always binds
_ALWAYS = 0.95
_START = 50  # steps in which a loss scale may look for its level
_MOVED = 2.0
_BLOCK = 50  # steps of one median
_BEFORE = 8  # blocks that tell the usual norm
_HIGH, _BACK = 3.0, 1.5  # times the usual norm
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        check: never, always, not finite, drift or lingering spike.
        says: What was found, a sentence or two.
        change: The line of a configuration to change or to add.
    """

    check: str
    says: str
    change: str


@dataclass(frozen=True)
class Lint:
    """What was found in a run.

    Attributes:
        run: What was read.
        first: Number of the first step.
        last: Number of the last step.
        steps: How many steps have a norm or weren't finite.
        findings: In the order of the checks.
        notes: What couldn't be checked, and remarks on the source; a sentence each.
    """

    run: Run
    first: int
    last: int
    steps: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def lint(run: Run, progress: Callable[[float], None] | None = None) -> Lint:
    """Check a run, in memory that hardly grows with its length.

    Args:
        run: Its norms are those before clipping.
        progress: Called with the share of the file read so far.

    Raises:
        ConfigError: If no step has a norm.
    """
    seen = _Seen(run)
    for chunk, _ in kept_steps(run, 0, None, progress):
        if len(chunk):
            seen.add(with_clipped(chunk))
    if not seen.steps:
        msg = f"{run.path}: no step has a norm. Choose other steps, or another log."
        raise ConfigError(msg)
    notes = [*run.notes, *sparseness(seen.first, seen.last, seen.steps)]
    if not seen.knows_limits:
        notes.append("The limit isn't known, so nothing is said of it; --limit gives it.")
    elif seen.limited < _ENOUGH:
        notes.append(f"{seen.limited} steps had a limit, too few to judge it: {_ENOUGH} are.")
    checks = (_bound(run, seen), _broken(run, seen), _drift(seen), _lingering(seen))
    findings = tuple(finding for check in checks for finding in check)
    return Lint(run, seen.first, seen.last, seen.steps, findings, tuple(notes))


def lint_as_text(found: Lint) -> str:
    """The findings, for a terminal."""
    count = len(found.findings)
    word = "1 finding" if count == 1 else f"{count or 'no'} findings"
    lines = [f"{found.run.path}: {word} in {found.steps:,} steps, {found.first} to {found.last}"]
    for finding in found.findings:
        lines += ["", f"{finding.check}: {finding.says}", f"  change: {finding.change}"]
    return "\n".join([*lines, *([""] if found.notes else []), *found.notes])


def lint_as_json(found: Lint) -> str:
    """The findings, as JSON."""
    content = {
        "run": str(found.run.path),
        "first_step": found.first,
        "last_step": found.last,
        "steps": found.steps,
        "findings": [asdict(finding) for finding in found.findings],
        "notes": found.notes,
    }
    return json.dumps(content, indent=2, allow_nan=False)


class _Seen:
    """Counts and samples of a run."""

    def __init__(self, run: Run) -> None:
        self._single = run.header.source == "recorder"
        self.first = self.last = -1
        self.steps = self.limited = self.bound = self.touched = 0
        self.knows_limits = False
        self.lowest, self.highest = math.inf, 0.0  # of the limits
        self.broken = self.broken_late = self.in_a_row = self._row = 0
        self.first_broken = -1
        self._sample_steps = Thinned(_SAMPLE, np.int64)
        self._sample = Thinned(_SAMPLE, np.float64)
        self._open = np.empty((2, 0))
        self._blocks: list[tuple[int, float]] = []

    def add(self, chunk: Chunk) -> None:
        self.first = int(chunk.step[0]) if self.first < 0 else self.first
        self.last = int(chunk.step[-1])
        self._add_limits(chunk)
        self._add_broken(chunk.step, ~chunk.finite)
        self.steps += len(chunk)
        used = chunk.grad_norm > 0
        step, norm = chunk.step[used], chunk.grad_norm[used]
        self._sample_steps.add(step)
        self._sample.add(norm)
        rows = np.concatenate([self._open, np.stack([step.astype(np.float64), norm])], axis=1)
        whole = rows.shape[1] // _BLOCK * _BLOCK
        self._open = rows[:, whole:]
        steps, norms = rows[:, :whole].reshape(2, -1, _BLOCK)
        self._blocks += zip(steps[:, 0].astype(int).tolist(), np.median(norms, axis=1), strict=True)

    def _add_limits(self, chunk: Chunk) -> None:
        self.knows_limits |= "limit" in chunk.columns
        limit = chunk.limit
        has = np.isfinite(limit) & chunk.finite
        touched = (chunk.clipped | chunk.skipped) & has
        # A log's entry on several steps is marked if one of them was clipped.
        bound = touched if self._single else touched & (chunk.grad_norm > limit)
        self.limited += int(has.sum())
        self.touched += int(touched.sum())
        self.bound += int(bound.sum())
        if has.any():
            self.lowest = min(self.lowest, float(limit[has].min()))
            self.highest = max(self.highest, float(limit[has].max()))

    def _add_broken(self, step: Steps, broken: Bools) -> None:
        if broken.any() and not self.broken:
            self.first_broken = int(step[broken][0])
        self.broken += int(broken.sum())
        self.broken_late += int(broken[max(0, _START - self.steps) :].sum())
        # Steps in a row: how far each broken one is from the last that wasn't.
        count = np.arange(1, len(broken) + 1)
        since = count - np.maximum.accumulate(np.where(broken, 0, count))
        since = np.where(since == count, since + self._row, since)
        self.in_a_row = max(self.in_a_row, int(since.max()))
        self._row = int(since[-1])

    @property
    def fixed(self) -> bool:
        """Whether the limit is one number, as far as is known."""
        return not self.limited or self.highest <= 1.001 * self.lowest

    @property
    def sample(self) -> tuple[Steps, Floats]:
        """Steps and norms, after the first tenth of the run."""
        first = len(self._sample.values) // 10
        return self._sample_steps.values[first:], self._sample.values[first:]

    @property
    def blocks(self) -> tuple[Steps, Floats]:
        """The first step and the median of each block."""
        steps, medians = zip(*self._blocks, strict=True) if self._blocks else ((), ())
        return np.array(steps, dtype=np.int64), np.array(medians, dtype=np.float64)


def _bound(run: Run, seen: _Seen) -> Iterator[Finding]:
    """Whether the limit never or always binds."""
    if seen.limited < _ENOUGH:
        return
    _, norms = seen.sample
    if not seen.touched:
        largest = float(norms.max()) if len(norms) else 0.0
        yield Finding(
            "never",
            f"The limit bound in none of {seen.limited:,} steps: it is {seen.lowest:.4g} or more, "
            f"and the largest norm after the first tenth of the run is {largest:.4g}.",
            _limit_line(run, norms),
        )
    elif seen.bound >= _ALWAYS * seen.limited:
        yield Finding(
            "always",
            f"The limit bound in {seen.bound / seen.limited:.1%} of {seen.limited:,} steps, so it "
            "sets the size of every step, and the learning rate means something else.",
            _limit_line(run, norms),
        )


def _limit_line(run: Run, norms: Floats) -> str:
    """The line that makes the limit bind on 5 % of the latest steps."""
    late = norms[len(norms) // 2 :]
    limit = float(f"{np.quantile(late, 0.95):.3g}") if len(late) else 1.0
    why = "  # clips 5 % of steps like the latest"
    if run.header.config is None:
        name = "max_grad_norm" if run.header.source == "import:transformers" else "max_norm"
        return f"{name}: {limit:g}{why}"
    policies = run.header.config.get("policies") or []
    for index, policy in enumerate(policies):
        if policy.get("type") == "norm":
            return f"policies[{index}].max_norm: {limit:g}{why}"
    return f"policies[0], by what this proposes: gradclip recommend {run.path}"


def _broken(run: Run, seen: _Seen) -> Iterator[Finding]:
    """Whether steps weren't finite, but for the first steps of a loss scale."""
    if not seen.broken_late and seen.broken < _START // 2:
        return
    config = run.header.config
    change = "on_nonfinite: skip"
    if config is not None and config.get("on_nonfinite", "skip") == "skip":
        change = f"none for their effect, they are withheld; the cause: gradclip report {run.path}"
        if config.get("recorder") is None:
            change = "recorder: {}  # names the parameters"
    yield Finding(
        "not finite",
        f"{seen.broken:,} of {seen.steps:,} steps weren't finite. The first is step "
        f"{seen.first_broken}; at most {seen.in_a_row} stand in a row. With fp16, one in some "
        "2,000 is the loss scale trying a larger value.",
        change,
    )


def _drift(seen: _Seen) -> Iterator[Finding]:
    """Whether norms leave a level that one fixed limit fits."""
    steps, norms = seen.sample
    if len(norms) < _ENOUGH or not seen.fixed:
        return
    quarter = len(norms) // 4
    early, late = float(np.median(norms[:quarter])), float(np.median(norms[-quarter:]))
    if max(early, late) < _MOVED * min(early, late):
        return
    yield Finding(
        "drift",
        f"The usual norm went from {early:.3g} (steps {steps[0]} to {steps[quarter - 1]}) to "
        f"{late:.3g} (steps {steps[-quarter]} to {steps[-1]}). No single limit fits both.",
        "- {type: autoclip, percentile: 95, window: 100, warmup_steps: 100}  "
        "# in place of type: norm",
    )


def _lingering(seen: _Seen) -> Iterator[Finding]:
    """Whether norms rose at once and stayed high."""
    steps, medians = seen.blocks
    found: list[tuple[int, float, int | None]] = []
    index = _BEFORE // 2
    while index + 1 < len(medians):
        usual = float(np.median(medians[max(0, index - _BEFORE) : index]))
        if medians[index : index + 2].min() <= _HIGH * usual:
            index += 1
            continue
        back = np.flatnonzero(medians[index:] <= _BACK * usual)
        until = index + int(back[0]) if len(back) else None
        times = float(medians[index:until].max()) / usual
        found.append((int(steps[index]), times, None if until is None else int(steps[until])))
        if until is None:
            break
        index = until + 1
    if not found:
        return
    step, times, end = max(found, key=lambda spike: spike[1])
    lasts = "and hadn't come back at the end" if end is None else f"and came back at step {end}"
    many = f"{len(found)} spikes lingered. " if len(found) > 1 else ""
    yield Finding(
        "lingering spike",
        f"{many}From about step {step} the usual norm was up to {times:.1f} times what it was "
        f"before, {lasts}.",
        "- {type: zclip}  # first among the policies: limits the step that begins it",
    )
