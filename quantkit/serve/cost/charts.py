"""Costs as Vega-Lite charts, in the style of the reports. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from quantkit.report.charts import Plot, Spec, make_chart, make_color_encoding
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.cost_items import CostItems, list_sides
from quantkit.serve.cost.sensitivity import Swing

POINTS = 120
DECADES = 1.5  # below and above the volume of the assumptions
MAX_SWINGS = 10  # per side


def make_charts(
    assumptions: Assumptions, items: CostItems, swings: Sequence[Swing]
) -> dict[str, Plot]:
    """Return charts by name: title, how to read it, specification."""
    return {
        "volume": (
            "Cost per month by volume",
            "GPUs cost in steps, one set at a time as utilized; APIs cost in proportion. "
            "The line marks the volume of the assumptions.",
            _make_volume_chart(assumptions, items),
        ),
        "utilization": (
            "A million output tokens by utilization",
            "The cost of GPUs does not depend on their load: twice the work halves the price.",
            _make_utilization_chart(assumptions, items),
        ),
        "swings": (
            "Sensitivity of the cost of a million tokens",
            f"Each assumption varied by {100 * assumptions.sensitivity:g} % down and up, "
            "all others fixed.",
            _make_sensitivity_chart(assumptions, swings),
        ),
    }


def _make_volume_chart(assumptions: Assumptions, items: CostItems) -> Spec:
    planned = assumptions.volume.million_output_tokens_per_month
    served = items["capacity.served"].value
    rows = []
    for step in range(POINTS + 1):
        volume = planned * 10 ** (DECADES * (2 * step / POINTS - 1))
        for side in list_sides(assumptions):
            cost = ceil(volume / served) * items[f"{side}.per_month"].value
            rows.append({"volume": volume, "cost": cost, "option": side})
        for api in assumptions.api:
            price = items[f"api.{api.name}.per_million"].value
            if price > 0:
                rows.append({"volume": volume, "cost": volume * price, "option": api.name})
    x: Spec = {"field": "volume", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    x |= {
        "title": "million output tokens per month",
        "axis": {"format": "~s", "tickCount": 6, "grid": False},
    }
    y: Spec = {"field": "cost", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    y |= {
        "title": f"{assumptions.currency} per month",
        "axis": {"format": "~s", "tickCount": 6},
    }
    tooltip = [
        {"field": "option"},
        {"field": "volume", "format": ",.0f"},
        {"field": "cost", "format": ",.0f"},
    ]
    lines = {
        "mark": {"type": "line", "strokeWidth": 1.8, "interpolate": "linear"},
        "encoding": {"x": x, "y": y, "color": colour_lines(assumptions), "tooltip": tooltip},
    }
    mark = {
        "data": {"values": [{"volume": planned}]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--ink)"},
        "encoding": {"x": {"field": "volume", "type": "quantitative"}},
    }
    return make_chart(rows, {"layer": [lines, mark]})


def _make_utilization_chart(assumptions: Assumptions, items: CostItems) -> Spec:
    maximum, rows = items["capacity.most"].value, []
    for percent in range(5, 101, 1):
        for side in list_sides(assumptions):
            cost = items[f"{side}.per_month"].value / (maximum * percent / 100)
            rows.append({"share": percent / 100, "cost": cost, "option": side})
        for api in assumptions.api:
            price = items[f"api.{api.name}.per_million"].value
            if price > 0:
                rows.append({"share": percent / 100, "cost": price, "option": api.name})
    x: Spec = {"field": "share", "type": "quantitative", "title": "utilization of one set"}
    x |= {"axis": {"format": "~%", "grid": False}, "scale": {"domain": [0.05, 1]}}
    y: Spec = {"field": "cost", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    y |= {
        "title": f"{assumptions.currency} per million output tokens",
        "axis": {"format": "~s", "tickCount": 6},
    }
    tooltip = [
        {"field": "option"},
        {"field": "share", "format": ".0%"},
        {"field": "cost", "format": ",.2f"},
    ]
    mark = {"type": "line", "strokeWidth": 1.8}
    encoding = {"x": x, "y": y, "color": colour_lines(assumptions), "tooltip": tooltip}
    return make_chart(rows, {"mark": mark, "encoding": encoding})


def _make_sensitivity_chart(assumptions: Assumptions, swings: Sequence[Swing]) -> Spec:
    sides = list_sides(assumptions)
    shown = [
        swing
        for side in sides
        for swing in [swing for swing in swings if swing.side == side][:MAX_SWINGS]
    ]
    rows: list[Spec] = [
        {
            "name": f"{swing.key} ({swing.side})"
            if not swing.key.startswith(swing.side)
            else swing.key,
            "low": min(swing.at_low, swing.at_high),
            "high": max(swing.at_low, swing.at_high),
            "base": swing.base,
            "option": swing.side,
            "from": swing.low,
            "to": swing.high,
        }
        for swing in shown
    ]
    y: Spec = {
        "field": "name",
        "type": "nominal",
        "sort": [row["name"] for row in rows],
        "title": None,
        "axis": {"labelLimit": 260},
    }
    x: Spec = {"field": "low", "type": "quantitative", "scale": {"zero": False, "padding": 12}}
    x |= {"title": f"{assumptions.currency} per million output tokens"}
    tooltip = [
        {"field": "name"},
        *({"field": name, "format": ",.4~g"} for name in ("from", "to", "low", "high")),
    ]
    bars = {
        "mark": {"type": "bar", "height": 12},
        "encoding": {
            "x": x,
            "x2": {"field": "high"},
            "color": make_color_encoding("option", sides),
            "tooltip": tooltip,
        },
    }
    base_ticks = {
        "mark": {"type": "tick", "color": "var(--ink)", "thickness": 2, "size": 18},
        "encoding": {"x": {"field": "base", "type": "quantitative"}},
    }
    return {
        **make_chart(rows, {"encoding": {"y": y}, "layer": [bars, base_ticks]}),
        "height": 26 * len(rows),
    }


def colour_lines(assumptions: Assumptions) -> Spec:
    """Return a colour per side and API; the legend shows lines as lines."""
    return {
        **make_color_encoding("option", list_options(assumptions)),
        "legend": {"symbolType": "stroke", "symbolStrokeWidth": 3},
    }


def list_options(assumptions: Assumptions) -> list[str]:
    """Return the compared options in the order of the colours."""
    return [*list_sides(assumptions), *(api.name for api in assumptions.api)]
