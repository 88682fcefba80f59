"""The record of one step, and what it and the step's row are made of when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["COLUMNS", "ByName", "ClipRecord", "Facts", "Flag", "Value", "either", "negated"]

COLUMNS = (
    *("step", "batch", "loss", "grad_norm", "limit", "coef", "clipped_norm", "clip_rate"),
    *("has_gradient", "clipped", "skipped", "nonfinite", "taken", "dropped"),
)
"""What a row of the last steps holds. Batch is -1 and loss NaN where they are unknown."""

Value = Any
"""A 0-d tensor on the device; a number where the host knows it."""
Flag = Any
"""The same of what is true or false."""


@dataclass(slots=True)
class Facts:
    """What was found of one step. All else of its record and of its row follows from this.

    Nothing is made of it in a step: a tensor operation costs more than all arithmetic in it.

    Attributes:
        grad_norm: Float64, before clipping.
        limit: Float64.
        coef: Float64, the smallest factor of any slot, also of a step that is withheld.
        finite: Every gradient element on every rank is finite.
        has_gradient: Some rank has a gradient.
        clipped_norm: Float64, had the step been taken; None for `coef * grad_norm`.
        skip: The step is withheld; None if nothing can withhold one.
        keeps: It is sound and not withheld; None where that isn't made yet.
        changed: Gradients change beside what `coef` says; None if nothing can.
        sound: What the optimizer steps with is finite; None for `finite`.
        dropped: Float64, micro-batches that were left out; None but for `stage: after_backward`.
        loss: Float64; None if it isn't known.
        batch: Index of the step's last batch; None if it isn't known.
        late_skip: A later evaluation of the step's closure is withheld; None without one.
        late_nonfinite: A later evaluation isn't finite; None without one.
        counted: Steps and clipped steps up to this one; None until they are asked for.
        before: The step before, or the counts up to it; None once `counted` is known.
    """

    grad_norm: Value
    limit: Value
    coef: Value
    finite: Flag
    has_gradient: Flag
    clipped_norm: Value | None = None
    skip: Flag | None = None
    keeps: Flag | None = None
    changed: Flag | None = None
    sound: Flag | None = None
    dropped: Value | None = None
    loss: Value | None = None
    batch: int | None = None
    late_skip: Flag | None = None
    late_nonfinite: Flag | None = None
    counted: tuple[Value, Value] | None = None
    before: Facts | tuple[Value, Value] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the host doesn't know, by name."""
        held = {name: getattr(self, name) for name in _FOUND}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    @property
    def clipped(self) -> Flag:
        """Some gradient was changed."""
        scaled = self.coef < 1
        if self.changed is not None:
            scaled = scaled | self.changed
        return scaled if self.skip is None else scaled & negated(self.skip)

    @property
    def skipped(self) -> Flag:
        """The step was withheld."""
        skipped = either(self.skip, self.late_skip)
        return False if skipped is None else skipped

    @property
    def nonfinite(self) -> Flag:
        """A gradient wasn't finite."""
        nonfinite = negated(self.finite)
        return nonfinite if self.late_nonfinite is None else nonfinite | self.late_nonfinite

    @property
    def outcome(self) -> tuple[float, float]:
        """Coefficient, and norm after it, of a step of which the host knows all."""
        if self.skip:
            return 1.0, self.grad_norm
        norm = self.grad_norm * self.coef if self.clipped_norm is None else self.clipped_norm
        return self.coef, norm

    @property
    def taken(self) -> Flag:
        """The optimizer's step moved parameters."""
        taken, withheld = self.keeps, [self.late_skip, self.late_nonfinite]
        if taken is None:
            taken, withheld = (
                self.finite if self.sound is None else self.sound,
                [*withheld, self.skip],
            )
        for flag in withheld:
            if flag is not None:
                taken = taken & negated(flag)
        return taken if self.has_gradient is True else taken & self.has_gradient

    @property
    def counts(self) -> tuple[Value, Value]:
        """Steps and clipped steps up to this one."""
        unknown: list[Facts] = []
        at: Facts | tuple[Value, Value] | None = self
        while isinstance(at, Facts) and at.counted is None:
            unknown.append(at)
            at = at.before
        steps, clipped = (at.counted if isinstance(at, Facts) else at) or (0.0, 0.0)
        for one in reversed(unknown):
            steps, clipped = _plus(steps, one.has_gradient), _plus(clipped, one.clipped)
            one.counted, one.before = (steps, clipped), None
        return steps, clipped


_FOUND = [field.name for field in fields(Facts) if field.name not in ("keeps", "counted", "before")]


_METRICS = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")


