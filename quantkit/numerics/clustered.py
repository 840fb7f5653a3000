"""Intervals for figures of tokens that heavy tails and common documents do not break. Pure.

KL per token is skewed: one token can be half of the mean. Tokens of a document depend on each
other, so documents are the independent units here: errors are cluster-robust (Liang and Zeger
1986, with the factor G / (G - 1)), and quantiles of Student's t with G - 1 degrees of freedom
replace those of the normal distribution. Without documents each token is its own.

All arrays are float64 or bool of shape [n], `documents` int64 [n] with the number of each token's
document. Intervals are 95 %; an end is None where the sample is too small to give one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, floor, log, sqrt
from typing import Any, TypeAlias

import numpy as np
import scipy  # scipy.stats is loaded at its first use

Array: TypeAlias = np.ndarray[Any, Any]
Interval: TypeAlias = tuple[float | None, float | None]

LEVEL = 0.95
FLOOR = 1e-9
"""KL that float32 logits cannot distinguish from 0, in nats; smaller values count as it."""
TRIMMED = 1000
"""Of this many tokens, one is left out of the trimmed mean."""
MAX_LOG_RATIO, BISECTIONS = 14.0, 24
"""Ends of an interval of a quantile ratio are searched up to this natural logarithm from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """B / A with its interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class KLComparison:
    """KL of the same tokens in A and in B.

    typical: geometric mean over the tokens of B / A; larger: share of the tokens whose KL is larger
    in B, ties half; documents, larger_documents: all, and those whose typical ratio is above 1,
    with the p-value of a sign test over them, None without documents; mean: ratio of the means;
    trimmed: the same without the `left_out` tokens with the largest KL in either; top_share: share
    of the mean that its largest token has, in A and in B.
    """

    tokens: int
    typical: Ratio
    typical_kl: tuple[float, float]
    larger: float
    larger_interval: Interval
    documents: int | None
    larger_documents: int | None
    sign_p: float | None
    mean: Ratio
    trimmed: Ratio
    trimmed_kl: tuple[float, float]
    left_out: int
    top_share: tuple[float, float]


# ------------------------------------------------------------------------------------- one sample


def number_documents(documents: Array | None, n: int) -> Array:
    """Return the number of each token's document, [n] int64, from 0 without gaps; for None every
    token is a document.
    """
    if documents is None:
        return np.arange(n)
    return np.unique(documents, return_inverse=True)[1].reshape(n)


def compute_mean_error(values: Array, groups: Array) -> tuple[float, float]:
    """Return the cluster-robust standard error of the mean, and its quantile of Student's t.

    sqrt(G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2) / n; infinite for a single group.
    """
    count = int(groups.max()) + 1
    if count < 2:
        return float("inf"), float("inf")
    sums = np.bincount(groups, weights=values - values.mean(), minlength=count)
    error = sqrt(count / (count - 1) * float(np.square(sums).sum())) / len(values)
    return error, float(scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1))


def compute_mean_interval(values: Array, documents: Array | None = None) -> tuple[float, Interval]:
    """Return the standard error of the mean, and its interval; (inf, (None, None)) for one
    document.
    """
    error, quantile = compute_mean_error(values, number_documents(documents, len(values)))
    mean = float(values.mean())
    if error == float("inf"):
        return error, (None, None)
    return error, (mean - quantile * error, mean + quantile * error)


def compute_effective_size(hits: Array, groups: Array) -> float:
    """Return the number of independent tokens that would give the same error of the share of
    `hits`.

    Korn and Graubard 1998: n over the design effect, which is at least 1 here, times the squared
    ratio of the normal quantile to Student's; 1 for a single document.
    """
    n, share = len(hits), float(hits.mean())
    error, quantile = compute_mean_error(hits, groups)
    if error == float("inf"):
        return 1.0
    binomial = share * (1 - share) / (n - 1) if n > 1 else 0.0
    effect = max(1.0, error * error / binomial) if binomial else 1.0
    return n / effect * float((scipy.stats.norm.ppf((1 + LEVEL) / 2) / quantile) ** 2)


def compute_share_interval(hits: Array, documents: Array | None = None) -> Interval:
    """Return the interval of the share of hits [n]: Clopper and Pearson's for the effective size.

    A hit may be a half, for a tie.
    """
    size = compute_effective_size(hits, number_documents(documents, len(hits)))
    successes, tail = size * float(hits.mean()), (1 - LEVEL) / 2
    beta = scipy.stats.beta.ppf
    low = 0.0 if successes <= 0 else float(beta(tail, successes, size - successes + 1))
    high = 1.0 if successes >= size else float(beta(1 - tail, successes + 1, size - successes))
    return low, high


def compute_quantile_interval(
    values: Array, share: float, documents: Array | None = None
) -> Interval:
    """Return the interval of the quantile at `share`: two order statistics, asymmetric.

    X_(r) and X_(s) with P(Binomial(m, share) < r) <= 2.5 % and P(Binomial(m, share) >= s) <= 2.5 %
    need no assumption on the distribution of the values. m is the effective size of the share below
    the quantile, and ranks of m are scaled to n. An end is None where the sample has no such rank.
    """
    n, ordered = len(values), np.sort(values)
    groups = number_documents(documents, n)
    below = (values <= np.quantile(values, share)).astype(np.float64)
    size = max(1, floor(compute_effective_size(below, groups)))
    tail, binomial = (1 - LEVEL) / 2, scipy.stats.binom.ppf
    lower, upper = int(binomial(tail, size, share)), int(binomial(1 - tail, size, share)) + 1
    first = floor(lower * n / size)
    last = -floor(-upper * n / size)
    return (
        float(ordered[first - 1]) if lower >= 1 else None,
        float(ordered[min(last, n) - 1]) if upper <= size else None,
    )


# ------------------------------------------------------------------------------------ two artifacts


def compare_kl(a: Array, b: Array, documents: Array | None = None) -> KLComparison:
    """Compare the KL of the same two or more tokens in A and B; neither may be 0 everywhere."""
    n, groups = len(a), number_documents(documents, len(a))
    left_out = max(1, n // TRIMMED)
    kept = np.sort(np.argsort(np.maximum(a, b), kind="stable")[: n - left_out])
    logs = np.log(np.maximum(b, FLOOR)) - np.log(np.maximum(a, FLOOR))
    hits = (b > a) + 0.5 * (b == a)
    documents_larger, p_value = count_larger_documents(logs, groups)
    is_grouped = documents is not None
    return KLComparison(
        tokens=n,
        typical=compute_typical_ratio(logs, groups),
        typical_kl=(_geometric_mean(a), _geometric_mean(b)),
        larger=float(hits.mean()),
        larger_interval=compute_share_interval(hits, groups),
        documents=int(groups.max()) + 1 if is_grouped else None,
        larger_documents=documents_larger if is_grouped else None,
        sign_p=p_value if is_grouped else None,
        mean=compute_mean_ratio(a, b, groups),
        trimmed=compute_mean_ratio(a[kept], b[kept], groups[kept]),
        trimmed_kl=(float(a[kept].mean()), float(b[kept].mean())),
        left_out=left_out,
        top_share=(float(a.max() / a.sum()), float(b.max() / b.sum())),
    )


def compute_typical_ratio(logs: Array, groups: Array) -> Ratio:
    """Return exp of the mean of log(B / A) over the tokens, with its interval."""
    _, (low, high) = compute_mean_interval(logs, groups)
    return Ratio(value=exp(float(logs.mean())), interval=(_exp(low), _exp(high)))


def count_larger_documents(logs: Array, groups: Array) -> tuple[int, float]:
    """Return the number of documents whose mean log ratio is above 0, and the exact two-sided
    p-value of the sign test; documents with a mean of 0 do not count.
    """
    sums = np.bincount(groups, weights=logs)
    larger, smaller = int((sums > 0).sum()), int((sums < 0).sum())
    if not larger + smaller:
        return 0, 1.0
    return larger, float(scipy.stats.binomtest(larger, larger + smaller).pvalue)


def compute_mean_ratio(a: Array, b: Array, groups: Array) -> Ratio:
    """Return mean(B) / mean(A), with the interval of its logarithm by linearization.

    The error of log(mean(B) / mean(A)) is that of the mean of b / mean(B) - a / mean(A). The value
    is NaN if a mean is 0.
    """
    first, second = float(a.mean()), float(b.mean())
    if first <= 0 or second <= 0:
        return Ratio(value=float("nan"), interval=(None, None))
    regrouped = number_documents(groups, len(groups))  # trimming may empty a document
    error, quantile = compute_mean_error(b / second - a / first, regrouped)
    value = log(second / first)
    if error == float("inf"):
        return Ratio(value=second / first, interval=(None, None))
    ends = (_exp(value - quantile * error), _exp(value + quantile * error))
    return Ratio(value=second / first, interval=ends)


def compute_quantile_ratio(
    a: Array, b: Array, share: float, documents: Array | None = None
) -> Ratio | None:
    """Return the ratio of the quantiles at `share`, B / A; None if A's is 0.

    The interval holds every ratio r for which the shares of b and of r a above their common
    quantile do not differ (`balance_tails`): a test that is inverted, without densities.
    """
    first, second = float(np.quantile(a, share)), float(np.quantile(b, share))
    if first <= 0 or second <= 0:
        return None
    groups, middle = number_documents(documents, len(a)), log(second / first)

    def is_inside(logarithm: float) -> bool:
        low, high = balance_tails(a * exp(logarithm), b, share, groups)
        return low <= 0 <= high

    ends = [_find_end(is_inside, middle, step) for step in (-MAX_LOG_RATIO, MAX_LOG_RATIO)]
    return Ratio(value=second / first, interval=(_exp(ends[0]), _exp(ends[1])))


def balance_tails(a: Array, b: Array, share: float, groups: Array) -> tuple[float, float]:
    """Return the interval of the difference of the shares of b and of a above their common
    quantile.
    """
    threshold = np.quantile(np.concatenate((a, b)), share)
    return compute_paired_share_interval(
        (b > threshold).astype(np.float64) - (a > threshold), groups
    )


def compute_paired_share_interval(changes: Array, groups: Array) -> tuple[float, float]:
    """Return the interval of the mean of changes [n], each -1, 0 or 1: a difference of shares.

    Bonett and Price 2012 for pairs, with the variance times the design effect of the documents.
    The ends of a single document are infinite.
    """
    n = len(changes)
    up, down = float((changes > 0).sum()), float((changes < 0).sum())
    error, quantile = compute_mean_error(changes, groups)
    plain = float(changes.var(ddof=1)) / n
    effect = max(1.0, error * error / plain) if plain and error != float("inf") else 1.0
    rises, falls = (up + 1) / (n + 2), (down + 1) / (n + 2)
    half = quantile * sqrt(effect * (rises + falls - (rises - falls) ** 2) / (n + 2))
    return rises - falls - half, rises - falls + half


def _find_end(is_inside: Callable[[float], bool], inside: float, step: float) -> float | None:
    """Return the end of an interval by bisection between `inside` and `inside + step`; None if it
    lies beyond.
    """
    outside = inside + step
    if is_inside(outside):
        return None
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if is_inside(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _geometric_mean(kl: Array) -> float:
    return exp(float(np.log(np.maximum(kl, FLOOR)).mean()))


def _exp(value: float | None) -> float | None:
    return None if value is None else exp(min(value, 700.0))
