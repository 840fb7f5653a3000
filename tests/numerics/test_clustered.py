"""Intervals of tokens that depend on their document, against slow oracles of other construction."""

from __future__ import annotations

import random
from math import comb, exp, log, sqrt

import numpy as np
import pytest
from scipy import stats

from quantkit.numerics import clustered

LEVELS = (0.025, 0.975)


def make_tokens(n: int, per: int, seed: int = 0) -> tuple[clustered.Array, ...]:
    """Return heavy-tailed KL of A and of B, about twice as large, and the documents."""
    dice = random.Random(seed)
    shifts = [dice.gauss(0, 0.6) for _ in range(n // per + 1)]
    a = [exp(dice.gauss(-7, 2) + shifts[i // per]) for i in range(n)]
    b = [value * 2 * exp(dice.gauss(0, 0.5) + shifts[i // per] / 3) for i, value in enumerate(a)]
    return np.array(a), np.array(b), np.array([7 * (i // per) + 3 for i in range(n)])


def average_slowly(values: list[float], documents: list[int]) -> tuple[float, float, int]:
    """Return mean, cluster-robust error and number of documents, token by token."""
    mean, totals = sum(values) / len(values), dict[int, float]()
    for value, document in zip(values, documents, strict=True):
        totals[document] = totals.get(document, 0.0) + value - mean
    g = len(totals)
    squares = sum(total * total for total in totals.values())
    return mean, sqrt(squares * g / (g - 1)) / len(values), g


def sum_binomial(k: int, n: int, p: float) -> float:
    """Return P(Binomial(n, p) <= k), term by term."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def test_mean_interval_equals_the_sums_over_documents() -> None:
    a, _, documents = make_tokens(200, 10)
    mean, error, g = average_slowly(a.tolist(), documents.tolist())
    error_of_mean, (low, high) = clustered.compute_mean_interval(a, documents)
    assert error_of_mean == pytest.approx(error, rel=1e-12)
    half = float(stats.t.ppf(0.975, g - 1)) * error
    assert (low, high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    alone, _ = clustered.compute_mean_interval(a)
    assert alone == pytest.approx(float(a.std(ddof=1)) / sqrt(200), rel=1e-12)
    assert clustered.compute_mean_interval(a, np.zeros(200, dtype=int))[1] == (None, None)


@pytest.mark.parametrize(("n", "share"), [(60, 0.5), (60, 0.9), (400, 0.99), (40, 0.99)])
def test_quantile_interval_has_the_ranks_of_the_binomial_distribution(n: int, share: float) -> None:
    values = np.array(random.Random(1).sample(range(10_000), n), dtype=float)
    z_over_t = stats.norm.ppf(0.975) / stats.t.ppf(0.975, n - 1)
    m = int(n * z_over_t**2)
    lower = max((r for r in range(1, m + 1) if sum_binomial(r - 1, m, share) <= 0.025), default=0)
    uppers = [s for s in range(1, m + 1) if 1 - sum_binomial(s - 1, m, share) <= 0.025]
    ordered = sorted(values.tolist())
    expected = (
        ordered[lower * n // m - 1] if lower else None,
        ordered[min(n, -(-uppers[0] * n // m)) - 1] if uppers else None,
    )
    assert clustered.compute_quantile_interval(values, share) == expected
    assert (expected[1] is None) == (n == 40 or (n, share) == (60, 0.999))


def test_documents_widen_the_interval_of_a_quantile() -> None:
    a, _, documents = make_tokens(1000, 50)
    (low, high), (l2, h2) = (
        clustered.compute_quantile_interval(a, 0.5, d) for d in (None, documents)
    )
    assert l2 < low < high < h2  # type: ignore[operator]


def test_share_interval_equals_a_search_over_binomial_tails() -> None:
    hits = np.array([1.0] * 30 + [0.0] * 70)
    low, high = clustered.compute_share_interval(hits)
    size = 100 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 99)) ** 2
    tails = [p for p in np.linspace(0.001, 0.999, 9981) if _accepts(p, 0.3 * size, size)]
    assert (low, high) == (pytest.approx(tails[0], abs=2e-4), pytest.approx(tails[-1], abs=2e-4))
    assert clustered.compute_share_interval(np.ones(50))[1] == 1.0
    assert clustered.compute_share_interval(np.zeros(50))[0] == 0.0


def _accepts(p: float, count: float, size: float) -> bool:
    """Whether both tails at p have more than 2.5 %; betainc continues the binomial sum."""
    from scipy.special import betainc

    at_least = betainc(count, size - count + 1, p)
    at_most = 1 - betainc(count + 1, size - count, p)
    return bool(at_least > 0.025 and at_most > 0.025)


def test_comparison_equals_its_definitions() -> None:
    a, b, documents = make_tokens(300, 10, seed=2)
    comparison = clustered.compare_kl(a, b, documents)
    logs = [log(y / x) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    mean, error, g = average_slowly(logs, documents.tolist())
    t = float(stats.t.ppf(0.975, g - 1))
    assert comparison.typical.value == pytest.approx(exp(mean))
    assert comparison.typical.interval == (
        pytest.approx(exp(mean - t * error)),
        pytest.approx(exp(mean + t * error)),
    )
    larger = [sum(logs[i : i + 10]) > 0 for i in range(0, 300, 10)]
    assert (comparison.documents, comparison.larger_documents) == (30, sum(larger))
    k = max(sum(larger), 30 - sum(larger))
    p = min(1.0, 2 * (1 - sum_binomial(k - 1, 30, 0.5)))
    assert comparison.sign_p == pytest.approx(p, rel=1e-6)
    assert comparison.larger == sum(y > x for x, y in zip(a, b, strict=True)) / 300
    assert comparison.left_out == 1 and comparison.top_share[0] == pytest.approx(a.max() / a.sum())
    largest = int(np.argmax(np.maximum(a, b)))
    rest = [i for i in range(300) if i != largest]
    assert comparison.trimmed.value == pytest.approx(b[rest].sum() / a[rest].sum())
    assert comparison.trimmed_kl[0] == pytest.approx(a[rest].mean())


def test_ratio_of_means_agrees_with_the_jackknife_over_documents() -> None:
    a, b, documents = make_tokens(2000, 20, seed=3)
    ratio_of_means = clustered.compare_kl(a, b, documents).mean
    without = []
    for document in sorted(set(documents.tolist())):
        rest = documents != document
        without.append(log(b[rest].mean() / a[rest].mean()))
    g = len(without)
    error = float(np.std(without)) * sqrt(g - 1)
    low, high = ratio_of_means.interval
    assert low is not None and high is not None
    assert log(high / low) / 2 == pytest.approx(float(stats.t.ppf(0.975, g - 1)) * error, rel=0.1)
    assert ratio_of_means.value == pytest.approx(b.mean() / a.mean())


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_ratio_of_quantiles_is_the_inverted_test(share: float) -> None:
    """A grid of ratios with a test of explicit loops finds the same ends."""
    a, b, documents = make_tokens(400, 10, seed=4)
    ratio = clustered.compute_quantile_ratio(a, b, share, documents)
    assert ratio is not None
    assert ratio.value == pytest.approx(np.quantile(b, share) / np.quantile(a, share))
    grid = np.exp(np.linspace(log(ratio.value) - 2, log(ratio.value) + 2, 801))
    kept = [
        r for r in grid if _is_balanced((r * a).tolist(), b.tolist(), share, documents.tolist())
    ]
    low, high = ratio.interval
    assert low == pytest.approx(kept[0], rel=0.011) and high == pytest.approx(kept[-1], rel=0.011)


def _is_balanced(a: list[float], b: list[float], share: float, documents: list[int]) -> bool:
    pooled, n = sorted(a + b), len(a)
    rank = share * (2 * n - 1)
    at = pooled[int(rank)] + (rank % 1) * (
        pooled[min(int(rank) + 1, 2 * n - 1)] - pooled[int(rank)]
    )
    changes = [float(y > at) - float(x > at) for x, y in zip(a, b, strict=True)]
    mean, error, g = average_slowly(changes, documents)
    plain = (sum(c * c for c in changes) / n - mean**2) / n
    up, down = (changes.count(1.0) + 1) / (n + 2), (changes.count(-1.0) + 1) / (n + 2)
    variance = (
        max(1.0, error**2 / plain if plain else 1.0) * (up + down - (up - down) ** 2) / (n + 2)
    )
    return abs(up - down) <= float(stats.t.ppf(0.975, g - 1)) * sqrt(variance)


def test_one_token_that_is_half_of_the_mean_hides_nothing() -> None:
    """B is three times A on almost every token; only the ratio of the means is uncertain."""
    a, _, documents = make_tokens(2000, 20, seed=5)
    dice = np.random.default_rng(5)
    b = 3 * a * np.exp(dice.normal(0, 0.4, 2000))
    b[7] = b.sum()
    comparison = clustered.compare_kl(a, b, documents)
    widths = []
    for ratio in (comparison.mean, comparison.typical, comparison.trimmed):
        low, high = ratio.interval
        assert low is not None and high is not None and low > 1
        widths.append(high / low)
    assert comparison.top_share[1] > 0.49 and widths[0] > 5 and max(widths[1:]) < 1.2
    assert comparison.typical.value == pytest.approx(3, rel=0.05)
    assert comparison.trimmed.value == pytest.approx(3 * exp(0.08), rel=0.05)
    assert comparison.larger_interval[0] is not None and comparison.larger_interval[0] > 0.9


def test_zeros_count_as_the_floor_and_a_source_has_no_ratio() -> None:
    a, b = np.array([0.0, 1e-12, 1e-3, 0.0]), np.array([0.0, 1e-9, 2e-3, 1e-9])
    comparison = clustered.compare_kl(a, b)
    assert comparison.typical.value == pytest.approx(2 ** (1 / 4)) and comparison.larger == 0.875
    assert clustered.compute_quantile_ratio(np.zeros(9), np.ones(9), 0.5) is None
