"""Coverage and power of the intervals of numerics/clustered.py on heavy-tailed tokens of documents.

    python tests/bench/heavy_tails.py [--runs 400]

The KL of a token is lognormal (sigma 2 on the logarithm) with a shift per document (sigma 0.7), and
one token in a thousand is a spike, 100 times a Pareto of index 1.5: its variance is infinite, as
one token of 7.9 nats among thousandths suggests. A and B share
the KL of a token; each has noise (sigma 0.5 per token, 0.2 per document) and spikes of its own, and
B is a factor larger, so that at a factor of 1 nothing differs. True values are those of 4 million
tokens. A run has 60 documents of 100 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from quantkit.numerics import clustered

Array = np.ndarray[Any, Any]
DOCUMENTS, LENGTH = 60, 100
FACTORS = (1.0, 1.1, 1.3)


def draw(dice: np.random.Generator, documents: int, factor: float) -> tuple[Array, Array, Array]:
    """Return the KL of A and of B, and the document of each token."""
    n = documents * LENGTH
    groups = np.repeat(np.arange(documents), LENGTH)
    shift = dice.normal(0, 0.7, documents)[groups]
    shared, sides = np.exp(dice.normal(-8, 2, n) + shift), []
    for scale in (1.0, factor):
        noise = dice.normal(0, 0.5, n) + dice.normal(0, 0.2, documents)[groups]
        spikes = np.where(dice.random(n) < 0.001, 100 * (1 + dice.pareto(1.5, n)), 1.0)
        sides.append(scale * shared * np.exp(noise) * spikes)
    return sides[0], sides[1], groups


def plain_difference(a: Array, b: Array) -> tuple[float, float]:
    """Return the interval of the mean difference over independent tokens, as it was before."""
    d = b - a
    half = 1.96 * float(d.std(ddof=1)) / len(d) ** 0.5
    return float(d.mean()) - half, float(d.mean()) + half


def plain_typical(a: Array, b: Array) -> tuple[float | None, float | None]:
    """Return the interval of the typical ratio over independent tokens."""
    return clustered.compare_kl(a, b).typical.interval


Statistic = Callable[[Array, Array, Array], tuple[Any, Any]]
STATISTICS: dict[str, tuple[Statistic, Callable[[Array, Array], float], float]] = {
    "mean difference, independent tokens": (
        lambda a, b, g: plain_difference(a, b), lambda a, b: float((b - a).mean()), 0.0),
    "ratio of means": (
        lambda a, b, g: clustered.compare_kl(a, b, g).mean.interval,
        lambda a, b: float(b.mean() / a.mean()), 1.0),
    "ratio of means, 0.1 % left out": (
        lambda a, b, g: clustered.compare_kl(a, b, g).trimmed.interval,
        lambda a, b: clustered.compare_kl(a, b).trimmed.value, 1.0),
    "typical ratio, independent tokens": (
        lambda a, b, g: plain_typical(a, b),
        lambda a, b: clustered.compare_kl(a, b).typical.value, 1.0),
    "typical ratio": (
        lambda a, b, g: clustered.compare_kl(a, b, g).typical.interval,
        lambda a, b: clustered.compare_kl(a, b).typical.value, 1.0),
    "share of worse tokens": (
        lambda a, b, g: clustered.compare_kl(a, b, g).larger_interval,
        lambda a, b: clustered.compare_kl(a, b).larger, 0.5),
    "ratio of medians": (
        lambda a, b, g: clustered.compute_quantile_ratio(a, b, 0.5, g).interval,  # type: ignore[union-attr]
        lambda a, b: float(np.median(b) / np.median(a)), 1.0),
    "ratio of 99 %": (
        lambda a, b, g: clustered.compute_quantile_ratio(a, b, 0.99, g).interval,  # type: ignore[union-attr]
        lambda a, b: float(np.quantile(b, 0.99) / np.quantile(a, 0.99)), 1.0),
    "99 % of B": (
        lambda a, b, g: clustered.compute_quantile_interval(b, 0.99, g),
        lambda a, b: float(np.quantile(b, 0.99)), float("nan")),
    "99.9 % of B": (
        lambda a, b, g: clustered.compute_quantile_interval(b, 0.999, g),
        lambda a, b: float(np.quantile(b, 0.999)), float("nan")),
    "mean of B": (
        lambda a, b, g: clustered.compute_mean_interval(b, g)[1],
        lambda a, b: float(b.mean()), float("nan")),
}  # fmt: skip
"""Name -> interval of a run, the true value from many tokens, and the value of no change."""


def is_inside(interval: tuple[float | None, float | None], value: float) -> bool:
    """Return whether an interval holds a value; an end that is None has no limit."""
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


def main() -> None:
    """Print a table: coverage at a factor of 1.3, and the share of runs that exclude no change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400)
    runs = parser.parse_args().runs
    print("| interval | coverage |", " | ".join(f"resolved at {f:g}" for f in FACTORS), "|")
    print("|---|---:|" + "---:|" * len(FACTORS))
    samples = {
        factor: [draw(np.random.default_rng(seed), DOCUMENTS, factor) for seed in range(runs)]
        for factor in FACTORS
    }
    many = draw(np.random.default_rng(10**6), 40_000, FACTORS[-1])[:2]
    for name, (interval, truth, no_change) in STATISTICS.items():
        true, cells = truth(*many), list[str]()
        for factor in FACTORS:
            found = [interval(*sample) for sample in samples[factor]]
            if factor == FACTORS[-1]:
                covered = sum(is_inside(ends, true) for ends in found) / runs
            out = sum(not is_inside(ends, no_change) for ends in found) / runs
            cells.append("" if no_change != no_change else f"{100 * out:.1f} %")
        print(f"| {name} | {100 * covered:.1f} % | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
