"""Costs as one page for people, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report import html
from quantkit.report.html import Tile
from quantkit.serve.cost import tables
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.charts import make_charts
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.cost_items import CostItems, format_number, list_sides
from quantkit.serve.cost.sensitivity import Swing


def render_page(
    found: Assumptions, made: CostItems, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> str:
    """The whole page."""
    environment = html.environment(autoescape=True)
    environment.filters["tone"] = get_tone
    return environment.get_template("cost.html.j2").render(
        found=found,
        answer=tables.format_ranking(found, made),
        tiles=make_tiles(found, made),
        claims=tables.make_claims_table(claimed),
        capacity=tables.make_capacity_table(found, made),
        sides=[tables.make_side_table(found, made, side) for side in list_sides(found)],
        apis=tables.make_api_table(found, made),
        break_even=tables.make_break_even_table(found, made),
        swings=tables.make_sensitivity_table(found, moved),
        **html.drawn(environment, make_charts(found, made, moved), ("fidelity.css",)),
    )


def get_tone(text: str) -> str:
    """The class of a claim's verdict."""
    return {"right": "good", "wrong": "bad"}.get(text, "open")


def make_tiles(found: Assumptions, made: CostItems) -> list[Tile]:
    """The figures that a reader wants first."""
    told = [
        Tile(
            label=f"{side.capitalize()} cards",
            value=format_number(made[f"{side}.per_million"].value),
            note=f"{found.currency} per million output tokens at {100 * found.throughput.utilization:g} %",
        )
        for side in list_sides(found)
    ]
    return told + [
        Tile(
            label=api.name,
            value=format_number(made[f"api.{api.name}.per_million"].value),
            note="the same, prompts included",
        )
        for api in found.api
    ]
