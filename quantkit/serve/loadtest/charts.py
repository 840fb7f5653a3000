"""A load test as Vega-Lite charts, in the style of the reports. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.report.charts import Plot, Spec, make_chart, make_color_encoding

QUANTILES = ("p50", "p99")


def make_charts(run: LoadTest) -> dict[str, Plot]:
    """Return charts by name: title, how to read it, specification."""
    return {
        "throughput": (
            "Tokens per second by concurrency",
            "The server is saturated where the line becomes flat: more requests only wait longer.",
            make_line_chart(make_throughput_rows(run), "tokens/s", ("all requests", "per request")),
        ),
        "ttft": (
            "Time to first token by concurrency",
            "Queue and prefill; one request in a hundred takes longer than the p99.",
            make_line_chart(make_quantile_rows(run, "ttft_ms"), "ms", QUANTILES),
        ),
        "inter_token": (
            "Inter-token latency by concurrency",
            "The mean of each request. About 50 ms is as fast as people read.",
            make_line_chart(make_quantile_rows(run, "inter_token_ms"), "ms", QUANTILES),
        ),
    }


def make_throughput_rows(run: LoadTest) -> list[Spec]:
    """Return the throughput of the server, and of one request."""
    rows = []
    for level in run.levels:
        rows.append({
            "at": level.concurrency,
            "value": level.output_tokens_per_second,
            "line": "all requests",
        })
        mean = level.inter_token_ms.mean
        if mean:
            rows.append({"at": level.concurrency, "value": 1000 / mean, "line": "per request"})
    return rows


def make_quantile_rows(run: LoadTest, name: str) -> list[Spec]:
    """Return a row per level and quantile."""
    return [
        {
            "at": level.concurrency,
            "value": getattr(getattr(level, name), quantile),
            "line": quantile,
        }
        for level in run.levels
        for quantile in QUANTILES
    ]


def make_line_chart(rows: Sequence[Spec], unit: str, names: Sequence[str]) -> Spec:
    """Return a line per name over the concurrency."""
    values = sorted({row["at"] for row in rows})
    x = {
        "field": "at",
        "type": "quantitative",
        "title": "concurrent requests",
        "scale": {"type": "log", "base": 2},
        "axis": {"values": values, "grid": False, "format": "d"},
    }
    y = {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": True}}
    tooltip = [
        {"field": "line"},
        {"field": "at", "title": "concurrency"},
        {"field": "value", "format": ",.4~g"},
    ]
    encoding = {"x": x, "y": y, "color": make_color_encoding("line", names), "tooltip": tooltip}
    return make_chart(
        rows, {"mark": {"type": "line", "point": True, "strokeWidth": 1.8}, "encoding": encoding}
    )
