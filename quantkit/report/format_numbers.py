"""Numbers as text. "-" is a figure that was not measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from quantkit.artifact.fidelity_schema import Figure
from quantkit.figure_readers import ALL_TEXT, NOT_FINITE, Reading
from quantkit.figures import FigureDefinition, Style
from quantkit.plan.plan_schema import PlanPart

MISSING = "-"
TEXT_ONLY = "calibration and figures use text only"
"""What a plan and a report say about a model with parts that text does not run through."""


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
    """Format the sizes of source and artifact: "5.45 MB, 70 % of the source's 7.73 MB"."""
    share = f"{100 * after / before:.0f} % of " if before else ""
    return f"{format_size(after)}, {share}the source's {format_size(before)}"


def format_parts(parts: Sequence[PlanPart]) -> str:
    """Return "model.visual (390 tensors, 1.34 GB), mtp (15 tensors, 210.00 MB)"."""
    return ", ".join(
        f"{part.name} ({format_count(part.tensors)} tensors, {format_size(part.bytes)})"
        for part in parts
    )


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
    """How a figure, its standard error and a difference of two figures are written."""

    value: Callable[[float], str]
    error: Callable[[float], str]
    difference: Callable[[float], str]


STYLES: Mapping[Style, NumberFormat] = {
    "nats": NumberFormat(  # 0.000361 ±0.000021
        value=format_digits,
        error=lambda error: format_digits(error, 2),
        difference=lambda value: f"{'+' if value > 0 else ''}{format_digits(value)}",
    ),
    "ratio": NumberFormat(  # 1.0003 ±0.0001
        value="{:.4f}".format, error="{:.4f}".format, difference="{:+.4f}".format
    ),
    "percent": NumberFormat(  # 99.53 % ±0.04
        value=format_percent,
        error=lambda error: f"{100 * error:.2f}",
        difference=lambda value: f"{100 * value:+.2f}",
    ),
    "signed percent": NumberFormat(  # -0.031 % ±0.002
        value=lambda value: f"{100 * value:+.3f} %",
        error=lambda error: f"{100 * error:.3f}",
        difference=lambda value: f"{100 * value:+.3f}",
    ),
    "count": NumberFormat(
        value=lambda value: format_count(round(value)),
        error=format_digits,
        difference=lambda value: f"{round(value):+,}",
    ),
    "bits": NumberFormat(value="{:.2f}".format, error="{:.2f}".format, difference="{:+.2f}".format),
    "bytes": NumberFormat(
        value=lambda value: format_size(round(value)),
        error=lambda error: format_size(round(error)),
        difference=lambda value: f"{round(value):+,} B",
    ),
}
"""The formats of the table's styles. A difference of percentages is in percentage points."""


def format_value(definition: FigureDefinition, value: float | None) -> str:
    """Return a figure's value without its error."""
    return MISSING if value is None else STYLES[definition.style].value(value)


def format_reading(definition: FigureDefinition, reading: Reading) -> str:
    """Return a figure with its standard error: "0.000361 ±0.000021"; "-" if not measured."""
    if not reading.is_measured:
        return MISSING
    return format_figure(Figure(value=reading.value, se=reading.se), definition.style)


def format_figure(figure: Figure | None, style: Style) -> str:
    """Return a measured number with its standard error in a style of the table."""
    return _format_measured(figure, STYLES[style].value, STYLES[style].error)


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
    return format_figure(figure, "percent") + interval


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
    return _format_measured(
        figure, lambda value: f"{value:+.{places}f}{interval}", lambda error: ""
    )


def _format_measured(
    figure: Figure | None, value: Callable[[float], str], error: Callable[[float], str]
) -> str:
    if figure is None:
        return MISSING
    if figure.value is None:
        return NOT_FINITE
    spread = error(figure.se) if figure.se is not None else ""
    return f"{value(figure.value)} ±{spread}" if spread else value(figure.value)


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
