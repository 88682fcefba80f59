"""A made-up run with a spike, a step that isn't finite, and what its recorder would write."""

import math

from gradclip.records.trace_file import TraceHeader, write_trace

MARKUP = "<img src=x onerror=console.error(1)>"
SCRIPT = "</script><script>console.error(2)</script>"
BOLD = "<b>head</b>.weight"
NAMES = ("embed.weight", MARKUP, SCRIPT, BOLD)
SPIKE, BROKEN = 40, 70


def rows(steps=100, first=0):
    """Norm 1 under a limit of 2; one spike of 10, made of all by 64 % and 36 %; one NaN."""
    for index in range(steps):
        row = {
            "step": first + index,
            "batch": 2 * (first + index),
            "grad_norm": 1.0,
            "limit": 2.0 if index >= 10 else math.inf,
            "coef": 1.0,
            "clipped": False,
            "skipped": False,
            "finite": True,
            "loss": 3.0 - index / steps,
        }
        if index == SPIKE:
            norms = dict(zip(NAMES, (0.0, 8.0, 0.0, 6.0), strict=True))
            row |= {"grad_norm": 10.0, "coef": 0.2, "clipped": True, "per_parameter": norms}
        if index == BROKEN:
            norms = dict(zip(NAMES, (math.nan, 1.0, math.nan, 1.0), strict=True))
            row |= {"grad_norm": math.nan, "skipped": True, "finite": False}
            row |= {"per_parameter": norms}
        yield row


def write(path, norm_type=2.0, counts=None, **how):
    config = {"policies": [{"type": "norm", "max_norm": 2.0}]}
    header = TraceHeader(norm_type=norm_type, config=config, parameters=NAMES, counts=counts)
    write_trace(path, header, rows(**how))
    return path
