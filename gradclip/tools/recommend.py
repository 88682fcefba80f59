"""From the norms of a run to settings that clip the wanted share of steps, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import yaml

from gradclip.config import ClipConfig, parse_mapping
from gradclip.errors import ConfigError
from gradclip.policies import Policy
from gradclip.tools.curves import Bools, Floats
from gradclip.tools.player import Player
from gradclip.tools.recent import Recent
from gradclip.tools.trace import StepSource

__all__ = ["Option", "Recommendation", "recommend"]

Confidence = Literal["high", "medium", "low"]

_CANDIDATES = 24
_WELL_KNOWN = 0.05
"""A fixed threshold is sure where two standard deviations are within a tenth of the rate."""


@dataclass(frozen=True)
class Option:
    """One way to clip the wanted share of the steps.

    Attributes:
        name: Of the option.
        config: Settings, as a mapping that `ClipConfig` validates.
        first: The first step it was fitted on.
        last: The last.
        rate: The share of these steps that it clips or withholds.
        parts: The same for each eighth of these steps, in order.
        later_rate: The share of the second half of these steps that it clips, when fitted (if it
            is fitted at all) on the first half.
        error: One standard deviation of `later_rate` by chance alone.
        confidence: How sure it is that the next steps of such a run are clipped as often.
        reasons: Why, a sentence each.
    """

    name: str
    config: Mapping[str, Any]
    first: int
    last: int
    rate: float
    parts: tuple[float, ...]
    later_rate: float
    error: float
    confidence: Confidence
    reasons: tuple[str, ...]

    @property
    def yaml(self) -> str:
        """The settings, ready to paste."""
        return yaml.safe_dump(dict(self.config), sort_keys=False)


@dataclass(frozen=True)
class Recommendation:
    """What to clip with.

    Attributes:
        clip_rate: The wanted share of steps.
        taken: The recommended option.
        why: Why this one.
        options: All that were tried, a fixed threshold first.
        steps: How many steps have a norm.
        nonfinite: How many more weren't finite.
        facts: What the run was like, a sentence each.
    """

    clip_rate: float
    taken: Option
    why: str
    options: tuple[Option, ...]
    steps: int
    nonfinite: int
    facts: tuple[str, ...]


def recommend(
    trace: StepSource,
    clip_rate: float = 0.05,
    *,
    start: int = 0,
    stop: int | None = None,
    every_policy: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Recommendation:
    """Settings that clip the wanted share of steps, fitted on the recent ones.

    Args:
        trace: Its norms are those before clipping.
        clip_rate: The wanted share, above 0 and at most 0.5.
        start: The first step.
        stop: The step after the last; None for all.
        every_policy: Also fit policies whose rate depends on how norms scatter, so that none is
            sure; it takes ten times as long.
        progress: Called with the share of the work that is done.

    Raises:
        ConfigError: If the rate is out of range, or there are too few steps.
    """
    if not 0 < clip_rate <= 0.5:
        msg = f"clip rate is {clip_rate:g}; allowed: above 0 and at most 0.5 (0.05 is 5 %)."
        raise ConfigError(msg)
    tell = progress or (lambda _: None)
    reading = 0.2 if every_policy else 0.7
    run = Recent(trace, clip_rate, start, stop, lambda share: tell(reading * share))
    fixed, percentile = _fixed_threshold(run), _recent_percentile(run)
    options = [fixed, percentile]
    tell(0.3 if every_policy else 1.0)
    if every_policy:
        for option in _searched(run, fixed):
            options.append(option)
            tell(0.3 + 0.175 * (len(options) - 2))
    taken, why = fixed, "Norms keep their level, and a fixed threshold is the simplest there is."
    if fixed.confidence != "high":
        taken = percentile
        why = (
            "A fixed threshold isn't sure to hold here; a percentile of recent norms follows them, "
            "and its rate depends least on what they do."
        )
    facts = tuple(run.facts())
    return Recommendation(clip_rate, taken, why, tuple(options), run.steps, run.nonfinite, facts)


def _fixed_threshold(run: Recent) -> Option:
    """A threshold fitted on the longest recent stretch of steps over which it would have held."""
    wanted, norms = run.wanted, run.sample
    fewest = min(len(norms), max(100, math.ceil(10 / wanted)))
    stretches = [n for share in (0.9, 0.45, 0.225, 0.1125) if (n := int(share * len(norms)))]
    stretches = [n for n in stretches if n >= fewest] or [int(0.9 * len(norms))]
    for count in stretches:
        early, late = np.array_split(norms[-count:], 2)
        later = float((late > np.quantile(early, 1 - wanted)).mean())
        error = _error(wanted, len(early), len(late))
        if abs(later - wanted) <= max(0.1 * wanted, 2 * error):
            break
    limit = _rounded(float(np.quantile(norms[-count:], 1 - wanted)))
    option = _option(
        "fixed threshold",
        {"policies": [_policy("norm", run, max_norm=limit)]},
        (int(run.sample_steps[-count]), int(run.sample_steps[-1])),
        norms[-count:] > limit,
        later,
        wanted,
    )
    reasons = [*option.reasons, "Norms move with the learning rate, and it doesn't follow."]
    sure = option.confidence
    if count != stretches[0]:
        sure = "low"
        reasons.append("Norms moved earlier in the run: it is fitted on the last part alone.")
    elif sure == "high" and error > _WELL_KNOWN * wanted:
        sure = "medium"
        reasons.append(
            f"{count} steps tell it only to within {2 * error / wanted:.0%} of the rate."
        )
    return replace(option, confidence=sure, reasons=tuple(reasons))


def _recent_percentile(run: Recent) -> Option:
    """The percentile of recent norms that the wanted share of norms is above.

    If all norms follow one law, a share of (1 - rank / (window + 1)) of them is above the norm of
    that rank among the last `window`. It is fitted only if a replay differs by more than chance.
    """
    wanted = run.wanted
    window = int(min(1000, max(100, math.ceil(2 / wanted))))
    share = min(1.0, ((1 - wanted) * (window + 1) - 1) / (window - 1))
    made = {"window": window, "warmup_steps": 100}
    policy = _policy("autoclip", run, percentile=_rounded(100 * share), **made)
    plain = {"policies": [policy]}
    touched = _touched(run, parse_mapping(plain))[-run.counted :, 0]
    if abs(touched.mean() - wanted) > 3 * math.sqrt(wanted * (1 - wanted) / run.counted):
        shares = np.minimum(np.geomspace(3, 1 / 3, _CANDIDATES) * wanted, 0.95)
        return _fitted(run, _Search("autoclip", [policy], "percentile", 100 * (1 - shares)))
    later = float(np.array_split(touched, 2)[1].mean())
    return _option("autoclip", plain, run.ends, touched, later, wanted, fitted=False)


@dataclass(frozen=True)
class _Search:
    """A family of settings that differ in one field of one policy."""

    name: str
    policies: Sequence[Mapping[str, Any]]
    field: str
    values: Floats


def _searched(run: Recent, fixed: Option) -> Iterator[Option]:
    """For each other policy, the value of one field at which it touches the wanted share.

    To touch a step is to clip or to withhold it.
    """
    scores = np.geomspace(0.1, 12, _CANDIDATES)
    ema = _policy("ema", run, factor=2.0, decay=0.97, warmup_steps=50)
    yield _fitted(run, _Search("ema", [ema], "factor", np.geomspace(1.01, 10, _CANDIDATES)))
    warm = {"warmup_steps": 50, "max_norm": None}
    zclips = [_policy("zclip", run, z_threshold=2.5, decay=d, **warm) for d in (0.9, 0.97)]
    fits = [_fitted(run, _Search("zclip", [zclip], "z_threshold", scores)) for zclip in zclips]
    even = min((0, 1), key=lambda i: np.square(np.subtract(fits[i].parts, run.wanted)).mean())
    yield fits[even]
    under = [zclips[even], _policy("norm", run, max_norm=_ceiling(run, fixed))]
    yield _fitted(run, _Search("zclip under a ceiling", under, "z_threshold", scores))
    skip = _policy("skip_spike", run, z_threshold=6.0)
    yield _fitted(run, _Search("skip_spike", [skip], "z_threshold", np.geomspace(1.5, 12, 6)))


def _fitted(run: Recent, search: _Search) -> Option:
    """The settings of a family that touch the wanted share of the last steps."""
    touched = _touched_by_all(run, search)[-run.counted :]
    early, late = np.array_split(touched, 2)
    _, index = _crossing(early.mean(0), search.values, run.wanted)
    later = float(np.interp(index, np.arange(len(search.values)), late.mean(0)))
    value, _ = _crossing(touched.mean(0), search.values, run.wanted)
    config = {"policies": _with(search, _rounded(value))}
    exact = _touched(run, parse_mapping(config))[-run.counted :, 0]
    doubts = ["Its rate depends on how norms scatter, which changes as a run goes on."]
    if search.name == "skip_spike":
        doubts.append("It withholds whole steps: for rare spikes, not for a share of all steps.")
    return _option(search.name, config, run.ends, exact, later, run.wanted, doubts=doubts)


def _touched_by_all(run: Recent, search: _Search) -> Bools:
    """Whether each value of the field touches a step, of shape (steps, values)."""
    first = parse_mapping({"policies": list(search.policies)})
    policy = first.policies[0]
    if policy.withholds:  # withholds whole steps, so that values can't share a replay
        each = [parse_mapping({"policies": _with(search, float(v))}) for v in search.values]
        return np.concatenate([_touched(run, config) for config in each], axis=1)
    # A policy computes all slots at once: with a slot for each value, one replay does for all.
    many: Policy = policy.model_copy(update={search.field: torch.from_numpy(search.values)})
    config = first.model_copy(update={"policies": [many, *first.policies[1:]]})
    return _touched(run, config, len(search.values))


def _touched(run: Recent, config: ClipConfig, slots: int = 1) -> Bools:
    player = Player(config, run.norm_type, slots)
    made = player.decide(run.tail_steps, run.tail, np.full(len(run.tail), np.nan))
    touched: Bools = (made.coef < 1) | made.skipped[:, None]
    return touched


def _crossing(rates: Floats, values: Floats, wanted: float) -> tuple[float, float]:
    """The value at which falling rates cross the wanted rate, and its fractional index."""
    falling = np.minimum.accumulate(rates)
    indices = np.arange(len(values))
    index = float(np.interp(-wanted, -falling, indices))
    return float(np.interp(index, indices, values)), index


def _option(
    name: str,
    config: Mapping[str, Any],
    steps: tuple[int, int],
    touched: Bools,
    later: float,
    wanted: float,
    *,
    doubts: Sequence[str] = (),
    fitted: bool = True,
) -> Option:
    """An option with its rates and how sure it is."""
    count = len(touched)
    error = _error(wanted, count - count // 2 if fitted else math.inf, count // 2)
    miss = abs(later - wanted)
    how = "Fitted on the first half, it" if fitted else "Without fitting, it"
    reasons = [
        f"{how} touches {later:.2%} of the second half of these steps, {miss / wanted:.0%} off the "
        f"wanted rate; chance alone makes that {error / wanted:.0%} (one standard deviation).",
        *doubts,
    ]
    if error > 0.25 * wanted:
        reasons.append(f"{count} steps are few for so low a rate.")
    sure: Confidence = "high"
    if miss > max(0.25 * wanted, 4 * error) or max(miss, error) > 0.5 * wanted:
        sure = "low"
    elif doubts or miss > max(0.1 * wanted, 2 * error) or error > 0.25 * wanted:
        sure = "medium"
    parts = tuple(float(part.mean()) for part in np.array_split(touched, 8))
    rate = float(touched.mean())
    return Option(name, config, *steps, rate, parts, later, error, sure, tuple(reasons))


def _ceiling(run: Recent, fixed: Option) -> float:
    """A threshold that a fifth of the wanted share of norms is above."""
    inside = run.sample_steps >= fixed.first
    return _rounded(float(np.quantile(run.sample[inside], 1 - run.wanted / 5)))


def _policy(kind: str, run: Recent, **fields: Any) -> dict[str, Any]:
    other = {} if run.norm_type == 2 else {"norm_type": run.norm_type}
    return {"type": kind, **fields, **other}


def _with(search: _Search, value: float) -> list[dict[str, Any]]:
    first, *rest = search.policies
    return [{**first, search.field: value}, *map(dict, rest)]


def _error(rate: float, first: float, second: float) -> float:
    """Standard deviation of the difference of two rates, each over so many steps."""
    return math.sqrt(rate * (1 - rate) * (1 / max(1, first) + 1 / max(1, second)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
