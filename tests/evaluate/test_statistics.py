"""Statistics of a comparison against scipy, statsmodels and worked numbers."""

from __future__ import annotations

import random
from math import isclose

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from quantkit.evaluate.statistics import (
    Interval,
    bootstrap_interval,
    compare_scores,
    decide_verdict,
    mcnemar_p_value,
    minimum_detectable_difference,
    paired_difference,
    paired_proportions_interval,
    wilson_interval,
)


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[list[float], list[float]]:
    """Return scores of a baseline and a candidate with these counts of items."""
    first = [1.0] * (both + lost) + [0.0] * (gained + neither)
    second = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * neither
    return first, second


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(case):
    successes, n = case
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    result = wilson_interval(successes, n)
    assert isclose(result.low, expected.low, abs_tol=1e-12)
    assert isclose(result.high, expected.high, abs_tol=1e-12)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_statsmodels_at_any_level(case):
    for level in (0.8, 0.95, 0.999):
        result, expected = (
            wilson_interval(*case, level=level),
            proportion_confint(*case, alpha=1 - level, method="wilson"),
        )
        assert (result.low, result.high) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 500), st.integers(0, 500))
@settings(deadline=None)
def test_mcnemar_equals_statsmodels(lost, gained):
    expected = (
        statsmodels_mcnemar([[9, lost], [gained, 9]], exact=True).pvalue if lost + gained else 1.0
    )
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@given(st.integers(0, 700), st.integers(0, 700))
@settings(deadline=None)
def test_mcnemar_equals_scipy(lost, gained):
    expected = scipy.stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert isclose(mcnemar_p_value(lost, gained), min(1.0, expected), rel_tol=1e-8, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("lost", "gained", "p"), [(30, 18, 0.11), (60, 40, 0.057), (80, 50, 0.011)]
)
def test_mcnemar_equals_published_values(lost, gained, p):
    assert (
        mcnemar_p_value(lost, gained)
        == mcnemar_p_value(gained, lost)
        == pytest.approx(p, abs=0.0006 if p < 0.1 else 0.006)
    )


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=50))
def test_paired_error_equals_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    changes = [two - one for one, two in pairs]
    result = paired_difference(first, second)
    assert isclose(result.mean, sum(changes) / len(changes), abs_tol=1e-12)
    assert isclose(
        result.standard_error, float(scipy.stats.sem(changes)), rel_tol=1e-6, abs_tol=1e-9
    )


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=50))
def test_paired_interval_equals_statsmodels(pairs):
    first, second = np.array(pairs).T
    result, expected = (
        paired_difference(first.tolist(), second.tolist()),
        DescrStatsW(second - first).zconfint_mean(),
    )
    assert (result.interval.low, result.interval.high) == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(60, 300), st.floats(0.3, 0.95), st.floats(0.02, 0.3))
def test_bootstrap_equals_scipy(seed, n, accuracy, flipped):
    generator = np.random.default_rng(seed)
    first = (generator.random(n) < accuracy).astype(float)
    second = np.where(generator.random(n) < flipped, 1 - first, first)
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda x, y, axis: y.mean(axis=axis) - x.mean(axis=axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=generator,
    )
    result = bootstrap_interval(first.tolist(), second.tolist(), resamples=4000)
    noise = (
        0.4 * expected.standard_error
    )  # of a 2.5 % quantile of 4,000 draws: six standard errors of it and more
    assert result.low == pytest.approx(expected.confidence_interval.low, abs=noise + 1 / n)
    assert result.high == pytest.approx(expected.confidence_interval.high, abs=noise + 1 / n)


@given(st.integers(20, 5000), st.floats(0.005, 0.5), st.floats(0.5, 0.95))
@settings(deadline=None, max_examples=40)
def test_detectable_difference_equals_statsmodels(n, flips, power):
    result = minimum_detectable_difference(flips, n, power=power)
    # one sample of differences with variance `flips`, without the power in the wrong tail
    reached = NormalIndPower().power(
        result / flips**0.5, nobs1=n, alpha=0.025, ratio=0, alternative="larger"
    )
    assert reached == pytest.approx(power, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 400))
