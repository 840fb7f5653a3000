"""Costs as an HTML page, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment

from quantkit.report import html_page
from quantkit.report.html_page import Tile
from quantkit.serve.cost import tables
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.charts import make_charts
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.cost_items import CostItems, format_number, list_sides
from quantkit.serve.cost.sensitivity import Swing


def render_page(
    assumptions: Assumptions, items: CostItems, swings: Sequence[Swing], claims: Sequence[Claim]
) -> str:
    """Render the page."""
    environment = make_environment()
    return environment.get_template("cost.html.j2").render(
        title=assumptions.title,
        ranking=tables.format_ranking(assumptions, items),
        tiles=make_tiles(assumptions, items),
        claims=tables.make_claims_table(claims),
        capacity=tables.make_capacity_table(assumptions, items),
        sides=[
            tables.make_side_table(assumptions, items, side) for side in list_sides(assumptions)
        ],
        apis=tables.make_api_table(assumptions, items),
        break_even=tables.make_break_even_table(assumptions, items),
        swings=tables.make_sensitivity_table(assumptions, swings),
        **html_page.make_plot_context(
            environment, make_charts(assumptions, items, swings), ("fidelity.css",)
        ),
    )


@cache
def make_environment() -> Environment:
    """Return the environment of the page of the costs."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = get_tone
    return environment


def get_tone(text: str) -> str:
    """Return the CSS class of a claim's verdict."""
    return {"right": "good", "wrong": "bad"}.get(text, "open")


def make_tiles(assumptions: Assumptions, items: CostItems) -> list[Tile]:
    """Return the most important items."""
    utilization = f"{100 * assumptions.throughput.utilization:g} % utilization"
    gpu_tiles = [
        Tile(
            label=f"{side.capitalize()} GPUs",
            value=format_number(items[f"{side}.per_million"].value),
            note=f"{assumptions.currency} per million output tokens at {utilization}",
        )
        for side in list_sides(assumptions)
    ]
    api_tiles = [
        Tile(
            label=api.name,
            value=format_number(items[f"api.{api.name}.per_million"].value),
            note=f"{assumptions.currency} per million output tokens, input included",
        )
        for api in assumptions.api
    ]
    return gpu_tiles + api_tiles
