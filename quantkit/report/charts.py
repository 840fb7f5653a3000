"""The report's plots as Vega-Lite values: data in, a drawing's description out. Pure.

Colours are CSS variables, so that one drawing serves a light page, a dark one and paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from quantkit.artifact.fidelity_schema import ExpertCoverage, Fidelity, ModuleResult
from quantkit.figures import list_figures
from quantkit.plan.plan_schema import PlanRule
from quantkit.report.module_ranges import find_block_number
from quantkit.report.samples import Histogram

Spec = dict[str, Any]
Plot = tuple[str, str, Spec]  # title, how to read it, what Vega-Lite draws

SERIES = tuple(f"var(--series-{n})" for n in range(1, 7))
SMALLEST = 1e-6  # an error that is drawn
LOADS = 6  # shades of the expert heatmap
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

CONFIG: Spec = {
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "background": "transparent",
    "view": {"stroke": "transparent"},
    "axis": {
        "domainColor": "var(--line-strong)", "gridColor": "var(--line)", "tickColor": "var(--line-strong)",
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "labelPadding": 4, "titlePadding": 8, "tickSize": 4,
    },
    "axisY": {"domain": False, "ticks": False},
    "legend": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "orient": "top", "symbolStrokeWidth": 0, "labelLimit": 240, "offset": 8,
        "symbolOpacity": 1,
    },
    "text": {"color": "var(--ink)", "fontSize": 11},
    "rule": {"color": "var(--line-strong)"},
}  # fmt: skip


def make_charts(fidelity: Fidelity, histogram: Histogram | None) -> dict[str, Plot]:
    """Plots by name in the order of the page: title, how to read it, description; what has no data is left out."""
    made: dict[str, Plot] = {}
    if layers := summarize_layer_errors(fidelity.modules):
        told = "Median of the layer's quantized matrices, with a band from the 10th to the 90th percentile. Outputs are "
        told += "those over the calibration text."
        made["layers"] = ("Relative error of weights and outputs, by layer", told, _layers(layers))
    if fidelity.blocks:
        told = "How far the hidden states of the artifact are from those of the source after each block; errors add up."
        made["blocks"] = ("Relative error of the hidden states, by block", told, _blocks(fidelity))
    if histogram and histogram.tokens:
        told = f"{histogram.tokens:,} scored tokens; KL below 10⁻⁹ counts as 10⁻⁹."
        told += (
            f" {histogram.not_finite:,} tokens are not finite and not drawn."
            if histogram.not_finite
            else ""
        )
        made["kl"] = ("KL divergence per token", told, _histogram(histogram, fidelity))
    if fidelity.experts and any(layer.tokens for layer in fidelity.experts.layers):
        made["experts"] = (
            "Calibration tokens per expert",
            describe_expert_tokens(fidelity.experts),
            _experts(fidelity.experts),
        )
    if fidelity.artifact.rules:
        told = "Scales and zero points included; the mark is what the source stores."
        made["bits"] = ("Bits per weight, by rule", told, _bits(fidelity.artifact.rules))
    return made


def describe_expert_tokens(experts: ExpertCoverage) -> str:
    """How many experts saw too little, and what they got."""
    low, every = experts.uncalibrated(), sum(len(layer.tokens) for layer in experts.layers)
    if not low:
        return f"All {every:,} routed experts saw at least {experts.min_tokens:,} tokens."
    told = f"{len(low):,} of {every:,} routed experts saw fewer than {experts.min_tokens:,} tokens (crossed) and got "
    return f"{told}{experts.policy}."


def summarize_layer_errors(modules: Sequence[ModuleResult]) -> list[Spec]:
    """Percentiles of the quantized matrices' errors per layer and kind of error."""
    found: dict[tuple[str, int], list[float]] = {}
    for module in modules:
        block = find_block_number(module.name)
        if block is None or module.method is None:
            continue
        for kind, error in (
            ("weights", module.relative_error),
            ("outputs", module.output_relative_error),
        ):
            if error is not None:  # drawn by its logarithm
                found.setdefault((kind, block), []).append(max(error, SMALLEST))
    rows = []
    for (kind, block), errors in sorted(found.items()):
        errors.sort()
        at = {name: errors[round(share * (len(errors) - 1))] for name, share in _PERCENTILES}
        rows.append({
            "kind": kind,
            "layer": block,
            **at,
            "worst": errors[-1],
            "matrices": len(errors),
        })
    return rows


_PERCENTILES = (("low", 0.1), ("median", 0.5), ("high", 0.9))