def test_paired_proportions_interval_is_an_adjusted_wald_interval(lost, gained, unchanged):
    # Bonett and Price: Wald's interval of the mean of -1, 0, 1, with one item more on each side
    n = lost + gained + unchanged
    changes = np.array([-1.0] * (lost + 1) + [1.0] * (gained + 1) + [0.0] * unchanged)
    half = scipy.stats.norm.ppf(0.975) * changes.std(ddof=0) / len(changes) ** 0.5
    result = paired_proportions_interval(lost, gained, n)
    assert (result.low, result.high) == pytest.approx(
        np.clip([changes.mean() - half, changes.mean() + half], -1, 1), abs=1e-12
    )


def test_compare_scores_on_a_gsm8k_like_case():
    # 30 items lost and 18 gained of 1,319, with a baseline of 1,260 right answers
    first, second = outcomes(both=1230, lost=30, gained=18, neither=41)
    result = compare_scores(first, second, smallest_recovery=0.99)
    assert 100 * result.difference.mean == pytest.approx(-0.91, abs=0.005)
    assert 100 * result.difference.standard_error == pytest.approx(0.52, abs=0.005)
    assert 100 * result.recovery == pytest.approx(99.05, abs=0.005)
    assert 100 * result.flips == pytest.approx(3.6, abs=0.05)
    unpaired = (
        result.baseline * (1 - result.baseline) + result.candidate * (1 - result.candidate)
    ) / result.n
    assert 100 * unpaired**0.5 == pytest.approx(0.84, abs=0.005), (
        "what throwing the pairing away would cost"
    )
    share = result.baseline  # the worked interval of the difference, as a share of the baseline
    assert 100 * result.recovery_interval.low == pytest.approx(100 - 1.97 / share, abs=0.1)
    assert 100 * result.recovery_interval.high == pytest.approx(100 + 0.08 / share, abs=0.1)
    drawn = bootstrap_interval(first, second)
    assert 100 * drawn.low == pytest.approx(-1.97, abs=0.08)
    assert 100 * drawn.high == pytest.approx(0.08, abs=0.08)
    assert result.verdict == "not resolved"
    assert result.text == "not resolved (n = 1319, detectable 1.5 pp)"


@pytest.mark.parametrize(
    ("n", "flips", "half", "detectable"),
    [(164, 0.06, 3.8, 5.4), (500, 0.06, 2.2, 3.1), (1319, 0.05, 1.2, 1.7)],
)
def test_detectable_difference_of_common_benchmarks(n, flips, half, detectable):
    assert 100 * minimum_detectable_difference(flips, n) == pytest.approx(detectable, abs=0.05)
    assert 100 * minimum_detectable_difference(flips, n, power=0.5) == pytest.approx(half, abs=0.06)


def test_interval_without_flips_has_a_width():
    first, second = outcomes(both=250, lost=0, gained=0, neither=50)
    assert paired_difference(first, second).interval == Interval(low=0, high=0)
    result = compare_scores(first, second, smallest_recovery=0.98)
    assert result.difference.interval.low < 0 < result.difference.interval.high
    assert result.verdict == "pass"
    assert compare_scores(first, second, smallest_recovery=0.999).verdict == "not resolved"
    assert result.p_value == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(2, 40))
def test_paired_interval_contains_the_difference_and_is_symmetric(both, lost, gained, neither):
    n = both + lost + gained + neither
    result, mirrored = (
        paired_proportions_interval(lost, gained, n),
        paired_proportions_interval(gained, lost, n),
    )
    assert result.low <= (gained - lost) / (n + 2) <= result.high
    assert isclose(result.low, -mirrored.high, abs_tol=1e-12)


def test_bonett_price_interval_has_its_coverage():
    # 4 % lost and 2 % gained of 300 items, drawn 400 times
    generator = random.Random(1)
    inside = 0
    for _ in range(400):
        drawn = generator.choices((-1, 1, 0), weights=(4, 2, 94), k=300)
        result = paired_proportions_interval(drawn.count(-1), drawn.count(1), 300)
        inside += result.low <= -0.02 <= result.high
    assert 0.93 <= inside / 400 <= 1.0


