"""A load test as a table of text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.report.tables import Table

FEW = 100
"""Of fewer answers than this none lies beyond the p99."""
Show = Callable[[LoadLevel], str]
FIGURES: Mapping[str, Show] = {
    "requests/s": lambda level: f"{level.requests_per_second:.2f}",
    "tokens/s": lambda level: f"{level.output_tokens_per_second:,.1f}",
    "TTFT p50": lambda level: milliseconds(level.ttft_ms.p50),
    "p99": lambda level: milliseconds(level.ttft_ms.p99),
    "between tokens p50": lambda level: milliseconds(level.inter_token_ms.p50),
    "p99 ": lambda level: milliseconds(level.inter_token_ms.p99),
    "answer p50": lambda level: milliseconds(level.latency_ms.p50),
    "p99  ": lambda level: milliseconds(level.latency_ms.p99),
}


def milliseconds(value: float) -> str:
    """Three digits, in ms or s."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def answered(level: LoadLevel) -> str:
    """Answered requests, and the others where there are some."""
    lost = [
        f"{n} {what}" for n, what in ((level.errored, "failed"), (level.unfinished, "cut")) if n
    ]
    return ", ".join([f"{level.answered}", *lost])


def cached(level: LoadLevel) -> str:
    rate = level.cache.rate if level.cache else None
    return "-" if rate is None else f"{rate:.1%}"


def make_level_table(run: LoadTest) -> Table:
    """A row per level."""
    with_cache = any(level.cache for level in run.levels)
    columns = [
        ">at once",
        ">answered",
        *(f">{name.strip()}" for name in FIGURES),
        *([">cached"] if with_cache else []),
    ]
    rows = [
        (str(level.concurrency), answered(level), *(show(level) for show in FIGURES.values()))
        + ((cached(level),) if with_cache else ())
        for level in run.levels
    ]
    told = f"{run.prompts} prompts of {run.data}, at most {run.max_tokens} tokens each"
    told += ", end of text ignored. " if run.ignore_eos else ". "
    told += "Between tokens: the mean of each answer."
    if any(level.answered < FEW for level in run.levels):
        told += f" The p99 of fewer than {FEW} answers is about the slowest of them."
    if with_cache:
        told += " Cached: share of the prompts' tokens that the engine had in its prefix cache."
    return Table(title="Under load", columns=tuple(columns), rows=tuple(rows), note=told)
