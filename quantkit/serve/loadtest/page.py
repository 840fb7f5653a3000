"""A load test as an HTML page, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment

from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.report import html_page
from quantkit.report.html_page import Tile
from quantkit.serve.loadtest import tables
from quantkit.serve.loadtest.charts import make_charts


def render_page(run: LoadTest) -> str:
    """Render the page."""
    environment = make_environment()
    return environment.get_template("loadtest.html.j2").render(
        run=run,
        tiles=make_tiles(run),
        levels=tables.make_level_table(run),
        **html_page.make_plot_context(environment, make_charts(run), ("fidelity.css",)),
    )


@cache
def make_environment() -> Environment:
    """Return the environment of the page of a load test."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = lambda text: "open"
    return environment


def make_tiles(run: LoadTest) -> list[Tile]:
    """Return the most important figures."""
    best = max(run.levels, key=lambda level: level.output_tokens_per_second)
    first = min(run.levels, key=lambda level: level.concurrency)
    ttft, inter_token = first.ttft_ms.p50, first.inter_token_ms.p50
    note = f"p50 at concurrency {first.concurrency}; p99 at {best.concurrency}: "
    return [
        Tile(
            label="Highest throughput",
            value=f"{best.output_tokens_per_second:,.0f} tokens/s",
            note=f"at concurrency {best.concurrency}",
        ),
        Tile(
            label="Time to first token",
            value=tables.format_milliseconds(ttft),
            note=note + tables.format_milliseconds(best.ttft_ms.p99),
        ),
        Tile(
            label="Inter-token latency",
            value=tables.format_milliseconds(inter_token),
            note=note + tables.format_milliseconds(best.inter_token_ms.p99),
        ),
    ]
