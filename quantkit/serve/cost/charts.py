"""Costs as plots, in the style of the reports: Vega-Lite values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from quantkit.report.charts import Plot, Spec, make_chart, make_color_encoding
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.figures import Figures, sides
from quantkit.serve.cost.sensitivity import Swing

POINTS = 120
DECADES = 1.5  # below and above the volume that was asked for
SHOWN = 10  # swings per side


def charts(found: Assumptions, made: Figures, moved: Sequence[Swing]) -> dict[str, Plot]:
    """Plots by name: title, how to read it, description."""
    return {
        "volume": (
            "Cost a month by volume",
            "Cards cost in steps, a set at a time as utilized; APIs in proportion. The line marks the asked volume.",
            _volume(found, made),
        ),
        "utilization": (
            "A million output tokens by utilization",
            "What cards cost does not depend on what they do: twice the work is half the price.",
            _utilization(found, made),
        ),
        "swings": (
            "What the cost of a million tokens depends on",
            f"Each assumption moved by {100 * found.sensitivity:g} % down and up, all others held.",
            _swings(found, moved),
        ),
    }


def _volume(found: Assumptions, made: Figures) -> Spec:
    asked, served = found.volume.million_output_tokens_per_month, made["capacity.served"].value
    rows = []
    for step in range(POINTS + 1):
        volume = asked * 10 ** (DECADES * (2 * step / POINTS - 1))
        for side in sides(found):
            cost = ceil(volume / served) * made[f"{side}.per_month"].value
            rows.append({"volume": volume, "cost": cost, "who": side})
        for api in found.api:
            price = made[f"api.{api.name}.per_million"].value
            if price > 0:
                rows.append({"volume": volume, "cost": volume * price, "who": api.name})
    x: Spec = {"field": "volume", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    x |= {
        "title": "million output tokens a month",
        "axis": {"format": "~s", "tickCount": 6, "grid": False},
    }
    y: Spec = {"field": "cost", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    y |= {"title": f"{found.currency} a month", "axis": {"format": "~s", "tickCount": 6}}
    tooltip = [
        {"field": "who"},
        {"field": "volume", "format": ",.0f"},
        {"field": "cost", "format": ",.0f"},
    ]
    lines = {
        "mark": {"type": "line", "strokeWidth": 1.8, "interpolate": "linear"},
        "encoding": {"x": x, "y": y, "color": lines_by(found), "tooltip": tooltip},
    }
    mark = {
        "data": {"values": [{"volume": asked}]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--ink)"},
        "encoding": {"x": {"field": "volume", "type": "quantitative"}},
    }
    return make_chart(rows, {"layer": [lines, mark]})


def _utilization(found: Assumptions, made: Figures) -> Spec:
    most, rows = made["capacity.most"].value, []
    for percent in range(5, 101, 1):
        for side in sides(found):
            cost = made[f"{side}.per_month"].value / (most * percent / 100)
            rows.append({"share": percent / 100, "cost": cost, "who": side})
        for api in found.api:
            if made[f"api.{api.name}.per_million"].value > 0:
                price = made[f"api.{api.name}.per_million"].value
                rows.append({"share": percent / 100, "cost": price, "who": api.name})
    x: Spec = {"field": "share", "type": "quantitative", "title": "utilization of one set"}
    x |= {"axis": {"format": "~%", "grid": False}, "scale": {"domain": [0.05, 1]}}
    y: Spec = {"field": "cost", "type": "quantitative", "scale": {"type": "log", "nice": False}}
    y |= {
        "title": f"{found.currency} per million output tokens",
        "axis": {"format": "~s", "tickCount": 6},
    }
    tooltip = [
        {"field": "who"},
        {"field": "share", "format": ".0%"},
        {"field": "cost", "format": ",.2f"},
    ]
    mark = {"type": "line", "strokeWidth": 1.8}
    encoding = {"x": x, "y": y, "color": lines_by(found), "tooltip": tooltip}
    return make_chart(rows, {"mark": mark, "encoding": encoding})


def _swings(found: Assumptions, moved: Sequence[Swing]) -> Spec:
    shown = [
        swing for side in sides(found) for swing in [s for s in moved if s.side == side][:SHOWN]
    ]
    rows: list[Spec] = [
        {
            "name": f"{swing.key} ({swing.side})"
            if not swing.key.startswith(swing.side)
            else swing.key,
            "low": min(swing.at_low, swing.at_high),
            "high": max(swing.at_low, swing.at_high),
            "base": swing.base,
            "who": swing.side,
            "from": swing.low,
            "to": swing.high,
        }
        for swing in shown
    ]
    order = [row["name"] for row in rows]
    y: Spec = {
        "field": "name",
        "type": "nominal",
        "sort": order,
        "title": None,
        "axis": {"labelLimit": 260},
    }
    x: Spec = {"field": "low", "type": "quantitative", "scale": {"zero": False, "padding": 12}}
    x |= {"title": f"{found.currency} per million output tokens"}
    tooltip = [
        {"field": "name"},
        *({"field": name, "format": ",.4~g"} for name in ("from", "to", "low", "high")),
    ]
    bars = {
        "mark": {"type": "bar", "height": 12},
        "encoding": {
            "x": x,
            "x2": {"field": "high"},
            "color": make_color_encoding("who", sides(found)),
            "tooltip": tooltip,
        },
    }
    middle = {
        "mark": {"type": "tick", "color": "var(--ink)", "thickness": 2, "size": 18},
        "encoding": {"x": {"field": "base", "type": "quantitative"}},
    }
    return {
        **make_chart(rows, {"encoding": {"y": y}, "layer": [bars, middle]}),
        "height": 26 * len(rows),
    }


def lines_by(found: Assumptions) -> Spec:
    """A colour per side and API; the legend shows lines as lines."""
    return {
        **make_color_encoding("who", names(found)),
        "legend": {"symbolType": "stroke", "symbolStrokeWidth": 3},
    }


def names(found: Assumptions) -> list[str]:
    """Who is compared, in the order of the colours."""
    return [*sides(found), *(api.name for api in found.api)]
