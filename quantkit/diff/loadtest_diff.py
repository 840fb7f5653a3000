"""The comparison of two load tests. One run each, so a difference has no interval."""

from __future__ import annotations

from quantkit.artifact.loadtest_schema import LoadLevel
from quantkit.diff.diff_schema import LoadDiff
from quantkit.diff.sides import Side


def compare_loadtests(a: Side, b: Side) -> tuple[LoadDiff, ...]:
    """Return the figures at every concurrency that both runs have; none if the runs differ."""
    if a.load is None or b.load is None or a.load.comparable(b.load):
        return ()
    first = {level.concurrency: level for level in a.load.levels}
    return tuple(
        row
        for level in b.load.levels
        if level.concurrency in first
        for row in compare_levels(first[level.concurrency], level)
    )


def compare_levels(a: LoadLevel, b: LoadLevel) -> list[LoadDiff]:
    """Return the figures of two levels of the same concurrency."""
    figures = {
        "output tokens/s": (a.output_tokens_per_second, b.output_tokens_per_second),
        "time to first token p50 [ms]": (a.ttft_ms.p50, b.ttft_ms.p50),
        "time to first token p99 [ms]": (a.ttft_ms.p99, b.ttft_ms.p99),
        "inter-token latency p50 [ms]": (a.inter_token_ms.p50, b.inter_token_ms.p50),
        "inter-token latency p99 [ms]": (a.inter_token_ms.p99, b.inter_token_ms.p99),
        "request latency p99 [ms]": (a.latency_ms.p99, b.latency_ms.p99),
    }
    return [
        LoadDiff(at_once=b.concurrency, figure=name, a=x, b=y) for name, (x, y) in figures.items()
    ]


def list_loadtest_notes(a: Side, b: Side) -> list[str]:
    """Return the conditions of the two runs."""
    if faults := [
        f"The load test is left out: {side.load_fault}." for side in (a, b) if side.load_fault
    ]:
        return faults
    if a.load is None or b.load is None:
        return []
    reason = a.load.comparable(b.load)
    if reason:
        return [f"The load tests have different settings ({reason}) and are not compared."]
    servers = [
        f"{name}: {side.load.note or 'not noted'}"
        for name, side in (("A", a), ("B", b))
        if side.load
    ]
    return [
        f"Load test: one run each, {a.load.started} and {b.load.started}. "
        f"Servers: {', '.join(servers)}."
    ]
