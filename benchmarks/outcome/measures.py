"""Numbers about a run that aren't its final loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW, LEAST, SIGMAS = 100, 20, 6.0
BEFORE, AFTER, MORE = 50, 10, 0.1


def spike_score(losses: Sequence[float]) -> float:
    """OLMo's: the share of losses more than six deviations from the mean of those before.

    OLMo looks at 1000 losses before; runs here are shorter, so it is 100.
    """
    spikes = 0
    for i in range(LEAST, len(losses)):
        before = np.asarray(losses[max(0, i - WINDOW) : i])
        spikes += not abs(losses[i] - before.mean()) <= SIGMAS * before.std()
    return spikes / max(1, len(losses) - LEAST)


def steps_to_follow(clipped: Sequence[bool], change: int) -> int:
    """Steps after a lasting change until clipping is as rare as it was before.

    That is when 10 steps clip at most a tenth more of them than the 50 before the change did. If
    that never happens, all steps that were left; -1 if the run ended before the change.
    """
    if len(clipped) <= change:
        return -1
    usual = float(np.mean(clipped[max(0, change - BEFORE) : change]))
    for start in range(change, len(clipped) - AFTER + 1):
        if np.mean(clipped[start : start + AFTER]) <= usual + MORE:
            return start - change
    return len(clipped) - change
