"""Plots of a report as Vega-Lite specifications. Pure: data in, a description of a drawing out.

Colors are CSS variables, so that one drawing serves light pages, dark pages and paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from quantkit.artifact.fidelity_schema import ExpertCoverage, Fidelity, ModuleResult
from quantkit.figures import list_figures
from quantkit.plan.plan_schema import PlanRule
from quantkit.report.definitions import HIDDEN_STATES, NORM_RATIOS
from quantkit.report.module_ranges import find_block_number
from quantkit.report.samples import Histogram

Spec = dict[str, Any]
Plot = tuple[str, str, Spec]  # title, how to read it, the Vega-Lite specification

SERIES = tuple(f"var(--series-{n})" for n in range(1, 7))
SMALLEST = 1e-6  # smallest error of a logarithmic axis
LOADS = 6  # shades of the expert heatmap
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

CONFIG: Spec = {
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "background": "transparent",
    "view": {"stroke": "transparent"},
    "axis": {
        "domainColor": "var(--line-strong)",
        "gridColor": "var(--line)",
        "tickColor": "var(--line-strong)",
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelPadding": 4,
        "titlePadding": 8,
        "tickSize": 4,
    },
    "axisY": {"domain": False, "ticks": False},
    "legend": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "orient": "top",
        "symbolStrokeWidth": 0,
        "labelLimit": 240,
        "offset": 8,
        "symbolOpacity": 1,
    },
    "text": {"color": "var(--ink)", "fontSize": 11},
    "rule": {"color": "var(--line-strong)"},
}


def make_charts(fidelity: Fidelity, histogram: Histogram | None) -> dict[str, Plot]:
    """Return the plots by name, in the order of the page; a plot without data is left out."""
    plots: dict[str, Plot] = {}
    if rows := summarize_layer_errors(fidelity.modules):
        how = "Median of the layer's quantized matrices, with a band from the 10th to the 90th "
        how += "percentile. " + NORM_RATIOS
        title = "Relative error of weights and outputs, by layer"
        plots["layers"] = (title, how, _plot_layers(rows))
    if fidelity.blocks:
        how = HIDDEN_STATES
        title = "Relative error of the hidden states, by block"
        plots["blocks"] = (title, how, _plot_blocks(fidelity))
    if histogram and histogram.tokens:
        how = f"{histogram.tokens:,} scored tokens; KL below 10⁻⁹ counts as 10⁻⁹."
        if histogram.not_finite:
            how += f" {histogram.not_finite:,} tokens are not finite and not drawn."
        plots["kl"] = ("KL divergence per token", how, _plot_histogram(histogram, fidelity))
    experts = fidelity.experts
    if experts and any(layer.tokens for layer in experts.layers):
        how = describe_expert_tokens(experts)
        plots["experts"] = ("Calibration tokens per expert", how, _plot_experts(experts))
    if fidelity.artifact.rules:
        how = "Scales and zero points included; the mark is the width in the source."
        plots["bits"] = ("Bits per weight, by rule", how, _plot_bits(fidelity.artifact.rules))
    return plots


def describe_expert_tokens(experts: ExpertCoverage) -> str:
    """Return how many experts saw too few tokens, and how they were quantized instead."""
    low, total = experts.list_uncalibrated(), sum(len(layer.tokens) for layer in experts.layers)
    if not low:
        return f"All {total:,} routed experts saw at least {experts.min_tokens:,} tokens."
    count = f"{len(low):,} of {total:,} routed experts"
    return (
        f"{count} saw fewer than {experts.min_tokens:,} tokens (crossed) and got {experts.policy}."
    )


# -------------------------------------------------------------------------------- layers, blocks

_PERCENTILES = (("low", 0.1), ("median", 0.5), ("high", 0.9))


def summarize_layer_errors(modules: Sequence[ModuleResult]) -> list[Spec]:
    """Return percentiles of the quantized matrices' errors per layer and kind of error."""
    groups: dict[tuple[str, int], list[float]] = {}
    for module in modules:
        block = find_block_number(module.name)
        if block is None or module.method is None:
            continue
        for kind, error in (
            ("weights", module.relative_error),
            ("outputs", module.output_relative_error),
        ):
            if error is not None:  # the axis is logarithmic
                groups.setdefault((kind, block), []).append(max(error, SMALLEST))
    rows = []
    for (kind, block), errors in sorted(groups.items()):
        errors.sort()
        percentiles = {
            name: errors[round(share * (len(errors) - 1))] for name, share in _PERCENTILES
        }
        rows.append({
            "kind": kind,
            "layer": block,
            **percentiles,
            "worst": errors[-1],
            "matrices": len(errors),
        })
    return rows


