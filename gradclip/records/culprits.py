"""Which parameters made a gradient norm large, or not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["not_finite", "shares"]


def shares(per_parameter: Mapping[str, float], norm_type: float = 2.0) -> list[tuple[str, float]]:
    """How much of the norm each parameter accounts for, largest first.

    Args:
        per_parameter: Norm before clipping by parameter name. Norms that aren't finite are left
            out; the shares are of the norm of the others.
        norm_type: p of the norms, `inf` included.

    Returns:
        Names and shares. With n the norm of a parameter and N the norm of all, a share is
        (n / N)^p, and shares add up to 1; for p = inf it is n / N. Equal shares keep their order.

    Example:
        >>> shares({"body": 3.0, "head": 4.0})
        [('head', 0.64), ('body', 0.36)]
    """
    norms = {name: norm for name, norm in per_parameter.items() if math.isfinite(norm)}
    largest = max(norms.values(), default=0.0)
    if largest == 0:
        return [(name, 0.0) for name in norms]
    power = 1.0 if math.isinf(norm_type) else norm_type
    parts = {name: (norm / largest) ** power for name, norm in norms.items()}
    whole = 1.0 if math.isinf(norm_type) else sum(parts.values())
    found = [(name, part / whole) for name, part in parts.items()]
    return sorted(found, key=lambda one: one[1], reverse=True)


def not_finite(per_parameter: dict[str, float]) -> list[str]:
    """Parameters whose gradient has a NaN or an infinity, the nearest to the loss first.

    Backward runs from the loss to the first layer and carries a NaN along, so look first at the
    parameter nearest to the loss.

    Args:
        per_parameter: Norm before clipping by parameter name, in the model's order.

    Example:
        >>> not_finite({"embed": math.nan, "body": math.nan, "head": 1.0})
        ['body', 'embed']
    """
    return [name for name, norm in reversed(per_parameter.items()) if not math.isfinite(norm)]
