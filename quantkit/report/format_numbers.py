"""Numbers as text. "-" is a figure that was not measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from quantkit.artifact.fidelity_schema import Figure, GateResult
from quantkit.figure_readers import ALL_TEXT, NOT_FINITE, Reading
from quantkit.figures import FigureDefinition, Style, find_figure
from quantkit.plan.plan_schema import PlanPart

MISSING = "-"
SMALL = 1e-3
"""Rows of figures in nats below this one are written in a power of ten."""
SMALL_FACTOR = 0.1
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
INTERVALS = "Intervals in brackets are 95 %."
"""The convention of all tables, named once per table."""
COPIED = "copied bit for bit"
TEXT_ONLY = "calibration and figures use text only"
"""Note of a plan and a report on a model with parts that text does not run through."""


def format_count(n: int | None) -> str:
    """Return 12345 as "12,345"."""
    return MISSING if n is None else f"{n:,}"


def format_exposure(label: str, seen: Collection[str]) -> str:
    """Return whether calibration had text of a kind: "seen" or "unseen"; "-" for all text."""
    if label == ALL_TEXT:
        return MISSING
    return "seen" if label in seen else "unseen"


def format_size(n_bytes: int) -> str:
    """Return bytes in decimal units, as disks and the model hub do: 5_000_000_000 as "5.00 GB"."""
    for scale, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"


def format_size_change(before: int, after: int) -> str:
    """Format the sizes with their factor: "1.42x smaller, 5.45 MB from 7.73 MB"."""
    sizes = f"{format_size(after)} from {format_size(before)}"
    return f"{format_size_factor(before, after)}, {sizes}" if before and after else sizes


def format_size_factor(before: int, after: int) -> str:
    """Format positive sizes as "1.42x smaller", "1.10x larger" or "as large as the source"."""
    factor = max(before / after, after / before)
    if f"{factor:.2f}" == "1.00":
        return "as large as the source"
    return f"{factor:.2f}x {'smaller' if after < before else 'larger'}"


def format_parts(parts: Sequence[PlanPart]) -> str:
    """Return "model.visual (390 tensors, 1.34 GB), mtp (15 tensors, 210.00 MB)"."""
    return ", ".join(
        f"{part.name} ({format_count(part.tensors)} tensors, {format_size(part.bytes)}"
        + (f", {format_count(part.decoded)} of them decoded)" if part.decoded else ")")
        for part in parts
    )


def describe_copy(parts: Sequence[PlanPart]) -> str:
    """Return how parts are copied: "copied bit for bit", or with codes that became values."""
    is_decoded = any(part.decoded for part in parts)
    return "copied, codes that the format does not hold decoded" if is_decoded else COPIED


def format_parameters(n: int) -> str:
    """Return 671_026_404_352 as "671.03 B" (billions), 7_300_000 as "7.30 M"."""
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return str(n)


def format_digits(value: float | None, significant: int = 3) -> str:
    """Return significant digits, without an exponent down to 0.00001; whole numbers unchanged."""
    if value is None:
        return MISSING
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    if abs(value) < 1e-5 or abs(value) >= 1e6:
        return f"{value:.{significant - 1}e}"
    places = max(0, significant - 1 - _exponent(value))
    return f"{value:.{places}f}"


def format_percent(share: float | None, places: int = 2) -> str:
    """Return 0.9953 as "99.53 %"."""
    return MISSING if share is None else f"{100 * share:.{places}f} %"


def format_probability(p: float | None) -> str:
    """Return 0.1174 as "0.117", 0.0001 as "<0.001"."""
    return MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


# ------------------------------------------------------------------------ figures of the table


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """How a figure, an end of its interval and a difference of two figures are written."""

    value: Callable[[float], str]
    end: Callable[[float], str]
    difference: Callable[[float], str]


STYLES: Mapping[Style, NumberFormat] = {
    "nats": NumberFormat(  # 0.000361 [0.000319, 0.000403], see format_measured
        value=format_digits,
        end=format_digits,
        difference=lambda value: f"{'+' if value > 0 else ''}{format_digits(value)}",
    ),
    "ratio": NumberFormat(  # 1.0003 [1.0001, 1.0005]
        value="{:.4f}".format, end="{:.4f}".format, difference="{:+.4f}".format
    ),
    "factor": NumberFormat(  # 0.42x [0.21, 0.81]
        value=lambda value: format_factor(value),
        end="{:.2f}".format,
        difference="{:+.2f}".format,
    ),
    "percent": NumberFormat(  # 99.53 % [99.44, 99.61]
        value=format_percent,
        end=lambda end: f"{100 * end:.2f}",
        difference=lambda value: f"{100 * value:+.2f}",
    ),
    "signed percent": NumberFormat(  # -0.031 % [-0.035, -0.027]
        value=lambda value: f"{100 * value:+.3f} %",
        end=lambda end: f"{100 * end:+.3f}",
        difference=lambda value: f"{100 * value:+.3f}",
    ),
    "count": NumberFormat(
        value=lambda value: format_count(round(value)),
        end=format_digits,
        difference=lambda value: f"{round(value):+,}",
    ),
    "bits": NumberFormat(value="{:.2f}".format, end="{:.2f}".format, difference="{:+.2f}".format),
    "bytes": NumberFormat(
        value=lambda value: format_size(round(value)),
        end=lambda end: format_size(round(end)),
        difference=lambda value: f"{round(value):+,} B",
    ),
}
"""The formats of the table's styles. A difference of percentages is in percentage points."""


