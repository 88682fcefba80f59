"""From the norms of a run to what to clip with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradclip.errors import ConfigError
from gradclip.tools.options import Option, fixed_threshold, recent_percentile, searched
from gradclip.tools.recent import Recent
from gradclip.tools.trace import Trace

__all__ = ["Recommendation", "recommend"]


@dataclass(frozen=True)
class Recommendation:
    """What to clip with.

    Attributes:
        clip_rate: The wanted share of steps.
        taken: The option to take.
        why: Why this one.
        options: All of them, a fixed threshold first.
        steps: How many steps have a norm.
        nonfinite: How many more weren't finite.
        facts: What the run was like.
    """

    clip_rate: float
    taken: Option
    why: str
    options: tuple[Option, ...]
    steps: int
    nonfinite: int
    facts: tuple[str, ...]


def recommend(
    trace: Trace,
    clip_rate: float = 0.05,
    *,
    start: int = 0,
    stop: int | None = None,
    quick: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Recommendation:
    """Settings that clip the wanted share of steps, fitted on the recent ones.

    Args:
        trace: Its norms are those before clipping.
        clip_rate: The wanted share, above 0 and at most 0.5.
        start: The first step to take.
        stop: The first step not to take any more; None for all.
        quick: Look only at a fixed threshold and at a percentile of recent norms.
        progress: Called with the share of the work that is done.

    Raises:
        ConfigError: If the rate is out of range, or there are too few steps.
    """
    if not 0 < clip_rate <= 0.5:
        msg = f"clip rate is {clip_rate:g}; allowed: above 0 and at most 0.5 (0.05 is 5 %)."
        raise ConfigError(msg)
    tell = progress or (lambda _: None)
    run = Recent(trace, clip_rate, start, stop, lambda share: tell(0.2 * share))
    options = [fixed_threshold(run), recent_percentile(run)]
    tell(0.3)
    if not quick:
        for option in searched(run, options[0]):
            options.append(option)
            tell(0.3 + 0.175 * (len(options) - 2))
    taken, why = _choose(options[0], options[1])
    facts = tuple(run.facts())
    return Recommendation(clip_rate, taken, why, tuple(options), run.steps, run.nonfinite, facts)


def _choose(fixed: Option, percentile: Option) -> tuple[Option, str]:
    if fixed.confidence == "high":
        return fixed, "Norms keep their level, and a fixed threshold is the simplest there is."
    return percentile, (
        "A fixed threshold isn't sure to hold here; a percentile of recent norms follows them, and "
        "its rate depends least on what they do."
    )
