"""Costs as one page for people, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report import html_page
from quantkit.report.html_page import Tile
from quantkit.serve.cost import tables
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.charts import charts
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.figures import Figures, number, sides
from quantkit.serve.cost.sensitivity import Swing


def render_page(
    found: Assumptions, made: Figures, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> str:
    """The whole page."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = tone
    return environment.get_template("cost.html.j2").render(
        found=found,
        answer=tables.format_ranking(found, made),
        tiles=tiles(found, made),
        claims=tables.claims(claimed),
        capacity=tables.capacity(found, made),
        sides=[tables.side_table(found, made, side) for side in sides(found)],
        apis=tables.apis(found, made),
        break_even=tables.break_even(found, made),
        swings=tables.swings(found, moved),
        **html_page.make_plot_context(environment, charts(found, made, moved), ("fidelity.css",)),
    )


def tone(text: str) -> str:
    """The class of a claim's verdict."""
    return {"right": "good", "wrong": "bad"}.get(text, "open")


def tiles(found: Assumptions, made: Figures) -> list[Tile]:
    """The figures that a reader wants first."""
    told = [
        Tile(
            label=f"{side.capitalize()} cards",
            value=number(made[f"{side}.per_million"].value),
            note=f"{found.currency} per million output tokens at {100 * found.throughput.utilization:g} %",
        )
        for side in sides(found)
    ]
    return told + [
        Tile(
            label=api.name,
            value=number(made[f"api.{api.name}.per_million"].value),
            note="the same, prompts included",
        )
        for api in found.api
    ]
