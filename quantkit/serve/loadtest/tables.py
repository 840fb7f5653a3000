"""A load test as a table of text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.report.table import Table

MIN_P99_REQUESTS = 100
"""With fewer requests none is slower than the p99."""
FormatColumn = Callable[[LoadLevel], str]
COLUMNS: Mapping[str, FormatColumn] = {
    "requests/s": lambda level: f"{level.requests_per_second:.2f}",
    "tokens/s": lambda level: f"{level.output_tokens_per_second:,.1f}",
    "TTFT p50": lambda level: format_milliseconds(level.ttft_ms.p50),
    "p99": lambda level: format_milliseconds(level.ttft_ms.p99),
    "inter-token p50": lambda level: format_milliseconds(level.inter_token_ms.p50),
    "p99 ": lambda level: format_milliseconds(level.inter_token_ms.p99),
    "latency p50": lambda level: format_milliseconds(level.latency_ms.p50),
    "p99  ": lambda level: format_milliseconds(level.latency_ms.p99),
}
"""Column -> format. Trailing spaces make the names of p99 columns unique."""


def format_milliseconds(value: float) -> str:
    """Format a time to three digits, in ms or s."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def format_completed(level: LoadLevel) -> str:
    """Format the completed requests, and the failed and unfinished ones if there are any."""
    others = ((level.errored, "failed"), (level.unfinished, "unfinished"))
    return ", ".join([f"{level.answered}", *(f"{n} {label}" for n, label in others if n)])


def format_hit_rate(level: LoadLevel) -> str:
    """Format the hit rate of the prefix cache."""
    rate = level.cache.rate if level.cache else None
    return "-" if rate is None else f"{rate:.1%}"


def make_level_table(run: LoadTest) -> Table:
    """Make the table of levels."""
    has_cache = any(level.cache for level in run.levels)
    columns = [
        ">concurrency",
        ">completed",
        *(f">{name.strip()}" for name in COLUMNS),
        *([">cached"] if has_cache else []),
    ]
    rows = [
        (
            str(level.concurrency),
            format_completed(level),
            *(format_column(level) for format_column in COLUMNS.values()),
        )
        + ((format_hit_rate(level),) if has_cache else ())
        for level in run.levels
    ]
    note = f"{run.prompts} prompts of {run.data}, at most {run.max_tokens} output tokens each"
    note += ", end of text ignored. " if run.ignore_eos else ". "
    note += "TTFT: time to first token; inter-token: the mean of each request."
    if any(level.answered < MIN_P99_REQUESTS for level in run.levels):
        note += f" The p99 of fewer than {MIN_P99_REQUESTS} requests is about their maximum."
    if has_cache:
        note += " Cached: prompt tokens in the engine's prefix cache."
    return Table(title="Under load", columns=tuple(columns), rows=tuple(rows), note=note)
