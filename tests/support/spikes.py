"""A gradient that goes wrong in one layer, whatever cuts the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradclip.records.culprits import not_finite, shares


def spike_in(layer: nn.Module, factor: Callable[[], float]) -> None:
    """Multiply the gradients of a layer's own parameters; layers before it don't see it.

    Args:
        layer: With one input and one output. Hooks are set for good.
        factor: Asked in every forward; NaN leaves the layers before it without a gradient.
    """

    def before(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        by, x = factor(), inputs[0]
        if by != 1 and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda grad: grad.nan_to_num(0.0) if math.isnan(by) else grad / by)
        return (x,)

    def after(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        by = factor()
        if by != 1:
            output.register_hook(lambda grad: grad * by)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def flight(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Header and steps, by number, of a flight record."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return header, {row["step"]: row for row in rows}


def blamed(header: dict[str, Any], step: dict[str, Any], layer: str) -> tuple[float, set[str]]:
    """Which share of a step's norm is a layer's, and whose gradients weren't finite."""
    norms = {k: math.nan if v is None else v for k, v in step["per_parameter"].items()}
    parts = shares(norms, header["norm_type"])
    own = sum(part for name, part in parts if name.startswith(f"{layer}."))
    return own, set(not_finite(norms))
