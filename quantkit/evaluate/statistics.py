"""Statistics of paired benchmark scores. Pure: numbers in, numbers out; scores lie in 0 to 1.

Both models answer the same prompts, so every comparison is paired: its error comes from the items
on which the models differ, not from the difficulty of the items (Miller 2024, arXiv 2411.00640,
section 3).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import numpy as np
import scipy  # scipy.stats is loaded at its first use: a second of start-up

Verdict = Literal["pass", "fail", "not resolved", "floor: no information"]

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 2000


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

    recovery is candidate / baseline; it and its interval are None if the baseline scores zero. lost
    and gained count items whose score fell and rose; p_value is McNemar's; detectable is the
    smallest difference that n items with this many flips detect with 80 % power; smallest_recovery
    is the share that the gate requires.
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
        """The verdict in words, with n and the detectable difference if it is not resolved."""
        if self.verdict != "not resolved":
            return self.verdict
        return f"not resolved (n = {self.n}, detectable {100 * self.detectable:.1f} pp)"


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Return the interval of a proportion (Wilson 1927).

    Unlike mean +- z SE it has a width at 0 and n successes.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n with n > 0, found {successes} of {n}")
    limits = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(low=float(limits.low), high=float(limits.high))


def mean_interval(scores: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the interval of a mean score: Wilson's for 0 and 1, else the normal one."""
    n, mean = len(scores), sum(scores) / len(scores)
    if {*scores} <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), n, level)
    variance = sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.25
    half_width = _normal_quantile(level) * sqrt(variance / n)
    return Interval(low=max(0.0, mean - half_width), high=min(1.0, mean + half_width))


def mcnemar_p_value(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947)."""
    return float(scipy.stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def paired_difference(
    baseline: Sequence[float], candidate: Sequence[float], level: float = LEVEL
) -> Difference:
    """Return mean difference, SE = sd(d) / sqrt(n) and normal interval (Miller 2024, eq. 7).

    N >= 2.
    """
    changes = _subtract(baseline, candidate)
    n, mean = len(changes), sum(changes) / len(changes)
    error = sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1) / n)
    half_width = _normal_quantile(level) * error
    return Difference(
        mean=mean,
        standard_error=error,
        interval=Interval(low=mean - half_width, high=mean + half_width),
    )


def paired_proportions_interval(lost: int, gained: int, n: int, level: float = LEVEL) -> Interval:
    """Return the interval of a difference of paired proportions (Bonett & Price 2012, eq. 5).

    One item is added to each side: with few flips the plain interval is too narrow, and with none
    it has no width.
    """
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half_width = _normal_quantile(level) * sqrt((down + up - (up - down) ** 2) / (n + 2))
    return Interval(low=max(-1.0, up - down - half_width), high=min(1.0, up - down + half_width))


def bootstrap_interval(
    baseline: Sequence[float],
    candidate: Sequence[float],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the bootstrap percentile interval of the mean difference (Efron 1979).

    Both scores of an item are drawn together. The same seed gives the same interval.
    """
    changes = _subtract(baseline, candidate)
    counts = Counter(changes)
    generator, values, weights = random.Random(seed), list(counts), list(counts.values())
    means = [
        sum(generator.choices(values, weights=weights, k=len(changes))) / len(changes)
        for _ in range(resamples)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high))


def recovery_interval(baseline: float, difference: Interval) -> Interval:
    """Return the interval of candidate / baseline: 1 + limits of the difference / baseline.

    The baseline's score counts as known. So the interval lies above the required recovery exactly
    if that of the difference excludes the loss: the two never contradict each other, and few flips
    leave neither without a width.
    """
    return Interval(
        low=max(0.0, 1 + difference.low / baseline), high=1 + difference.high / baseline
    )


def minimum_detectable_difference(
    flips: float, n: int, power: float = POWER, level: float = LEVEL
) -> float:
    """Return the smallest true difference that a paired test of n items detects with this power.

    flips: share of items whose score changes; (z_level + z_power) sqrt(flips / n), Miller 2024, eq.
    9.
    """
    return (_normal_quantile(level) + float(scipy.stats.norm.ppf(power))) * sqrt(flips / n)


def decide_verdict(interval: Interval, margin: float) -> Verdict:
    """Return the verdict of a non-inferiority test.

    "pass" if the interval excludes a loss beyond `margin`, "fail" if it excludes a loss of the
    margin or less.

    interval: of candidate - baseline; margin: the allowed loss, 0 or more.
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
    """Compare paired scores of one task, or of several tasks whose items are pooled.

    baseline, candidate: scores of the same items in the same order; smallest_recovery: the share of
    the baseline's score that the candidate must keep. If both score zero nothing was measured, and
    the verdict says so.
    """
    changes = _subtract(baseline, candidate)
    n, difference = len(changes), paired_difference(baseline, candidate, level)
    baseline_score, candidate_score = sum(baseline) / n, sum(candidate) / n
    lost, gained = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    if {*baseline, *candidate} <= {0.0, 1.0} or not lost + gained:
        interval = paired_proportions_interval(lost, gained, n, level)
    else:  # means of several answers
        interval = bootstrap_interval(baseline, candidate, level)
    if baseline_score == 0 and candidate_score == 0:
        verdict: Verdict = "floor: no information"
    else:
        verdict = decide_verdict(interval, (1 - smallest_recovery) * baseline_score)
    flips = max(lost + gained, 1) / n  # without any flip, count one
    return Comparison(
        n=n,
        baseline=baseline_score,
        candidate=candidate_score,
        difference=replace(difference, interval=interval),
        recovery=candidate_score / baseline_score if baseline_score else None,
        recovery_interval=recovery_interval(baseline_score, interval) if baseline_score else None,
        lost=lost,
        gained=gained,
        p_value=mcnemar_p_value(lost, gained),
        detectable=minimum_detectable_difference(flips, n, level=level),
        smallest_recovery=smallest_recovery,
        verdict=verdict,
    )


def _subtract(baseline: Sequence[float], candidate: Sequence[float]) -> list[float]:
    if len(baseline) != len(candidate) or len(baseline) < 2:
        raise ValueError(
            f"expected two or more paired items, found {len(baseline)} and {len(candidate)}"
        )
    return [second - first for first, second in zip(baseline, candidate, strict=True)]


def _normal_quantile(level: float) -> float:
    """Return z of a two-sided interval."""
    return float(scipy.stats.norm.ppf((1 + level) / 2))
