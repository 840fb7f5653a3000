"""Costs as tables of text for a terminal of 100 columns and for the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report.tables import Table
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.cost_items import CostItem, CostItems, format_number, list_sides
from quantkit.serve.cost.sensitivity import Swing

COLUMNS = ("figure", "arithmetic", ">value", "unit")


def make_rows(made: CostItems, keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Figures line by line, each with its arithmetic."""
    return tuple(
        (figure.label, figure.arithmetic, format_number(figure.value), figure.unit)
        for key in keys
        if (figure := made.get(key)) is not None
    )


def format_ranking(found: Assumptions, made: CostItems) -> str:
    """The one sentence that was asked for: what costs least for the volume."""
    priced = [(made[f"{side}.volume"].value, f"{side} cards") for side in list_sides(found)]
    priced += [(made[f"api.{api.name}.volume"].value, api.name) for api in found.api]
    ranked = sorted(priced)
    volume = format_number(found.volume.million_output_tokens_per_month)
    told = "; ".join(f"{name} {format_number(value)}" for value, name in ranked)
    return (
        f"{volume} million output tokens a month, {found.currency} a month, cheapest first: {told}."
    )


def make_side_table(found: Assumptions, made: CostItems, side: str) -> Table:
    """What one set costs a month, line by line."""
    keys = [key for key in made if key.startswith(f"{side}.")]
    note = (
        "One set of cards: as many as hold one copy of the model."
        if side == list_sides(found)[0]
        else ""
    )
    return Table(
        title=f"{side.capitalize()} cards", columns=COLUMNS, rows=make_rows(made, keys), note=note
    )


def make_capacity_table(found: Assumptions, made: CostItems) -> Table:
    """What a set delivers."""
    note = f"Throughput: {found.throughput.source}." if found.throughput.source else ""
    return Table(
        title="Capacity",
        columns=COLUMNS,
        rows=make_rows(made, ("capacity.most", "capacity.served")),
        note=note,
    )


def make_api_table(found: Assumptions, made: CostItems) -> Table:
    """What APIs charge for the same work."""
    keys = [f"api.{api.name}.{part}" for api in found.api for part in ("per_million", "volume")]
    volume = found.volume
    note = (
        f"Per million output tokens with {format_number(volume.input_per_output)} million of prompts, "
        f"{format_number(100 * volume.cached_input)} % of them cached."
    )
    return Table(title="APIs", columns=COLUMNS, rows=make_rows(made, keys), note=note)


def make_break_even_table(found: Assumptions, made: CostItems) -> Table:
    """From which volume on a set costs less than an API."""
    rows = []
    for side in list_sides(found):
        for api in found.api:
            key = f"break_even.{side}.{api.name}"
            if key not in made:
                rows.append((side, api.name, "the API is free", "never", "-"))
                continue
            figure, share = made[key], made[f"{key}.utilization"].value
            reached = (
                f"{100 * share:.0f} % utilized"
                if share <= 1
                else f"never: {format_number(share)} x a full set"
            )
            rows.append((side, api.name, figure.arithmetic, format_number(figure.value), reached))
    note = (
        "Where one set costs what the API charges; beyond it the set costs less, until it is full."
    )
    columns = ("cards", "API", "arithmetic", ">million tokens a month", "takes")
    return Table(title="Break-even", columns=columns, rows=tuple(rows), note=note)


def make_sensitivity_table(found: Assumptions, moved: Sequence[Swing]) -> Table:
    """What each assumption does, the strongest first."""
    rows = tuple(
        (
            swing.side,
            swing.key,
            f"{format_number(swing.low)} to {format_number(swing.high)}",
            format_number(swing.at_low),
            format_number(swing.at_high),
            f"{100 * swing.span / swing.base:.0f} %",
        )
        for swing in moved
    )
    columns = ("cards", "assumption", "moved", ">at low", ">at high", ">span")
    unit = f"{found.currency} per million output tokens"
    note = f"Each by {100 * found.sensitivity:g} % down and up, all others held; {unit}."
    return Table(title="Sensitivity", columns=columns, rows=rows, note=note)


def make_claims_table(found: Sequence[Claim]) -> Table:
    """Claimed figures, redone."""
    rows = tuple(
        (
            claim.figure.key,
            format_number(claim.claimed),
            claim.figure.arithmetic,
            format_number(claim.figure.value),
            "right" if claim.is_correct else "wrong",
        )
        for claim in found
    )
    columns = ("figure", ">claimed", "arithmetic", ">is", "verdict")
    return Table(title="Claims", columns=columns, rows=rows)


def make_tables(
    found: Assumptions, made: CostItems, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> list[Table]:
    """Every table that has rows, in the order of the arithmetic."""
    tables = [
        make_claims_table(claimed),
        make_capacity_table(found, made),
        *(make_side_table(found, made, side) for side in list_sides(found)),
    ]
    tables += [
        make_api_table(found, made),
        make_break_even_table(found, made),
        make_sensitivity_table(found, moved),
    ]
    return [table for table in tables if table.rows]


def serialize_costs(
    found: Assumptions, made: CostItems, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> dict[str, object]:
    """Everything as plain values for JSON."""
    return {
        "title": found.title,
        "currency": found.currency,
        "figures": {key: serialize_cost_item(figure) for key, figure in made.items()},
        "sensitivity": [
            {
                "side": swing.side,
                "assumption": swing.key,
                "low": swing.low,
                "high": swing.high,
                "per_million_at_low": swing.at_low,
                "per_million_at_high": swing.at_high,
            }
            for swing in moved
        ],
        "claims": [
            {
                "figure": c.figure.key,
                "claimed": c.claimed,
                "value": c.figure.value,
                "right": c.is_correct,
                "told": c.message,
            }
            for c in claimed
        ],
        "assumptions": found.model_dump(mode="json"),
    }


def serialize_cost_item(figure: CostItem) -> dict[str, object]:
    """One figure with its arithmetic."""
    return {
        "label": figure.label,
        "value": figure.value,
        "unit": figure.unit,
        "arithmetic": figure.arithmetic,
    }