def _layers(rows: list[Spec]) -> Spec:
    tooltip = [
        {"field": "layer"},
        {"field": "kind"},
        *({"field": name, "format": ".3%"} for name in ("median", "low", "high", "worst")),
        {"field": "matrices", "format": ","},
    ]
    colour = make_color_encoding("kind", ["weights", "outputs"])
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
    single = len({row["layer"] for row in rows}) == 1
    spread = {"type": "rule", "strokeWidth": 6} if single else {"type": "area"}
    line = {"type": "line", "strokeWidth": 1.8, "point": {"size": 26, "filled": True}}
    layer = [
        {"mark": {**spread, "opacity": 0.16}, "encoding": band},
        {"mark": line, "encoding": {"y": y, "tooltip": tooltip}},
    ]
    return make_chart(rows, {"encoding": {"x": x, "color": colour}, "layer": layer})


def _blocks(fidelity: Fidelity) -> Spec:
    rows = [
        {
            "block": row.block,
            "layer": place if (n := find_block_number(row.block)) is None else n,
            "error": row.relative_error,
        }
        for place, row in enumerate(fidelity.blocks)
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
    return make_chart(
        rows,
        {"mark": mark, "encoding": {"x": x, "y": make_percent_axis("error"), "tooltip": tooltip}},
    )


def _histogram(found: Histogram, fidelity: Fidelity) -> Spec:
    rows = [
        {
            "from": found.start + place * found.step,
            "to": found.start + (place + 1) * found.step,
            "domain": domain,
            "share": count / found.tokens,
            "tokens": count,
        }
        for domain, counts in found.counts.items()
        for place, count in enumerate(counts)
        if count
    ]
    highest = (
        max(sum(counts[place] for counts in found.counts.values()) for place in range(found.bins))
        / found.tokens
    )
    headroom = {"domainMax": 1.2 * highest, "nice": False}  # for the names of the marked figures
    powers = {
        n: f"10{n}".translate(SUPERSCRIPT).replace("¹⁰", "10", 1)
        for n in range(int(found.start), 4)
    }
    labels = ", ".join(f"'{n}': '{text}'" for n, text in powers.items())
    axis = {
        "title": "KL [nats]",
        "values": list(powers),
        "labelExpr": f"{{{labels}}}[datum.value]",
        "grid": False,
    }
    tooltip = [
        {"field": "domain"},
        {"field": "tokens", "format": ","},
        {"field": "share", "format": ".2%"},
    ]
    bars = {
        "mark": {"type": "bar", "binSpacing": 1},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "bin": "binned", "axis": axis},
            "x2": {"field": "to"},
            "y": {
                **make_percent_axis("share", "share of tokens", "~%"),
                "stack": True,
                "scale": headroom,
            },
            "color": make_color_encoding("domain", list(found.counts)),
            "tooltip": tooltip,
        },
    }
    return make_chart(rows, {"layer": [bars, *_marked(fidelity)]})


