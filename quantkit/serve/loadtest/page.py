"""A load test as one page for people, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.report import html_page
from quantkit.report.html_page import Tile
from quantkit.serve.loadtest import tables
from quantkit.serve.loadtest.charts import charts


def render_page(run: LoadTest) -> str:
    """The whole page."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = lambda text: "open"
    return environment.get_template("loadtest.html.j2").render(
        run=run,
        tiles=tiles(run),
        levels=tables.make_level_table(run),
        **html_page.make_plot_context(environment, charts(run), ("fidelity.css",)),
    )


def tiles(run: LoadTest) -> list[Tile]:
    """The figures that a reader wants first."""
    best = max(run.levels, key=lambda level: level.output_tokens_per_second)
    first = min(run.levels, key=lambda level: level.concurrency)
    return [
        Tile(
            label="Most tokens per second",
            value=f"{best.output_tokens_per_second:,.0f}",
            note=f"{best.concurrency} requests at once",
        ),
        Tile(
            label="First token",
            value=tables.milliseconds(first.ttft_ms.p50),
            note=f"p50 at {first.concurrency} at once; p99 at {best.concurrency}: "
            + tables.milliseconds(best.ttft_ms.p99),
        ),
        Tile(
            label="Between tokens",
            value=tables.milliseconds(first.inter_token_ms.p50),
            note=f"p50 at {first.concurrency} at once; p99 at {best.concurrency}: "
            + tables.milliseconds(best.inter_token_ms.p99),
        ),
    ]
