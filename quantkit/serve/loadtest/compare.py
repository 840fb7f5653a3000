"""Two load tests side by side, such as an owned engine and a managed API. Pure.

Answers are compared prompt by prompt, at temperature 0. Equal texts are not expected of two engines
even for the same weights: one near tie of two tokens changes the rest of an answer. The share of
equal answers of an engine with itself is the figure to compare with.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.errors import NotComparable
from quantkit.evaluate.statistics import wilson_interval
from quantkit.numerics import clustered
from quantkit.report.table import Table
from quantkit.serve.cost.assumptions import Api
from quantkit.serve.cost.hourly import HourlyCost, compute_api_price
from quantkit.serve.loadtest.slo_tables import format_interval, format_value

EQUAL_KEY = "errors"  # shares are formatted in percent


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the answers of two runs agree.

    equal: prompts with the same answer, with Wilson's interval of their share; prefix: mean share
    of the longer answer's characters before the first difference, with its interval.
    """

    prompts: int
    equal: int
    equal_interval: tuple[float, float]
    prefix: float
    prefix_interval: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class SideCost:
    """The price of a side: of its GPUs per hour, or of an API per token; neither if unknown."""

    hourly: HourlyCost | None = None
    api: Api | None = None

    def compute_price(self, level: LoadLevel) -> float | None:
        """Return the price per million output tokens, input included, at a level's tokens."""
        if self.api is not None and level.output_tokens:
            rows = level.requests
            cached = [tokens or 0 for tokens in rows.cached_tokens] if rows else []
            mean = sum(cached) / len(cached) if cached else 0.0
            return compute_api_price(self.api, level.prompt_tokens, level.output_tokens, mean)
        if self.hourly is not None and level.output_tokens_per_second:
            return self.hourly.per_hour * 1e6 / (level.output_tokens_per_second * 3600)
        return None


def check_comparable(a: LoadTest, b: LoadTest) -> None:
    """Raise NotComparable if two runs sent other requests."""
    if reason := a.comparable(b):
        raise NotComparable(
            f"--compare: expected two runs with the same requests, found {reason}; run one of them "
            "again with the other's options"
        )


def compare_answers(a: LoadTest, b: LoadTest) -> Agreement | None:
    """Compare the answers to the prompts that both runs kept; None without any."""
    second = {answer.prompt: answer.text for answer in b.answers}
    pairs = [(x.text, second[x.prompt]) for x in a.answers if x.prompt in second]
    if not pairs:
        return None
    equal = sum(x == y for x, y in pairs)
    interval = wilson_interval(equal, len(pairs))
    shares = np.array([
        len(os.path.commonprefix(pair)) / max(1, *map(len, pair)) if pair[0] != pair[1] else 1.0
        for pair in pairs
    ])
    _, prefix_interval = clustered.compute_mean_interval(shares)
    return Agreement(
        prompts=len(pairs),
        equal=equal,
        equal_interval=(interval.low, interval.high),
        prefix=float(shares.mean()),
        prefix_interval=prefix_interval,
    )


def pair_figures(
    a: LoadTest, b: LoadTest, costs: tuple[SideCost, SideCost]
) -> list[tuple[int, str, float | None, float | None]]:
    """Return concurrency, figure, A and B of the levels that both runs have.

    Raises NotComparable if they have none.
    """
    others = {level.concurrency: level for level in b.levels}
    rows = [
        (level.concurrency, name, first, second)
        for level in a.levels
        if (other := others.get(level.concurrency)) is not None
        for (name, first), second in zip(
            list_figures(level, costs[0]).items(),
            list_figures(other, costs[1]).values(),
            strict=True,
        )
    ]
    if not rows:
        raise NotComparable(
            "--compare: expected a concurrency that both runs have, found none; run one again with "
            "the other's --concurrency"
        )
    return rows


def list_figures(level: LoadLevel, cost: SideCost) -> dict[str, float | None]:
    """Return the figures of a level by name; times in seconds."""
    return {
        "output tokens/s": level.output_tokens_per_second,
        "latency p50, s": level.latency_ms.p50 / 1000,
        "latency p99, s": level.latency_ms.p99 / 1000,
        "time to first token p50, s": level.ttft_ms.p50 / 1000,
        "time to first token p99, s": level.ttft_ms.p99 / 1000,
        "failed requests": float(level.errored),
        "price of 1 M output tokens": cost.compute_price(level),
    }


def make_side_table(
    a: LoadTest, b: LoadTest, costs: tuple[SideCost, SideCost], currency: str
) -> Table:
    """Make the table of the levels that both runs have; currency: of the costs, "" without."""
    rows = tuple(
        (str(concurrency), name, format_value(first, ""), format_value(second, ""))
        for concurrency, name, first, second in pair_figures(a, b, costs)
    )
    note = describe_agreement(compare_answers(a, b))
    if currency:
        note += f" Prices are in {currency}, input included, at the measured tokens."
    return Table(
        title="Side by side",
        columns=(">concurrency", "figure", f">A: {a.note or a.model}", f">B: {b.note or b.model}"),
        rows=rows,
        note=note,
    )


def describe_agreement(agreement: Agreement | None) -> str:
    """Describe in one sentence how answers agree."""
    if agreement is None:
        return "Answers: no prompt has an answer in both runs."
    equal = format_value(agreement.equal / agreement.prompts, EQUAL_KEY)
    prefix = format_value(agreement.prefix, EQUAL_KEY)
    return (
        f"Answers to {agreement.prompts} prompts: {agreement.equal} are equal, {equal}"
        f"{format_interval(agreement.equal_interval, EQUAL_KEY)}; until the first difference "
        f"{prefix}{format_interval(agreement.prefix_interval, EQUAL_KEY)} of an answer agree."
    )


def serialize_comparison(
    a: LoadTest, b: LoadTest, costs: tuple[SideCost, SideCost], currency: str
) -> dict[str, Any]:
    """Return the comparison as plain values for JSON."""
    agreement = compare_answers(a, b)
    names = ("concurrency", "figure", "a", "b")
    return {
        "figures": [dict(zip(names, row, strict=True)) for row in pair_figures(a, b, costs)],
        "answers": asdict(agreement) if agreement else None,
        "currency": currency,
    }
