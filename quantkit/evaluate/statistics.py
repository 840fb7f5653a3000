"""What two runs over the same items can and cannot say. Pure: numbers in, numbers out; scores lie in 0 to 1.

The two models answer the same prompts, so every comparison is paired: its error comes from the items on which they
differ, not from the difficulty of the items (Miller 2024, arXiv 2411.00640, section 3).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, exp, lgamma, log, sqrt
from statistics import NormalDist
from typing import Literal

Verdict = Literal["pass", "fail", "not resolved", "floor: no information"]

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 2000
_EXACT_UP_TO = 1000  # 2 ** 1000 still fits a float's exponent


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Mean of candidate - baseline over paired items, with its standard error and interval."""

    mean: float
    standard_error: float
    interval: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Baseline against candidate on the same n items.

    recovery is candidate / baseline; it and its interval are None when the baseline scores zero. lost and gained
    count items whose score fell and rose; p_value is McNemar's; detectable is the smallest difference that n items
    with this many flips show with 80 % power; smallest_recovery and verdict belong to the gate.
    """

    n: int
    baseline: float
    candidate: float
    difference: Difference
    recovery: float | None
    recovery_interval: Interval | None
    lost: int
    gained: int
    p_value: float
    detectable: float
    smallest_recovery: float
    verdict: Verdict

    @property
    def flips(self) -> float:
        """Share of items whose score changed, either way."""
        return (self.lost + self.gained) / self.n

    @property
    def text(self) -> str:
        """The verdict in words, with n and the detectable difference where it is not resolved."""
        if self.verdict != "not resolved":
            return self.verdict
        return f"not resolved (n = {self.n}, detectable {100 * self.detectable:.1f} pp)"


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Interval of a proportion (Wilson 1927); unlike mean +- z SE it has a width at 0 and n successes."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n with n > 0, found {successes} of {n}")
    z, share = _z(level), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(low=max(0.0, middle - half), high=min(1.0, middle + half))


def mean_interval(scores: Sequence[float], level: float = LEVEL) -> Interval:
    """Interval of a mean score: Wilson's for right and wrong, else the normal one over items, within 0 and 1."""
    n, mean = len(scores), sum(scores) / len(scores)
    if {*scores} <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), n, level)
    variance = sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.25
    half = _z(level) * sqrt(variance / n)
    return Interval(low=max(0.0, mean - half), high=min(1.0, mean + half))


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin thrown lost + gained times (McNemar 1947)."""
    n, fewer = lost + gained, min(lost, gained)
    if n <= _EXACT_UP_TO:
        tail: float = sum(comb(n, k) for k in range(fewer + 1)) / 2**n
    else:
        tail = sum(
            exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2))
            for k in range(fewer + 1)
        )
    return min(1.0, 2 * tail)


def paired_difference(
    baseline: Sequence[float], candidate: Sequence[float], level: float = LEVEL
) -> Difference:
    """Mean difference, SE = sd(d) / sqrt(n) and normal interval (Miller 2024, eq. 7); needs two items or more."""
    changes = _changes(baseline, candidate)
    n, mean = len(changes), sum(changes) / len(changes)
    error = sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1) / n)
    half = _z(level) * error
    return Difference(
        mean=mean, standard_error=error, interval=Interval(low=mean - half, high=mean + half)
    )


def paired_proportions_interval(lost: int, gained: int, n: int, level: float = LEVEL) -> Interval:
    """Interval of a difference of paired proportions (Bonett & Price 2012, eq. 5): one item is added to each side.

    With few flips the plain interval is too narrow, and with none it has no width at all.
    """
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = _z(level) * sqrt((down + up - (up - down) ** 2) / (n + 2))
    return Interval(low=max(-1.0, up - down - half), high=min(1.0, up - down + half))


def bootstrap_interval(
    baseline: Sequence[float],
    candidate: Sequence[float],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean difference over items drawn with replacement, both scores together (Efron 1979).

    The same seed gives the same interval.
    """
    changes = _changes(baseline, candidate)
    counts: dict[float, int] = {}
    for change in changes:
        counts[change] = counts.get(change, 0) + 1
    generator, kinds, weights = random.Random(seed), list(counts), list(counts.values())
    values = sorted(
        sum(generator.choices(kinds, weights=weights, k=len(changes))) / len(changes)
        for _ in range(resamples)
    )
    return Interval(low=_quantile(values, (1 - level) / 2), high=_quantile(values, (1 + level) / 2))


def recovery_interval(baseline: float, difference: Interval) -> Interval:
    """Interval of candidate / baseline: (baseline + limits of the difference) / baseline.

    The baseline's score counts as known. So the interval lies above a share to be kept just when that of the difference
    excludes the loss: the two never contradict each other, and few flips leave neither without a width.
    """
    return Interval(
        low=max(0.0, 1 + difference.low / baseline), high=1 + difference.high / baseline
    )


def minimum_detectable_difference(
    flips: float, n: int, power: float = POWER, level: float = LEVEL
) -> float:
    """The smallest true difference that a paired test of n items shows with this power.

    flips: share of items whose score changes; (z_level + z_power) sqrt(flips / n), Miller 2024, eq. 9.
    """
    return (_z(level) + NormalDist().inv_cdf(power)) * sqrt(flips / n)


def decide_verdict(interval: Interval, margin: float) -> Verdict:
    """Non-inferiority: "pass" when a loss beyond `margin` is excluded, "fail" when a loss of the margin or less is.

    interval: of candidate - baseline; margin: the loss that is allowed, 0 or more.
    """
    if interval.low >= -margin:
        return "pass"
    return "fail" if interval.high < -margin else "not resolved"


def compare_scores(
    baseline: Sequence[float],
    candidate: Sequence[float],
    smallest_recovery: float = 0.99,
    level: float = LEVEL,
) -> Comparison:
    """Everything about one task, or about several whose items are put together.

    baseline, candidate: scores of the same items in the same order; smallest_recovery: the share of the baseline's
    score that has to be kept. When both score zero nothing was measured, and the verdict says so.
    """
    changes = _changes(baseline, candidate)
    n, difference = len(changes), paired_difference(baseline, candidate, level)
    first, second = sum(baseline) / n, sum(candidate) / n
    lost, gained = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    if {*baseline, *candidate} <= {0.0, 1.0} or not lost + gained:
        interval = paired_proportions_interval(lost, gained, n, level)
    else:  # means of several answers
        interval = bootstrap_interval(baseline, candidate, level)
    difference = replace(difference, interval=interval)
    if first == 0 and second == 0:
        verdict: Verdict = "floor: no information"
    else:
        verdict = decide_verdict(difference.interval, (1 - smallest_recovery) * first)
    return Comparison(
        n=n, baseline=first, candidate=second, difference=difference, recovery=second / first if first else None,
        recovery_interval=recovery_interval(first, interval) if first else None, lost=lost, gained=gained,
        p_value=mcnemar_p_value(lost, gained),
        detectable=minimum_detectable_difference(max(lost + gained, 1) / n, n, level=level),  # no flip seen: count one
        smallest_recovery=smallest_recovery, verdict=verdict,
    )  # fmt: skip


def _changes(baseline: Sequence[float], candidate: Sequence[float]) -> list[float]:
    if len(baseline) != len(candidate) or len(baseline) < 2:
        raise ValueError(
            f"expected two or more paired items, found {len(baseline)} and {len(candidate)}"
        )
    return [second - first for first, second in zip(baseline, candidate, strict=True)]


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest values."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