def test_bootstrap_is_repeatable_and_near_the_normal_interval():
    first, second = outcomes(both=200, lost=20, gained=10, neither=70)
    result = bootstrap_interval(first, second, seed=3)
    assert (
        result
        == bootstrap_interval(first, second, seed=3)
        != bootstrap_interval(first, second, seed=4)
    )
    normal = paired_difference(first, second).interval
    assert result.low == pytest.approx(normal.low, abs=0.006)
    assert result.high == pytest.approx(normal.high, abs=0.006)


def test_recovery_interval_agrees_with_the_verdict():
    first, second = outcomes(both=200, lost=20, gained=10, neither=70)
    result = compare_scores(first, second)
    assert result.recovery == pytest.approx(210 / 220)
    assert result.recovery_interval.low < result.recovery < result.recovery_interval.high
    assert compare_scores(first, second, result.recovery_interval.low - 1e-9).verdict == "pass"
    assert (
        compare_scores(first, second, result.recovery_interval.low + 1e-9).verdict == "not resolved"
    )


def test_recovery_interval_without_flips_has_a_width():
    result = compare_scores([1.0] * 100, [1.0] * 100)
    assert 100 * result.difference.interval.high == pytest.approx(2.72, abs=0.01)
    assert 100 * result.recovery_interval.low == pytest.approx(100 - 2.72, abs=0.01)
    assert 100 * result.recovery_interval.high == pytest.approx(100 + 2.72, abs=0.01)
    averages = compare_scores([0.5, 0.75] * 50, [0.5, 0.75] * 50)
    assert averages.recovery_interval.low < 1 < averages.recovery_interval.high


@pytest.mark.parametrize(
    ("n", "baseline", "lost", "gained"),
    [(100, 0.9, 0.02, 0.0), (100, 0.5, 0.02, 0.02), (40, 0.8, 0.05, 0.03), (164, 0.15, 0.05, 0.02)],
)
def test_recovery_interval_has_its_coverage(n, baseline, lost, gained):
    generator, inside = random.Random(1), 0
    kinds = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    for _ in range(400):
        drawn = generator.choices(
            kinds, weights=(baseline - lost, lost, gained, 1 - baseline - gained), k=n
        )
        result = compare_scores(
            [one for one, _ in drawn], [two for _, two in drawn]
        ).recovery_interval
        inside += result is not None and result.low <= 1 + (gained - lost) / baseline <= result.high
    assert inside / 400 >= 0.93


def test_zero_scores_on_both_sides_give_no_information():
    result = compare_scores([0.0] * 50, [0.0] * 50)
    assert result.verdict == result.text == "floor: no information"
    assert result.recovery is None
    assert result.recovery_interval is None


def test_broken_candidate_fails():
    first, second = outcomes(both=30, lost=200, gained=5, neither=65)
    result = compare_scores(first, second, smallest_recovery=0.95)
    assert result.verdict == "fail"
    assert result.p_value < 1e-6


def test_fractional_scores_are_compared_by_their_mean():
    result = compare_scores([0.5, 0.75, 1.0, 0.25] * 20, [0.5, 0.75, 1.0, 0.3] * 20)
    assert result.difference.mean == pytest.approx(0.0125)
    normal = paired_difference([0.5, 0.75, 1.0, 0.25] * 20, [0.5, 0.75, 1.0, 0.3] * 20)
    assert result.difference.standard_error == normal.standard_error
    assert result.difference.interval.low == pytest.approx(normal.interval.low, abs=0.001)
    assert result.difference.interval.high == pytest.approx(normal.interval.high, abs=0.001)
    assert (result.lost, result.gained) == (0, 20)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.005, 0.02, "pass"), (-0.03, 0.02, "not resolved"), (-0.03, -0.02, "fail")],
)
def test_decide_verdict_at_a_margin_of_one_point(low, high, verdict):
    assert decide_verdict(Interval(low=low, high=high), 0.01) == verdict


@pytest.mark.parametrize("pair", [([1.0], [1.0]), ([1.0, 0.0], [1.0])])
def test_unpaired_scores_are_refused(pair):
    with pytest.raises(ValueError, match="two or more paired items"):
        compare_scores(*pair)
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)