class ClipRecord:
    """One clipping step. Plain 0-d tensors on the device, equal on every rank.

    Reading one on the host (`float(record.grad_norm)`) waits for the device; when to do that is
    the caller's choice. Each is made when it is asked for.

    Attributes:
        per_parameter: Norm before clipping by parameter name; empty unless asked for.
        norm_type: p of these norms, that of the first policy that has one.
    """

    __slots__ = ("_device", "_facts", "norm_type", "per_parameter")

    def __init__(
        self,
        facts: Facts,
        device: torch.device,
        per_parameter: Mapping[str, Tensor],
        norm_type: float,
    ) -> None:
        self._facts = facts
        self._device = device
        self.per_parameter = per_parameter
        self.norm_type = norm_type

    def __reduce__(self) -> tuple[type[ClipRecord], tuple[Any, ...]]:
        """A copy doesn't need the steps before."""
        _ = self._facts.counts
        return ClipRecord, (self._facts, self._device, self.per_parameter, self.norm_type)

    @property
    def grad_norm(self) -> Tensor:
        """Float64. Norm of all gradients before clipping; NaN or inf if they are."""
        return self._number(self._facts.grad_norm)

    @property
    def limit(self) -> Tensor:
        """Float64. The tightest limit any slot was held to; inf if there was none."""
        return self._number(self._facts.limit)

    @property
    def coef(self) -> Tensor:
        """Float64. The smallest factor any slot was multiplied by; 1 if nothing was scaled."""
        return self._unless_skipped(self._facts.coef, 1.0)

    @property
    def clipped_norm(self) -> Tensor:
        """Float64. Norm after clipping.

        NaN if elements were changed one by one: that norm isn't known without reading the
        gradients again.
        """
        facts, norm = self._facts, self._facts.clipped_norm
        return self._unless_skipped(
            facts.grad_norm * facts.coef if norm is None else norm, facts.grad_norm
        )

    @property
    def clipped(self) -> Tensor:
        """Bool. Some gradient was changed."""
        return self._flag(self._facts.clipped)

    @property
    def skipped(self) -> Tensor:
        """Bool. The optimizer step was withheld."""
        return self._flag(self._facts.skipped)

    @property
    def finite(self) -> Tensor:
        """Bool. Every gradient element on every rank was finite."""
        return self._flag(negated(self._facts.nonfinite))

    @property
    def clip_rate(self) -> Tensor:
        """Float64. Share of the steps so far that were clipped."""
        steps, clipped = map(self._number, self._facts.counts)
        return clipped / steps.clamp(min=1)

    @property
    def has_gradient(self) -> Tensor:
        """Bool. Some rank had a gradient, of zeros or not; else it isn't counted as a step."""
        return self._flag(self._facts.has_gradient)

    @property
    def dropped(self) -> Tensor | None:
        """Float64. Micro-batches that were left out; None but for `stage: after_backward`.

        Steps of that stage are described by their worst micro-batch (docs/step.md).
        """
        dropped = self._facts.dropped
        return None if dropped is None else self._number(dropped)

    def __repr__(self) -> str:
        """The numbers, which reads them on the host."""
        names = ("grad_norm", "limit", "coef", "clipped_norm", "clip_rate")
        numbers = [f"{name}={float(getattr(self, name)):.4g}" for name in names]
        flags = [f"{name}={bool(getattr(self, name))}" for name in ("clipped", "skipped", "finite")]
        return f"ClipRecord({', '.join(numbers + flags)})"

    def as_metrics(self) -> dict[str, Tensor]:
        """Float 0-d tensors by metric key, still on the device.

        Returns:
            `clip/grad_norm`, `clip/limit`, `clip/coef`, `clip/clipped_norm`, `clip/clipped`,
            `clip/skipped`, `clip/clip_rate`, and where recorded `clip/dropped` and
            `clip/grad_norms/<parameter>`.
        """
        facts = self._facts
        if isinstance(facts.grad_norm, Tensor):
            found = [getattr(self, name).double() for name in _METRICS]
        else:  # all are known: one tensor is made for all of them
            steps, clipped = facts.counts
            coef, norm = facts.outcome
            flags = (float(facts.clipped), float(facts.skipped))
            numbers = (facts.grad_norm, facts.limit, coef, norm, *flags, clipped / max(steps, 1.0))
            found = list(torch.tensor(numbers, dtype=torch.float64, device=self._device).unbind())
        metrics = {f"clip/{name}": value for name, value in zip(_METRICS, found, strict=True)}
        if self.dropped is not None:
            metrics["clip/dropped"] = self.dropped
        norms = {f"clip/grad_norms/{name}": norm for name, norm in self.per_parameter.items()}
        return metrics | norms

    def _unless_skipped(self, value: Value, otherwise: Value) -> Tensor:
        skip = self._facts.skip
        if skip is None:
            return self._number(value)
        if not isinstance(skip, Tensor):
            return self._number(otherwise if skip else value)
        return torch.where(skip, otherwise, self._number(value))

    def _number(self, value: Value) -> Tensor:
        if isinstance(value, Tensor):
            return value.double()
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _flag(self, value: Flag) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=torch.bool, device=self._device)


def _plus(total: Value, flag: Flag) -> Value:
    return total + (flag.double() if isinstance(flag, Tensor) else flag)


def negated(flag: Flag) -> Flag:
    """What isn't so."""
    return flag.logical_not() if isinstance(flag, Tensor) else not flag


def either(a: Flag | None, b: Flag | None) -> Flag | None:
    """Whether one of two holds; None stands for what can't hold."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


class ByName(Mapping[str, Tensor]):
    """Values of one tensor by name, of which a view is made when one is asked for.

    Args:
        indices: The index of each name's value.
        values: Shape (names,).
    """

    def __init__(self, indices: Mapping[str, int], values: Tensor) -> None:
        self._indices = indices
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        return self._values.select(0, self._indices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