def _plot_layers(rows: list[Spec]) -> Spec:
    tooltip = [
        {"field": "layer"},
        {"field": "kind"},
        *({"field": name, "format": ".3%"} for name in ("median", "low", "high", "worst")),
        {"field": "matrices", "format": ","},
    ]
    x = {
        "field": "layer",
        "type": "quantitative",
        "axis": make_layer_axis(row["layer"] for row in rows),
        "scale": TIGHT,
    }
    ends = [row[name] for row in rows for name in ("low", "high")]
    scale = {"type": "log", "domain": [min(ends) / 1.3, max(ends) * 1.3], "nice": False}
    y = {
        **make_percent_axis("median"),
        "scale": scale,
        "axis": {"format": "~%", "values": compute_log_ticks(min(ends), max(ends))},
    }
    band = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    is_single = len({row["layer"] for row in rows}) == 1
    spread = {"type": "rule", "strokeWidth": 6} if is_single else {"type": "area"}
    line = {"type": "line", "strokeWidth": 1.8, "point": {"size": 26, "filled": True}}
    layer = [
        {"mark": {**spread, "opacity": 0.16}, "encoding": band},
        {"mark": line, "encoding": {"y": y, "tooltip": tooltip}},
    ]
    color = make_color_encoding("kind", ["weights", "outputs"])
    return make_chart(rows, {"encoding": {"x": x, "color": color}, "layer": layer})


def _plot_blocks(fidelity: Fidelity) -> Spec:
    rows = [
        {
            "block": row.block,
            "layer": position if (n := find_block_number(row.block)) is None else n,
            "error": row.relative_error,
        }
        for position, row in enumerate(fidelity.blocks)
    ]
    tooltip = [{"field": "block"}, {"field": "error", "format": ".3%"}]
    x = {
        "field": "layer",
        "type": "quantitative",
        "axis": make_layer_axis(row["layer"] for row in rows),
        "scale": TIGHT,
    }
    mark = {
        "type": "line",
        "color": SERIES[0],
        "strokeWidth": 1.8,
        "point": {"color": SERIES[0], "size": 26},
    }
    encoding = {"x": x, "y": make_percent_axis("error"), "tooltip": tooltip}
    return make_chart(rows, {"mark": mark, "encoding": encoding})


# ---------------------------------------------------------------------------------- KL per token


def _plot_histogram(histogram: Histogram, fidelity: Fidelity) -> Spec:
    rows = [
        {
            "from": histogram.start + place * histogram.step,
            "to": histogram.start + (place + 1) * histogram.step,
            "domain": domain,
            "share": count / histogram.tokens,
            "tokens": count,
        }
        for domain, counts in histogram.counts.items()
        for place, count in enumerate(counts)
        if count
    ]
    stacks = (
        sum(counts[place] for counts in histogram.counts.values())
        for place in range(histogram.bins)
    )
    top = max(stacks) / histogram.tokens
    headroom = {"domainMax": 1.2 * top, "nice": False}  # for the names of the marked figures
    tooltip = [
        {"field": "domain"},
        {"field": "tokens", "format": ","},
        {"field": "share", "format": ".2%"},
    ]
    x = {
        "field": "from",
        "type": "quantitative",
        "bin": "binned",
        "axis": make_power_axis(int(histogram.start)),
    }
    y = {**make_percent_axis("share", "share of tokens", "~%"), "stack": True, "scale": headroom}
    bars = {
        "mark": {"type": "bar", "binSpacing": 1},
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": y,
            "color": make_color_encoding("domain", list(histogram.counts)),
            "tooltip": tooltip,
        },
    }
    return make_chart(rows, {"layer": [bars, *_mark_figures(fidelity)]})


def make_power_axis(lowest: int) -> Spec:
    """Return an axis of log10(KL) with ticks 10ⁿ from `lowest` to 10³."""
    powers = {n: f"10{n}".translate(SUPERSCRIPT).replace("¹⁰", "10", 1) for n in range(lowest, 4)}
    labels = ", ".join(f"'{n}': '{text}'" for n, text in powers.items())
    return {
        "title": "KL [nats]",
        "values": list(powers),
        "labelExpr": f"{{{labels}}}[datum.value]",
        "grid": False,
    }


