"""Costs as tables of text for a terminal of 100 columns and for the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.report.tables import Table
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.claims import Claim
from quantkit.serve.cost.figures import Figure, Figures, number, sides
from quantkit.serve.cost.sensitivity import Swing

COLUMNS = ("figure", "arithmetic", ">value", "unit")


def rows_of(made: Figures, keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Figures line by line, each with its arithmetic."""
    return tuple(
        (figure.label, figure.arithmetic, number(figure.value), figure.unit)
        for key in keys
        if (figure := made.get(key)) is not None
    )


def format_ranking(found: Assumptions, made: Figures) -> str:
    """The one sentence that was asked for: what costs least for the volume."""
    priced = [(made[f"{side}.volume"].value, f"{side} cards") for side in sides(found)]
    priced += [(made[f"api.{api.name}.volume"].value, api.name) for api in found.api]
    ranked = sorted(priced)
    volume = number(found.volume.million_output_tokens_per_month)
    told = "; ".join(f"{name} {number(value)}" for value, name in ranked)
    return (
        f"{volume} million output tokens a month, {found.currency} a month, cheapest first: {told}."
    )


def side_table(found: Assumptions, made: Figures, side: str) -> Table:
    """What one set costs a month, line by line."""
    keys = [key for key in made if key.startswith(f"{side}.")]
    note = (
        "One set of cards: as many as hold one copy of the model."
        if side == sides(found)[0]
        else ""
    )
    return Table(
        title=f"{side.capitalize()} cards", columns=COLUMNS, rows=rows_of(made, keys), note=note
    )


def capacity(found: Assumptions, made: Figures) -> Table:
    """What a set delivers."""
    note = f"Throughput: {found.throughput.source}." if found.throughput.source else ""
    return Table(
        title="Capacity",
        columns=COLUMNS,
        rows=rows_of(made, ("capacity.most", "capacity.served")),
        note=note,
    )


def apis(found: Assumptions, made: Figures) -> Table:
    """What APIs charge for the same work."""
    keys = [f"api.{api.name}.{part}" for api in found.api for part in ("per_million", "volume")]
    volume = found.volume
    note = (
        f"Per million output tokens with {number(volume.input_per_output)} million of prompts, "
        f"{number(100 * volume.cached_input)} % of them cached."
    )
    return Table(title="APIs", columns=COLUMNS, rows=rows_of(made, keys), note=note)


def break_even(found: Assumptions, made: Figures) -> Table:
    """From which volume on a set costs less than an API."""
    rows = []
    for side in sides(found):
        for api in found.api:
            key = f"break_even.{side}.{api.name}"
            if key not in made:
                rows.append((side, api.name, "the API is free", "never", "-"))
                continue
            figure, share = made[key], made[f"{key}.utilization"].value
            reached = (
                f"{100 * share:.0f} % utilized"
                if share <= 1
                else f"never: {number(share)} x a full set"
            )
            rows.append((side, api.name, figure.arithmetic, number(figure.value), reached))
    note = (
        "Where one set costs what the API charges; beyond it the set costs less, until it is full."
    )
    columns = ("cards", "API", "arithmetic", ">million tokens a month", "takes")
    return Table(title="Break-even", columns=columns, rows=tuple(rows), note=note)


def swings(found: Assumptions, moved: Sequence[Swing]) -> Table:
    """What each assumption does, the strongest first."""
    rows = tuple(
        (
            swing.side,
            swing.key,
            f"{number(swing.low)} to {number(swing.high)}",
            number(swing.at_low),
            number(swing.at_high),
            f"{100 * swing.span / swing.base:.0f} %",
        )
        for swing in moved
    )
    columns = ("cards", "assumption", "moved", ">at low", ">at high", ">span")
    unit = f"{found.currency} per million output tokens"
    note = f"Each by {100 * found.sensitivity:g} % down and up, all others held; {unit}."
    return Table(title="Sensitivity", columns=columns, rows=rows, note=note)


def claims(found: Sequence[Claim]) -> Table:
    """Claimed figures, redone."""
    rows = tuple(
        (
            claim.figure.key,
            number(claim.claimed),
            claim.figure.arithmetic,
            number(claim.figure.value),
            "right" if claim.right else "wrong",
        )
        for claim in found
    )
    columns = ("figure", ">claimed", "arithmetic", ">is", "verdict")
    return Table(title="Claims", columns=columns, rows=rows)


def make_tables(
    found: Assumptions, made: Figures, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> list[Table]:
    """Every table that has rows, in the order of the arithmetic."""
    tables = [
        claims(claimed),
        capacity(found, made),
        *(side_table(found, made, side) for side in sides(found)),
    ]
    tables += [apis(found, made), break_even(found, made), swings(found, moved)]
    return [table for table in tables if table.rows]


def serialize_costs(
    found: Assumptions, made: Figures, moved: Sequence[Swing], claimed: Sequence[Claim]
) -> dict[str, object]:
    """Everything as plain values for JSON."""
    return {
        "title": found.title,
        "currency": found.currency,
        "figures": {key: figure_values(figure) for key, figure in made.items()},
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
                "right": c.right,
                "told": c.told,
            }
            for c in claimed
        ],
        "assumptions": found.model_dump(mode="json"),
    }


def figure_values(figure: Figure) -> dict[str, object]:
    """One figure with its arithmetic."""
    return {
        "label": figure.label,
        "value": figure.value,
        "unit": figure.unit,
        "arithmetic": figure.arithmetic,
    }
