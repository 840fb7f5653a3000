"""Targets, times by prompt length, and GPU figures as tables of text. Pure."""

from __future__ import annotations

from functools import cache
from math import ceil, log

import numpy as np

from quantkit.artifact.fidelity_schema import GateResult
from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.figure_readers import Reading
from quantkit.numerics.clustered import LEVEL, compute_quantile_interval
from quantkit.recipe.slo import SHARES, SloFigure, parse_figure
from quantkit.report.table import Table
from quantkit.serve.loadtest.slo import (
    SloResult,
    read_cache_hits,
    read_percentile,
    read_utilization,
)

LENGTHS: tuple[tuple[int, int | None], ...] = ((0, 1_000), (1_000, 8_000), (8_000, None))
"""Ranges of prompt tokens: from, below."""
MISSING = "-"


@cache
def count_required(percentile: int) -> int:
    """Return the independent requests from which a percentile's interval has an upper end."""
    share = percentile / 100
    n = ceil(log((1 - LEVEL) / 2) / log(share))
    while compute_quantile_interval(np.arange(n), share)[1] is None:
        n += 1
    return n


def format_value(value: float | None, key: str) -> str:
    """Format a figure of a target: shares in percent, large numbers without decimals."""
    if value is None:
        return MISSING
    if key in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def format_interval(ci: tuple[float | None, float | None] | None, key: str) -> str:
    """Format an interval; an end that the sample is too small for is missing."""
    if ci is None or ci == (None, None):
        return ""
    low, high = (format_value(end, key) for end in ci)
    return f" [{low}, {high}]"


def format_result(result: GateResult) -> str:
    """Format the outcome with its reason; the reason alone for a figure that was not measured."""
    if result.outcome == "not judged" and result.reason:
        return result.reason
    return f"{result.outcome}: {result.reason}" if result.reason else result.outcome


def make_slo_table(judged: SloResult) -> Table:
    """Make the table of targets."""
    rows = tuple(
        (
            result.figure,
            result.bound,
            format_value(result.value, result.figure) + format_interval(result.ci, result.figure),
            MISSING if result.n is None else f"{result.n:,}",
            format_result(result),
        )
        for result in judged.results
    )
    notes = list[str]()
    figures = [parse_figure(result.figure) for result in judged.results if result.is_unproven]
    if figures:
        notes.append("Kept, not proven: the 95 % interval crosses the bound or has no end there.")
    if required := [count_required(x.percentile) for x in figures if x.percentile]:
        notes.append(f"Their percentiles have an upper end from {max(required)} requests on.")
    return Table(
        title=f"Targets at concurrency {judged.concurrency}",
        columns=("figure", ">bound", ">value [95 % CI]", ">n", "result"),
        rows=rows,
        note=" ".join(notes),
    )


def make_length_table(run: LoadTest) -> Table | None:
    """Make the table of times by prompt length; None if the run has no single requests."""
    rows = [row for level in run.levels for row in make_length_rows(level)]
    if not rows:
        return None
    return Table(
        title="By prompt length",
        columns=(">concurrency", "prompt tokens", ">n", ">latency p50 [95 % CI], s", ">p99",
                 ">TTFT p50, s", ">p99"),
        rows=tuple(rows),
        note=f"A missing end of an interval (-) needs more requests: {count_required(99)} for the "
        "upper one of a p99.",
    )  # fmt: skip


def make_length_rows(level: LoadLevel) -> list[tuple[str, ...]]:
    """Return a row for each range of lengths that has requests."""
    rows = []
    for least, below in LENGTHS:
        readings = [
            read_percentile(
                SloFigure(name=name, percentile=percentile, least=least, below=below), level
            )
            for name in ("latency", "ttft")
            for percentile in (50, 99)
        ]
        if level.requests and readings[0].value is not None:
            label = f"under {below:,}" if not least else f"from {least:,}"
            rows.append((
                str(level.concurrency),
                label if below is None or not least else f"{least:,} to {below - 1:,}",
                f"{readings[0].n:,}",
                *map(format_reading, readings),
            ))
    return rows


def format_reading(reading: Reading, key: str = "") -> str:
    """Format a figure with its interval."""
    return format_value(reading.value, key) + format_interval(reading.ci, key)


def make_server_table(run: LoadTest) -> Table:
    """Make the table of the server's own metrics: GPUs and prefix cache."""
    rows = []
    for level in run.levels:
        gpu = level.gpu
        rows.append((
            str(level.concurrency),
            format_reading(read_utilization(level), "gpu_utilization")
            if gpu and gpu.utilization
            else "not measured",
            f"{max(gpu.memory_gb):.1f} GB" if gpu and gpu.memory_gb else MISSING,
            f"{sum(gpu.watts) / len(gpu.watts):,.0f} W" if gpu and gpu.watts else MISSING,
            f"{max(gpu.cache):.1%}" if gpu and gpu.cache else MISSING,
        ))
    hits = read_cache_hits(run)
    text = format_reading(hits, "cache_hits")
    note = f"Prefix cache hits in conversations: {text}" if hits.value is not None else (
        f"Prefix cache hits in conversations: {hits.reason}"
    )  # fmt: skip
    sources = {level.gpu.source for level in run.levels if level.gpu}
    note += f". Metrics of: {', '.join(sorted(sources))}." if sources else "."
    return Table(
        title="GPUs and caches",
        columns=(">concurrency", ">GPU utilization [95 % CI]", ">memory", ">power", ">KV cache"),
        rows=tuple(rows),
        note=note,
    )  # fmt: skip
