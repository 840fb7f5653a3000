"""Plots of both sides in one frame, as Vega-Lite specifications. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10
from statistics import median

from quantkit.diff.diff_schema import Diff, ErrorShift
from quantkit.diff.token_texts import TokenFigures
from quantkit.report.charts import (
    TIGHT,
    Plot,
    Spec,
    make_chart,
    make_color_encoding,
    make_layer_axis,
    make_percent_axis,
    make_power_axis,
)
from quantkit.report.definitions import HIDDEN_STATES, NORM_RATIOS
from quantkit.report.module_ranges import find_block_number

FLOOR = -9  # log10 of a KL that float32 logits cannot distinguish from 0
STEPS_PER_DECADE = 4
SIDES = ("A", "B")


def make_charts(diff: Diff, a: TokenFigures | None, b: TokenFigures | None) -> dict[str, Plot]:
    """Return the plots by name, in the order of the page; a plot without data is left out."""
    plots: dict[str, Plot] = {}
    if rows := compute_layer_medians(diff.modules):
        measures = sorted({row.by for row in diff.modules})
        how = (
            f"Median of the layer's quantized matrices, by the error of their "
            f"{' or '.join(measures)}. {NORM_RATIOS}"
        )
        plots["layers"] = ("Relative error of modules, by layer", how, _plot_lines(rows, "layer"))
    if rows := _list_block_errors(diff.blocks):
        how = HIDDEN_STATES
        title = "Relative error of the hidden states, by block"
        plots["blocks"] = (title, how, _plot_lines(rows, "layer"))
    if diff.distribution and a and b:
        tails = compute_tail(a.kl, "A") + compute_tail(b.kl, "B")
        how = "Share of the tokens whose KL is at least this large; a lower curve is better."
        plots["kl"] = ("KL divergence per token, tail", how, _plot_tails(tails))
    return plots


def compute_layer_medians(modules: Sequence[ErrorShift]) -> list[Spec]:
    """Return the median error per layer and side."""
    groups: dict[tuple[int, str], list[float]] = {}
    for row in modules:
        block = find_block_number(row.name)
        for side, error in zip(SIDES, (row.a, row.b), strict=True):
            if block is not None and error is not None:
                groups.setdefault((block, side), []).append(error)
    return [
        {"layer": block, "side": side, "error": median(errors), "matrices": len(errors)}
        for (block, side), errors in sorted(groups.items())
    ]


def _list_block_errors(blocks: Sequence[ErrorShift]) -> list[Spec]:
    return [
        {
            "layer": position if (n := find_block_number(row.name)) is None else n,
            "side": side,
            "error": error,
            "block": row.name,
        }
        for position, row in enumerate(blocks)
        for side, error in zip(SIDES, (row.a, row.b), strict=True)
        if error is not None
    ]


def compute_tail(kl: Sequence[float], side: str) -> list[Spec]:
    """Return the share of tokens at or above each step of log10(KL), from FLOOR to the largest."""
    ordered = sorted(value for value in kl if isfinite(value))
    if not ordered:
        return []
    highest = floor(STEPS_PER_DECADE * (log10(max(ordered[-1], 10**FLOOR)) - FLOOR))
    rows = []
    for step in range(highest + 1):
        at = FLOOR + step / STEPS_PER_DECADE
        above = len(ordered) - bisect_left(ordered, 10**at)
        if above:
            rows.append({"at": at, "side": side, "share": above / len(ordered), "tokens": above})
    return rows


def _plot_lines(rows: Sequence[Mapping[str, object]], along: str) -> Spec:
    tooltip = [{"field": along}, {"field": "side"}, {"field": "error", "format": ".4%"}]
    x = {
        "field": along,
        "type": "quantitative",
        "axis": make_layer_axis(row[along] for row in rows),
        "scale": TIGHT,
    }
    mark = {"type": "line", "strokeWidth": 1.8, "point": {"size": 26, "filled": True}}
    encoding = {
        "x": x,
        "y": make_percent_axis("error"),
        "color": make_color_encoding("side", SIDES),
        "tooltip": tooltip,
    }
    return make_chart(rows, {"mark": mark, "encoding": encoding})


def _plot_tails(rows: Sequence[Mapping[str, object]]) -> Spec:
    y = {
        "field": "share",
        "type": "quantitative",
        "title": "share of tokens",
        "scale": {"type": "log"},
        "axis": {"format": "~%", "values": [10.0**-n for n in range(8)]},
    }
    tooltip = [
        {"field": "side"},
        {"field": "tokens", "format": ","},
        {"field": "share", "format": ".3%"},
    ]
    mark = {"type": "line", "strokeWidth": 1.8, "point": {"size": 18, "filled": True}}
    x = {
        "field": "at",
        "type": "quantitative",
        "axis": make_power_axis(FLOOR),
        "scale": {"nice": False},
    }
    color = make_color_encoding("side", SIDES)
    encoding = {"x": x, "y": y, "color": color, "tooltip": tooltip}
    return make_chart(rows, {"mark": mark, "encoding": encoding})
