"""Plots of two sides in one frame, as Vega-Lite values. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10
from statistics import median

from quantkit.diff.diff_schema import Diff, ErrorShift
from quantkit.diff.sides import TokenFigures
from quantkit.report.charts import (
    SUPERSCRIPT,
    TIGHT,
    Plot,
    Spec,
    make_chart,
    make_color_encoding,
    make_layer_axis,
    make_percent_axis,
)
from quantkit.report.module_ranges import find_block_number

FLOOR = -9  # log10 of a KL that float32 logits cannot tell from 0
STEPS_PER_DECADE = 4
SIDES = ("A", "B")


def make_charts(diff: Diff, a: TokenFigures | None, b: TokenFigures | None) -> dict[str, Plot]:
    """Plots by name in the order of the page: title, how to read it, description; what has no data is left out."""
    made: dict[str, Plot] = {}
    if rows := compute_layer_medians(diff.modules):
        by = sorted({row.by for row in diff.modules})
        told = f"Median of the layer's quantized matrices; of their {' or '.join(by)}."
        made["layers"] = ("Relative error of modules, by layer", told, _lines(rows, "layer"))
    if rows := _by_block(diff.blocks):
        told = "How far the hidden states are from those of the source after each block; errors add up."
        made["blocks"] = (
            "Relative error of the hidden states, by block",
            told,
            _lines(rows, "layer"),
        )
    if diff.distribution and a and b:
        tails = compute_tail(a.kl, "A") + compute_tail(b.kl, "B")
        told = (
            "Share of the tokens whose KL is at least this large; a curve further down loses less."
        )
        made["kl"] = ("KL divergence per token, from the tail", told, _tails(tails))
    return made


def compute_layer_medians(modules: Sequence[ErrorShift]) -> list[Spec]:
    """Median error per layer and side."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in modules:
        block = find_block_number(row.name)
        for side, error in zip(SIDES, (row.a, row.b), strict=True):
            if block is not None and error is not None:
                found.setdefault((block, side), []).append(error)
    return [
        {"layer": block, "side": side, "error": median(errors), "matrices": len(errors)}
        for (block, side), errors in sorted(found.items())
    ]


def _by_block(blocks: Sequence[ErrorShift]) -> list[Spec]:
    return [
        {
            "layer": place if (n := find_block_number(row.name)) is None else n,
            "side": side,
            "error": error,
            "block": row.name,
        }
        for place, row in enumerate(blocks)
        for side, error in zip(SIDES, (row.a, row.b), strict=True)
        if error is not None
    ]


def compute_tail(kl: Sequence[float], side: str) -> list[Spec]:
    """Share of tokens at or above each step of log10(KL), from the floor to the largest."""
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


def _lines(rows: Sequence[Mapping[str, object]], along: str) -> Spec:
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


def _tails(rows: Sequence[Mapping[str, object]]) -> Spec:
    powers = {n: f"10{n}".translate(SUPERSCRIPT).replace("¹⁰", "10", 1) for n in range(FLOOR, 4)}
    labels = ", ".join(f"'{n}': '{text}'" for n, text in powers.items())
    axis = {
        "title": "KL [nats]",
        "values": list(powers),
        "labelExpr": f"{{{labels}}}[datum.value]",
        "grid": False,
    }
    shares = {"format": "~%", "values": [10.0**-n for n in range(8)]}
    y = {
        "field": "share",
        "type": "quantitative",
        "title": "share of tokens",
        "scale": {"type": "log"},
        "axis": shares,
    }
    tooltip = [
        {"field": "side"},
        {"field": "tokens", "format": ","},
        {"field": "share", "format": ".3%"},
    ]
    mark = {"type": "line", "strokeWidth": 1.8, "point": {"size": 18, "filled": True}}
    x = {"field": "at", "type": "quantitative", "axis": axis, "scale": {"nice": False}}
    return make_chart(
        rows,
        {
            "mark": mark,
            "encoding": {
                "x": x,
                "y": y,
                "color": make_color_encoding("side", SIDES),
                "tooltip": tooltip,
            },
        },
    )
