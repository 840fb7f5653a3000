"""Costs as tables of text for a terminal of 100 columns and for the page, and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report.table import Table
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.cost_items import CostItem, CostItems, format_number, list_sides
from quantkit.serve.cost.sensitivity import Swing

COLUMNS = ("item", "arithmetic", ">value", "unit")


def make_rows(items: CostItems, keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return a row per item, each with its arithmetic."""
    return tuple(
        (item.label, item.arithmetic, format_number(item.value), item.unit)
        for key in keys
        if (item := items.get(key)) is not None
    )


def format_ranking(assumptions: Assumptions, items: CostItems) -> str:
    """Return one sentence: the options for the volume, the cheapest first."""
    options = [(items[f"{side}.volume"].value, f"{side} GPUs") for side in list_sides(assumptions)]
    options += [(items[f"api.{api.name}.volume"].value, api.name) for api in assumptions.api]
    volume = format_number(assumptions.volume.million_output_tokens_per_month)
    ranking = "; ".join(f"{name} {format_number(value)}" for value, name in sorted(options))
    return (
        f"{volume} million output tokens per month, {assumptions.currency} per month, cheapest "
        f"first: {ranking}."
    )


def make_side_table(assumptions: Assumptions, items: CostItems, side: str) -> Table:
    """Make the table of the monthly cost of one set, by item."""
    keys = [key for key in items if key.startswith(f"{side}.")]
    is_first = side == list_sides(assumptions)[0]
    return Table(
        title=f"{side.capitalize()} GPUs",
        columns=COLUMNS,
        rows=make_rows(items, keys),
        note="One set: the GPUs that hold one copy of the model." if is_first else "",
    )


def make_capacity_table(assumptions: Assumptions, items: CostItems) -> Table:
    """Make the table of the capacity of a set."""
    source = assumptions.throughput.source
    return Table(
        title="Capacity",
        columns=COLUMNS,
        rows=make_rows(items, ("capacity.most", "capacity.served")),
        note=f"Throughput: {source}." if source else "",
    )


def make_api_table(assumptions: Assumptions, items: CostItems) -> Table:
    """Make the table of API prices for the same work."""
    parts = ("per_million", "volume")
    keys = [f"api.{api.name}.{part}" for api in assumptions.api for part in parts]
    volume = assumptions.volume
    note = (
        f"Per million output tokens with {format_number(volume.input_per_output)} million input "
        f"tokens, {format_number(100 * volume.cached_input)} % of them cached."
    )
    return Table(title="APIs", columns=COLUMNS, rows=make_rows(items, keys), note=note)


def make_break_even_table(assumptions: Assumptions, items: CostItems) -> Table:
    """Make the table of the volumes from which a set costs less than an API."""
    rows = []
    for side in list_sides(assumptions):
        for api in assumptions.api:
            key = f"break_even.{side}.{api.name}"
            if key not in items:
                rows.append((side, api.name, "the API is free", "never", "-"))
                continue
            item, utilization = items[key], items[f"{key}.utilization"].value
            reached = (
                f"{100 * utilization:.0f} % utilization"
                if utilization <= 1
                else f"never: {format_number(utilization)} x a full set"
            )
            rows.append((side, api.name, item.arithmetic, format_number(item.value), reached))
    columns = ("GPUs", "API", "arithmetic", ">million tokens per month", "requires")
    return Table(
        title="Break-even",
        columns=columns,
        rows=tuple(rows),
        note="The volume at which one set costs as much as the API. Above it the set costs less, "
        "up to its capacity.",
    )


def make_sensitivity_table(assumptions: Assumptions, swings: Sequence[Swing]) -> Table:
    """Make the table of the effect of each assumption, the largest first."""
    rows = tuple(
        (
            swing.side,
            swing.key,
            f"{format_number(swing.low)} to {format_number(swing.high)}",
            format_number(swing.at_low),
            format_number(swing.at_high),
            f"{100 * swing.span / swing.base:.0f} %",
        )
        for swing in swings
    )
    columns = ("GPUs", "assumption", "varied", ">at low", ">at high", ">span")
    note = (
        f"Each varied by {100 * assumptions.sensitivity:g} % down and up, all others fixed; "
        f"{assumptions.currency} per million output tokens."
    )
    return Table(title="Sensitivity", columns=columns, rows=rows, note=note)


def make_claims_table(claims: Sequence[Claim]) -> Table:
    """Make the table of claimed figures, recomputed."""
    rows = tuple(
        (
            claim.item.key,
            format_number(claim.claimed),
            claim.item.arithmetic,
            format_number(claim.item.value),
            "right" if claim.is_correct else "wrong",
        )
        for claim in claims
    )
    columns = ("figure", ">claimed", "arithmetic", ">computed", "verdict")
    return Table(title="Claims", columns=columns, rows=rows)


def make_tables(
    assumptions: Assumptions, items: CostItems, swings: Sequence[Swing], claims: Sequence[Claim]
) -> list[Table]:
    """Return every table that has rows, in the order of the arithmetic."""
    tables = [
        make_claims_table(claims),
        make_capacity_table(assumptions, items),
        *(make_side_table(assumptions, items, side) for side in list_sides(assumptions)),
        make_api_table(assumptions, items),
        make_break_even_table(assumptions, items),
        make_sensitivity_table(assumptions, swings),
    ]
    return [table for table in tables if table.rows]


def serialize_costs(
    assumptions: Assumptions, items: CostItems, swings: Sequence[Swing], claims: Sequence[Claim]
) -> dict[str, object]:
    """Return everything as plain values for JSON."""
    return {
        "title": assumptions.title,
        "currency": assumptions.currency,
        "figures": {key: serialize_cost_item(item) for key, item in items.items()},
        "sensitivity": [
            {
                "side": swing.side,
                "assumption": swing.key,
                "low": swing.low,
                "high": swing.high,
                "per_million_at_low": swing.at_low,
                "per_million_at_high": swing.at_high,
            }
            for swing in swings
        ],
        "claims": [
            {
                "figure": claim.item.key,
                "claimed": claim.claimed,
                "value": claim.item.value,
                "right": claim.is_correct,
                "told": claim.message,
            }
            for claim in claims
        ],
        "assumptions": assumptions.model_dump(mode="json"),
    }


def serialize_cost_item(item: CostItem) -> dict[str, object]:
    """Return one item with its arithmetic."""
    return {
        "label": item.label,
        "value": item.value,
        "unit": item.unit,
        "arithmetic": item.arithmetic,
    }
