"""A load test as tables of text, and two of them side by side. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quantkit.loadtest.schema import Level, LoadTest
from quantkit.report.tables import Table

Show = Callable[[Level], str]
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


def answered(level: Level) -> str:
    """Answered requests, and the others where there are some."""
    lost = [f"{n} {what}" for n, what in ((level.errored, "failed"), (level.unfinished, "cut")) if n]
    return ", ".join([f"{level.answered}", *lost])


def cached(level: Level) -> str:
    rate = level.cache.rate if level.cache else None
    return "-" if rate is None else f"{rate:.1%}"


def levels(run: LoadTest) -> Table:
    """A row per level."""
    with_cache = any(level.cache for level in run.levels)
    columns = [">at once", ">answered", *(f">{name.strip()}" for name in FIGURES), *([">cached"] if with_cache else [])]
    rows = [
        (str(level.concurrency), answered(level), *(show(level) for show in FIGURES.values()))
        + ((cached(level),) if with_cache else ())
        for level in run.levels
    ]
    told = f"{run.prompts} prompts of {run.data}, at most {run.max_tokens} tokens each"
    told += ", end of text ignored. " if run.ignore_eos else ". "
    told += "Between tokens: the mean of each answer."
    if with_cache:
        told += " Cached: share of the prompts' tokens that the engine had in its prefix cache."
    return Table(title="Under load", columns=tuple(columns), rows=tuple(rows), note=told)


def side_by_side(a: LoadTest, b: LoadTest) -> Table:
    """Levels that both have: B's figures, and by how much they differ from A's."""
    mine = {level.concurrency: level for level in a.levels}
    rows = []
    for level in b.levels:
        before = mine.get(level.concurrency)
        if before is None:
            continue
        for name, value in compared(before, level):
            rows.append((str(level.concurrency), name, *value))
    return Table(
        title="Under load",
        columns=(">at once", "figure", ">A", ">B", ">B - A"),
        rows=tuple(rows),
        note=f"A asked on {a.machine}, {a.started}; B on {b.machine}, {b.started}. One run each: no interval.",
    )


def compared(a: Level, b: Level) -> list[tuple[str, tuple[str, str, str]]]:
    """The figures that matter of two levels."""
    pairs = [
        ("tokens/s", a.output_tokens_per_second, b.output_tokens_per_second, "{:,.1f}"),
        ("TTFT p50 [ms]", a.ttft_ms.p50, b.ttft_ms.p50, "{:.3g}"),
        ("TTFT p99 [ms]", a.ttft_ms.p99, b.ttft_ms.p99, "{:.3g}"),
        ("between tokens p50 [ms]", a.inter_token_ms.p50, b.inter_token_ms.p50, "{:.3g}"),
        ("answer p99 [ms]", a.latency_ms.p99, b.latency_ms.p99, "{:.4g}"),
    ]
    return [(name, (form.format(x), form.format(y), f"{y / x - 1:+.1%}" if x else "-")) for name, x, y, form in pairs]