def _mark_figures(fidelity: Fidelity) -> list[Spec]:
    """Return the figures of the table that have a `mark`, over all text, as labeled lines."""
    readings = [(row.mark, row.read(fidelity)) for row in list_figures() if row.mark]
    marks = [
        (name, log10(reading.value))
        for name, reading in readings
        if reading.value and reading.value > 1e-9
    ]
    rows: list[Spec] = [
        {"name": name, "at": value, "row": n} for n, (name, value) in enumerate(marks)
    ]
    x = {"field": "at", "type": "quantitative"}
    line = {
        "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--ink)"},
        "encoding": {"x": x},
    }
    labels = [
        {
            "transform": [{"filter": f"datum.row == {row['row']}"}],
            "mark": {
                "type": "text",
                "align": "left",
                "dx": 4,
                "dy": 7 + 14 * row["row"],
                "baseline": "middle",
            },
            "encoding": {"x": x, "y": {"value": 0}, "text": {"field": "name"}},
        }
        for row in rows
    ]
    return [{"data": {"values": rows}, "layer": [line, *labels]}] if rows else []


# --------------------------------------------------------------------------------------- experts


def _plot_experts(experts: ExpertCoverage) -> Spec:
    """Return a heatmap: a row per layer, a cell per expert, a cross on under-calibrated experts."""
    rows = [
        {"block": layer.block, "tokens": list(layer.tokens)}
        for layer in experts.layers
        if layer.tokens
    ]
    widest = max(len(layer.tokens) for layer in experts.layers)
    blocks = [row["block"] for row in rows]
    bounds = compute_shade_bounds(experts)
    shade = " : ".join(f"datum.tokens < {end} ? {n}" for n, end in enumerate(bounds))
    transform = [
        {"flatten": ["tokens"]},
        {"window": [{"op": "row_number", "as": "place"}], "groupby": ["block"]},
        {"calculate": "datum.place - 1", "as": "expert"},
        {"calculate": f"{shade} : {len(bounds)}", "as": "shade"},
    ]
    x = {
        "field": "expert",
        "type": "ordinal",
        "axis": {
            "title": "expert",
            "values": list(range(0, widest, max(1, widest // 16))),
            "labelAngle": 0,
            "labelFlush": True,
        },
    }
    step = max(1, len(rows) // 15)
    y = {
        "field": "block",
        "type": "ordinal",
        "sort": blocks,
        "title": None,
        "axis": {"labelLimit": 150, "values": blocks[::step]},
    }
    marks = [_draw_cells(bounds, widest), _draw_crosses(experts.min_tokens, widest)]
    return {
        **make_chart(rows, {"encoding": {"x": x, "y": y}, "layer": marks}),
        "transform": transform,
        "height": min(24, max(7, 480 // len(rows))) * len(rows),
    }


_EXPERT_TOOLTIP = [{"field": "block"}, {"field": "expert"}, {"field": "tokens", "format": ","}]


def _draw_cells(bounds: Sequence[int], widest: int) -> Spec:
    """Return the shaded cells with their legend."""
    shades = ["var(--under)", *(f"var(--load-{n})" for n in range(1, LOADS + 1))]
    colors = shades[: len(bounds) + 1]
    texts = (f"under {bounds[0]:,}", *(f"from {end:,}" for end in bounds))
    labels = ", ".join(f"'{text}'" for text in texts)
    legend = {
        "title": "tokens",
        "symbolType": "square",
        "symbolSize": 140,
        "columns": 7,
        "labelExpr": f"[{labels}][datum.value]",
    }
    scale = {"domain": list(range(len(colors))), "range": colors}
    mark = {
        "type": "rect",
        "aria": False,
        "stroke": "var(--page)",
        "strokeWidth": 0.5 if widest > 64 else 1.5,
    }
    color = {"field": "shade", "type": "ordinal", "scale": scale, "legend": legend}
    return {"mark": mark, "encoding": {"color": color, "tooltip": _EXPERT_TOOLTIP}}


def _draw_crosses(min_tokens: int, widest: int) -> Spec:
    """Return a cross per expert that saw fewer than `min_tokens`."""
    mark = {
        "type": "point",
        "shape": "cross",
        "angle": 45,
        "filled": True,
        "color": "var(--page)",
        "aria": False,
        "size": min(60, max(6, (600 // widest) ** 2 // 2)),
        "opacity": 1,
    }
    return {
        "transform": [{"filter": f"datum.tokens < {min_tokens}"}],
        "mark": mark,
        "encoding": {"tooltip": _EXPERT_TOOLTIP},
    }


def compute_shade_bounds(experts: ExpertCoverage) -> list[int]:
    """Return the upper ends of the heatmap's shades, in tokens.

    The first shade ends at the required minimum, the others in equal ratios up to the maximum.
    """
    most = max((max(layer.tokens) for layer in experts.layers if layer.tokens), default=0)
    counts = [n for layer in experts.layers for n in layer.tokens if n >= experts.min_tokens]
    least = max(1, experts.min_tokens, min(counts, default=1))
    ends = {round(least * (max(most, least) / least) ** (n / LOADS)) for n in range(1, LOADS)}
    first = max(1, experts.min_tokens)
    return [first, *sorted(end for end in ends if end > first)]


# ------------------------------------------------------------------------------------------ bits


def _plot_bits(rules: Sequence[PlanRule]) -> Spec:
    rows = [
        {
            "rule": f"{place}",
            "name": rule.label
            if rule.label.endswith(rule.action)
            else f"{rule.label}: {rule.action}",
            "kept": rule.action.startswith(("keep", "drop")),
            "modules": rule.modules,
            "parameters": rule.parameters,
            "after": rule.bits_per_weight,
            "before": 8 * rule.bytes_before / rule.parameters if rule.parameters else None,
        }
        for place, rule in enumerate(rules)
    ]
    names = ("name", "modules", "parameters", "before", "after")
    formats = {"modules": ",", "parameters": ",", "before": ".2f", "after": ".2f"}
    tooltip = [
        {"field": name, **({"format": formats[name]} if name in formats else {})} for name in names
    ]
    y = {
        "field": "rule",
        "type": "ordinal",
        "axis": None,
        "sort": [row["rule"] for row in rows],
        "scale": {"padding": 0.62},
    }
    axis = {"tickCount": 8}
    x = {"field": "after", "type": "quantitative", "title": "bits per weight", "axis": axis}
    kept = {"condition": {"test": "datum.kept", "value": "var(--line-strong)"}, "value": SERIES[0]}
    bar = {
        "mark": {"type": "bar", "height": 12},
        "encoding": {"x": x, "color": kept, "tooltip": tooltip},
    }
    before = {
        "mark": {"type": "tick", "color": "var(--ink)", "thickness": 2, "size": 20},
        "encoding": {"x": {"field": "before", "type": "quantitative"}, "tooltip": tooltip},
    }
    name = {
        "mark": {"type": "text", "align": "left", "dy": -15, "limit": {"expr": "width"}},
        "encoding": {"x": {"datum": 0}, "text": {"field": "name", "type": "nominal"}},
    }
    value = {
        "mark": {"type": "text", "align": "left", "dx": 6, "color": "var(--muted)"},
        "encoding": {"x": x, "text": {"field": "after", "format": ".2f"}},
    }
    layers = {"encoding": {"y": y}, "layer": [bar, before, name, value]}
    return {**make_chart(rows, layers), "height": 46 * len(rows)}


# ------------------------------------------------------------------------------------ shared parts

TIGHT = {"nice": False, "padding": 12}


def compute_log_ticks(low: float, high: float) -> list[float]:
    """Return few round numbers for a logarithmic axis.

    Powers of ten over a wide range, with 2 and 5 over a narrow one.
    """
    between = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    return [float(f"{step}e{power}") for power in powers for step in between]


def make_layer_axis(numbers: Any) -> Spec:
    """Return an axis of layer numbers with at most 16 labels."""
    layers = sorted(set(numbers))
    step = max(1, -(-len(layers) // 16))
    return {"title": "layer", "values": layers[::step], "format": "d", "grid": False}


def make_percent_axis(field: str, title: str = "relative error", form: str = "~%") -> Spec:
    """Return a vertical axis of shares."""
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "axis": {"format": form, "tickCount": 5},
    }


def make_color_encoding(field: str, names: Sequence[str]) -> Spec:
    """Return a color per name, with a legend."""
    scale = {"domain": list(names), "range": [SERIES[n % len(SERIES)] for n in range(len(names))]}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def make_chart(rows: Sequence[Mapping[str, Any]], parts: Spec) -> Spec:
    """Return a plot as wide as its container, with its data."""
    values = [{name: _shorten(value) for name, value in row.items()} for row in rows]
    return {"width": "container", "height": 220, "data": {"values": values}, **parts}


def _shorten(value: object) -> object:
    """Round a float to six digits, more than a plot shows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