def format_value(definition: FigureDefinition, value: float | None) -> str:
    """Return a figure's value without its error."""
    return MISSING if value is None else STYLES[definition.style].value(value)


def format_reading(definition: FigureDefinition, reading: Reading, power: int = 0) -> str:
    """Return a figure with its 95 % interval: "0.000361 [0.000319, 0.000403]"; "-" if not measured.

    power: the exponent of ten in which a row is written (`choose_power`).
    """
    if not reading.is_measured:
        return MISSING
    return format_figure(Figure(value=reading.value, ci=reading.ci), definition.style, power)


def choose_power(definition: FigureDefinition, readings: Sequence[Reading]) -> int:
    """Return the exponent of ten in which the readings of a row are written: 0, -3, -6, ...

    Only small figures in nats have one, so that a row has one notation.
    """
    values = [abs(reading.value) for reading in readings if reading.value]
    if definition.style != "nats" or not values or max(values) >= SMALL:
        return 0
    return 3 * (_exponent(max(values)) // 3)


def add_power(label: str, power: int) -> str:
    """Return a label with the power of ten of its row: "KL mean [10⁻³ nats/token]"."""
    if not power:
        return label
    name, bracket, unit = label.partition(" [")
    return f"{name} [{format_power(power)}{f' {unit}' if bracket else ']'}"


def format_power(power: int) -> str:
    """Return -6 as "10⁻⁶"."""
    return f"10{str(power).translate(SUPERSCRIPT)}"


def format_figure(figure: Figure | None, style: Style, power: int = 0) -> str:
    """Return a measured number with its 95 % interval in a style of the table, in units of
    10^power. An end that the sample is too small to give is written as infinite.
    """
    if figure is None:
        return MISSING
    if figure.value is None:
        return NOT_FINITE
    unit = 10.0**power
    value, ends = figure.value / unit, figure.ci
    if ends is None:
        return STYLES[style].value(value)
    if style == "factor":
        return format_factors(figure)
    low, high = (None if end is None else end / unit for end in ends)
    show, end = STYLES[style].value, STYLES[style].end
    if style == "nats":
        show = end = f"{{:.{_count_places(value, low, high)}f}}".format
    first = "-∞" if low is None else end(low)
    return f"{show(value)} [{first}, {'∞' if high is None else end(high)}]"


def _count_places(value: float, low: float | None, high: float | None) -> int:
    """Return the decimals that show the nearer end of an interval with two digits."""
    distances = [abs(end - value) for end in (low, high) if end is not None and end != value]
    smallest = min(distances, default=abs(value) / 10)
    return min(9, max(0, 1 - _exponent(smallest))) if smallest else 2


def format_nats_pair(a: float, b: float) -> tuple[int, str, str]:
    """Return two values in nats in one notation, and the power of ten in which they are written."""
    power = 3 * (_exponent(max(abs(a), abs(b))) // 3) if 0 < max(abs(a), abs(b)) < SMALL else 0
    first, second = a / 10**power, b / 10**power
    known = [abs(value) for value in (first, second) if value]
    places = min(6, max(0, 2 - _exponent(min(known)))) if known else 0
    return power, f"{first:.{places}f}", f"{second:.{places}f}"


def format_factor(value: float | None, places: int | None = None) -> str:
    """Return 8.564 as "8.6x", 1.0032 as "1.0032x": two digits of the difference from 1."""
    if value is None:
        return MISSING
    return f"{value:.{count_factor_places(value) if places is None else places}f}x"


def count_factor_places(value: float) -> int:
    """Return the decimals of a factor."""
    digits = abs(value - 1) if value >= SMALL_FACTOR else abs(value)
    return min(4, max(0, 1 - _exponent(digits))) if digits else 2


def format_factors(figure: Figure | None) -> str:
    """Return a factor with its 95 % interval: "8.6x [3.1, 23.7]"."""
    if figure is None or figure.value is None:
        return MISSING
    places = count_factor_places(figure.value)
    low, high = figure.ci or (None, None)
    if low is None and high is None:
        return format_factor(figure.value, places)
    first = "0" if low is None else f"{low:.{places}f}"
    last = "∞" if high is None else f"{high:.{places}f}"
    return f"{format_factor(figure.value, places)} [{first}, {last}]"


def format_gate_value(gate: GateResult) -> str:
    """Return the value of a gate with its interval, in the style of its figure."""
    figure = find_figure(gate.figure.partition("@")[0])
    if gate.value is None:
        return MISSING
    style: Style = figure.style if figure else "nats"
    if gate.figure.endswith((".recovery", ".score")):
        style = "percent"
    elif not figure and not gate.ci:
        return format_digits(gate.value)
    return format_figure(Figure(value=gate.value, ci=gate.ci), style)


def format_headroom(gate: GateResult) -> str:
    """Return the distance of a gate's value from its bound: "82 %", "+1.60 points"."""
    if gate.headroom is None:
        return MISSING
    if gate.headroom_share is not None:
        return f"{100 * gate.headroom_share:.0f} %"
    figure = find_figure(gate.figure.partition("@")[0])
    is_share = (figure is not None and figure.style in ("percent", "signed percent")) or (
        gate.figure.endswith((".recovery", ".score"))
    )
    if is_share or gate.figure.endswith(".low"):
        return f"{(100 if is_share else 1) * gate.headroom:+.2f} points"
    if figure is not None:
        return STYLES[figure.style].difference(gate.headroom)
    return f"{'+' if gate.headroom > 0 else ''}{format_digits(gate.headroom)}"


# ------------------------------------------------------------------------ differences, intervals


def format_points(figure: Figure | None) -> str:
    """Return percentage points with the 95 % interval: "-0.91 [-1.97, +0.08]"."""
    return _format_change(figure, 2)


def format_recovery(figure: Figure | None) -> str:
    """Return a share with its 95 % interval: "98.79 % [96.2, 101.6]"."""
    low, high = (figure.ci if figure else None) or (None, None)
    interval = (
        f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
    )
    value = Figure(value=figure.value) if figure else None
    return format_figure(value, "percent") + interval


def format_nats(figure: Figure | None) -> str:
    """Return a difference in nats per token, to two digits of its 95 % interval.

    "-0.0121 [-0.0203, -0.0041]".
    """
    low, high = (figure.ci if figure else None) or (None, None)
    width = high - low if low is not None and high is not None else 0.0
    return _format_change(figure, min(9, max(2, 1 - _exponent(width / 2))) if width > 0 else 4)


def _format_change(figure: Figure | None, places: int) -> str:
    low, high = (figure.ci if figure else None) or (None, None)
    interval = (
        f" [{low:+.{places}f}, {high:+.{places}f}]" if low is not None and high is not None else ""
    )
    if figure is None:
        return MISSING
    return NOT_FINITE if figure.value is None else f"{figure.value:+.{places}f}{interval}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
