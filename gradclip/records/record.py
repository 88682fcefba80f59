"""The record of one step, and the row that is kept of it; both on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["COLUMNS", "ByName", "ClipRecord"]

COLUMNS = (
    *("step", "batch", "loss", "grad_norm", "limit", "coef", "clipped_norm", "clip_rate"),
    *("has_gradient", "clipped", "skipped", "nonfinite", "taken", "dropped"),
)
"""What a row of the last steps holds. Batch is -1 and loss NaN where they are unknown."""


@dataclass(frozen=True, slots=True, repr=False)
class ClipRecord:
    """One clipping step. Plain 0-d tensors on the device, equal on every rank.

    Reading one on the host (`float(record.grad_norm)`) waits for the device; when to do that is
    the caller's choice.

    Attributes:
        grad_norm: Float64. Norm of all gradients before clipping; NaN or inf if they are.
        limit: Float64. The tightest limit any slot was held to; inf if there was none.
        coef: Float64. The smallest factor any slot was multiplied by; 1 if nothing was scaled.
        clipped_norm: Float64. Norm after clipping. NaN if elements were changed one by one: that
            norm isn't known without reading the gradients again.
        clipped: Bool. Some gradient was changed.
        skipped: Bool. The optimizer step was withheld.
        finite: Bool. Every gradient element on every rank was finite.
        clip_rate: Float64. Share of the steps so far that were clipped.
        has_gradient: Bool. Some rank had a gradient, of zeros or not; else it isn't counted as a
            step.
        per_parameter: Norm before clipping by parameter name; empty unless asked for.
        norm_type: p of these norms, that of the first policy that has one.
        dropped: Float64. Micro-batches that were left out; None but for `stage: after_backward`,
            whose steps are described by their worst micro-batch (docs/step.md).
    """

    grad_norm: Tensor
    limit: Tensor
    coef: Tensor
    clipped_norm: Tensor
    clipped: Tensor
    skipped: Tensor
    finite: Tensor
    clip_rate: Tensor
    has_gradient: Tensor
    per_parameter: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    norm_type: float = 2.0
    dropped: Tensor | None = None

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
        keys = ("grad_norm", "limit", "coef", "clipped_norm", "clipped", "skipped", "clip_rate")
        metrics = {f"clip/{key}": getattr(self, key).double() for key in keys}
        if self.dropped is not None:
            metrics["clip/dropped"] = self.dropped
        norms = {f"clip/grad_norms/{name}": norm for name, norm in self.per_parameter.items()}
        return metrics | norms


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
