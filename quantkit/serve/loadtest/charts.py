"""A load test as plots, in the style of the reports: Vega-Lite values. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.report.charts import Plot, Spec, make_chart, make_color_encoding

QUANTILES = ("p50", "p99")


def charts(run: LoadTest) -> dict[str, Plot]:
    """Plots by name: title, how to read it, description."""
    made: dict[str, Plot] = {
        "throughput": (
            "Tokens per second by requests at once",
            "Where the line turns flat the server is full: more at once only wait longer.",
            lines(throughput(run), "tokens/s", ("all answers", "each answer")),
        ),
        "ttft": (
            "Time to the first token by requests at once",
            "Queue and prompt; p99 is what one in a hundred waits.",
            lines(quantiles(run, "ttft_ms"), "ms", QUANTILES),
        ),
        "inter_token": (
            "Time between tokens by requests at once",
            "The mean of each answer. Some 50 ms is as fast as people read.",
            lines(quantiles(run, "inter_token_ms"), "ms", QUANTILES),
        ),
    }
    return made


def throughput(run: LoadTest) -> list[Spec]:
    """What the server makes in all, and what one client gets."""
    rows = []
    for level in run.levels:
        rows.append({
            "at": level.concurrency,
            "value": level.output_tokens_per_second,
            "line": "all answers",
        })
        mean = level.inter_token_ms.mean
        if mean:
            rows.append({"at": level.concurrency, "value": 1000 / mean, "line": "each answer"})
    return rows


def quantiles(run: LoadTest, name: str) -> list[Spec]:
    """A row per level and quantile."""
    return [
        {
            "at": level.concurrency,
            "value": getattr(getattr(level, name), quantile),
            "line": quantile,
        }
        for level in run.levels
        for quantile in QUANTILES
    ]


def lines(rows: Sequence[Spec], unit: str, names: Sequence[str]) -> Spec:
    """A line per name over the number of requests at once."""
    x = {
        "field": "at", "type": "quantitative", "title": "requests at once", "scale": {"type": "log", "base": 2},
        "axis": {"values": sorted({row["at"] for row in rows}), "grid": False, "format": "d"},
    }  # fmt: skip
    y = {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": True}}
    tooltip = [
        {"field": "line"},
        {"field": "at", "title": "at once"},
        {"field": "value", "format": ",.4~g"},
    ]
    encoding = {"x": x, "y": y, "color": make_color_encoding("line", names), "tooltip": tooltip}
    return make_chart(
        rows, {"mark": {"type": "line", "point": True, "strokeWidth": 1.8}, "encoding": encoding}
    )