def _marked(fidelity: Fidelity) -> list[Spec]:
    """The mean and the upper percentiles over all text, as lines with their names."""
    readings = [(row.mark, row.read(fidelity)) for row in list_figures() if row.mark]
    at = [
        (name, log10(reading.value))
        for name, reading in readings
        if reading.value and reading.value > 1e-9
    ]
    rows: list[Spec] = [{"name": name, "at": value, "row": n} for n, (name, value) in enumerate(at)]
    x = {"field": "at", "type": "quantitative"}
    line = {
        "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--ink)"},
        "encoding": {"x": x},
    }
    words = [
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
    return [{"data": {"values": rows}, "layer": [line, *words]}] if rows else []


def _experts(experts: ExpertCoverage) -> Spec:
    fed = [layer for layer in experts.layers if layer.tokens]
    layers = [{"block": layer.block, "tokens": list(layer.tokens)} for layer in fed]
    widest = max(len(layer.tokens) for layer in fed)
    bounds = compute_shade_bounds(experts)
    colours = ["var(--under)", *(f"var(--load-{n})" for n in range(1, LOADS + 1))][
        : len(bounds) + 1
    ]
    height = min(24, max(7, 480 // len(layers)))
    domain = [layer.block for layer in fed]
    every = max(1, widest // 16)
    x = {
        "field": "expert", "type": "ordinal",
        "axis": {"title": "expert", "values": list(range(0, widest, every)), "labelAngle": 0, "labelFlush": True},
    }  # fmt: skip
    step = max(1, len(layers) // 15)
    y = {
        "field": "block", "type": "ordinal", "sort": domain, "title": None,
        "axis": {"labelLimit": 150, "values": domain[::step]},
    }  # fmt: skip
    shade = (
        " : ".join(f"datum.tokens < {end} ? {n}" for n, end in enumerate(bounds))
        + f" : {len(bounds)}"
    )
    starts = [f"from {end:,}" for end in bounds]
    labels = ", ".join(f"'{text}'" for text in (f"under {bounds[0]:,}", *starts))
    legend = {
        "title": "tokens", "symbolType": "square", "symbolSize": 140, "columns": 7,
        "labelExpr": f"[{labels}][datum.value]",
    }  # fmt: skip
    scale = {"domain": list(range(len(colours))), "range": colours}
    tooltip = [{"field": "block"}, {"field": "expert"}, {"field": "tokens", "format": ","}]
    cells = {
        "mark": {
            "type": "rect",
            "aria": False,
            "stroke": "var(--page)",
            "strokeWidth": 0.5 if widest > 64 else 1.5,
        },
        "encoding": {
            "color": {"field": "shade", "type": "ordinal", "scale": scale, "legend": legend},
            "tooltip": tooltip,
        },
    }
    crosses = {
        "transform": [{"filter": f"datum.tokens < {experts.min_tokens}"}],
        "mark": {
            "type": "point", "shape": "cross", "angle": 45, "filled": True, "color": "var(--page)", "aria": False,
            "size": min(60, max(6, (600 // widest) ** 2 // 2)), "opacity": 1,
        },
        "encoding": {"tooltip": tooltip},
    }  # fmt: skip
    rows = [
        {"flatten": ["tokens"]},
        {"window": [{"op": "row_number", "as": "place"}], "groupby": ["block"]},
        {"calculate": "datum.place - 1", "as": "expert"},
        {"calculate": shade, "as": "shade"},
    ]
    return {
        **make_chart(layers, {"encoding": {"x": x, "y": y}, "layer": [cells, crosses]}),
        "transform": rows,
        "height": height * len(layers),
    }


def compute_shade_bounds(experts: ExpertCoverage) -> list[int]:
    """Where a shade of the heatmap ends: at the fewest tokens allowed, then in equal ratios up to the most."""
    most = max((max(layer.tokens) for layer in experts.layers if layer.tokens), default=0)
    counted = [n for layer in experts.layers for n in layer.tokens if n >= experts.min_tokens]
    least = max(1, experts.min_tokens, min(counted, default=1))
    ends = {round(least * (max(most, least) / least) ** (n / LOADS)) for n in range(1, LOADS)}
    return [
        max(1, experts.min_tokens),
        *sorted(end for end in ends if end > max(1, experts.min_tokens)),
    ]


def _bits(rules: Sequence[PlanRule]) -> Spec:
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
    y = {"field": "rule", "type": "ordinal", "axis": None, "sort": [row["rule"] for row in rows]}
    x = {
        "field": "after",
        "type": "quantitative",
        "title": "bits per weight",
        "axis": {"tickCount": 8},
    }
    inner = {"padding": 0.62}
    kept = {"condition": {"test": "datum.kept", "value": "var(--line-strong)"}, "value": SERIES[0]}
    bar = {
        "mark": {"type": "bar", "height": 12},
        "encoding": {"x": x, "color": kept, "tooltip": tooltip},
    }
    mark = {"type": "tick", "color": "var(--ink)", "thickness": 2, "size": 20}
    before = {
        "mark": mark,
        "encoding": {"x": {"field": "before", "type": "quantitative"}, "tooltip": tooltip},
    }
    words = {
        "mark": {"type": "text", "align": "left", "dy": -15, "limit": {"expr": "width"}},
        "encoding": {"x": {"datum": 0}, "text": _text("name")},
    }
    value = {
        "mark": {"type": "text", "align": "left", "dx": 6, "color": "var(--muted)"},
        "encoding": {"x": x, "text": {"field": "after", "format": ".2f"}},
    }
    return {
        **make_chart(
            rows, {"encoding": {"y": {**y, "scale": inner}}, "layer": [bar, before, words, value]}
        ),
        "height": 46 * len(rows),
    }


def compute_log_ticks(low: float, high: float) -> list[float]:
    """Few round numbers for a logarithmic axis: powers of ten over a wide range, with 2 and 5 over a narrow one."""
    between = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    return [float(f"{step}e{power}") for power in powers for step in between]


TIGHT = {"nice": False, "padding": 12}


def _text(field: str) -> Spec:
    return {"field": field, "type": "nominal"}


def make_layer_axis(numbers: Any) -> Spec:
    """An axis of layer numbers with few enough labels."""
    known = sorted(set(numbers))
    step = max(1, -(-len(known) // 16))
    return {"title": "layer", "values": known[::step], "format": "d", "grid": False}


def make_percent_axis(field: str, title: str = "relative error", form: str = "~%") -> Spec:
    """A vertical axis of shares."""
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "axis": {"format": form, "tickCount": 5},
    }


def make_color_encoding(field: str, names: Sequence[str]) -> Spec:
    """A colour per name, with a legend."""
    scale = {"domain": list(names), "range": [SERIES[n % len(SERIES)] for n in range(len(names))]}
    return {"field": field, "type": "nominal", "title": None, "scale": scale}


def make_chart(rows: Sequence[Mapping[str, Any]], parts: Spec) -> Spec:
    """A plot as wide as its place, with its data."""
    values = [{name: _short(value) for name, value in row.items()} for row in rows]
    return {"width": "container", "height": 220, "data": {"values": values}, **parts}


def _short(value: object) -> object:
    """Six digits are more than a plot shows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
