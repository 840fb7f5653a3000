"""Numbers as people read them. "-" is a figure that was not measured."""

from __future__ import annotations

from collections.abc import Callable

from quantkit.artifact.fidelity_schema import Figure

MISSING = "-"
NOT_FINITE = "not finite"


def format_count(n: int | None) -> str:
    """12345 -> "12,345"."""
    return MISSING if n is None else f"{n:,}"


def format_size(n_bytes: int) -> str:
    """Decimal units, as disks and the model hub count: 5_000_000_000 -> "5.00 GB"."""
    for scale, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes} B"


def format_parameters(n: int) -> str:
    """671_026_404_352 -> "671.03 B" (billions), 7_300_000 -> "7.30 M"."""
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return str(n)


def format_digits(value: float | None, significant: int = 3) -> str:
    """Significant digits, without an exponent down to 0.00001; whole numbers as they are."""
    if value is None:
        return MISSING
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    if abs(value) < 1e-5 or abs(value) >= 1e6:
        return f"{value:.{significant - 1}e}"
    places = max(0, significant - 1 - _exponent(value))
    return f"{value:.{places}f}"


def format_percent(share: float | None, places: int = 2) -> str:
    """0.9953 -> "99.53 %"."""
    return MISSING if share is None else f"{100 * share:.{places}f} %"


def format_probability(p: float | None) -> str:
    """0.1174 -> "0.117", 0.0001 -> "<0.001"."""
    return MISSING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def format_kl(figure: Figure | None) -> str:
    """Nats per token, with the standard error where it is known: "0.000361 ±0.000021"."""
    return _figure(figure, format_digits, lambda error: format_digits(error, 2))


def format_ratio(figure: Figure | None) -> str:
    """ "1.0003 ±0.0001"."""
    return _figure(figure, "{:.4f}".format, "{:.4f}".format)


def format_share(figure: Figure | None) -> str:
    """ "99.53 % ±0.04"."""
    return _figure(figure, format_percent, lambda error: f"{100 * error:.2f}")


def format_signed_share(figure: Figure | None) -> str:
    """ "-0.031 % ±0.002"."""
    return _figure(
        figure, lambda value: f"{100 * value:+.3f} %", lambda error: f"{100 * error:.3f}"
    )


def format_points(figure: Figure | None) -> str:
    """Percentage points with the 95 % interval: "-0.91 [-1.97, +0.08]"."""
    return _change(figure, 2)


def format_recovery(figure: Figure | None) -> str:
    """A share with its 95 % interval: "98.79 % [96.2, 101.6]"."""
    low, high = (figure.ci if figure else None) or (None, None)
    interval = (
        f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
    )
    return format_share(figure) + interval


def format_nats(figure: Figure | None) -> str:
    """A difference in nats per token, to two digits of its 95 % interval: "-0.0121 [-0.0203, -0.0041]"."""
    low, high = (figure.ci if figure else None) or (None, None)
    width = high - low if low is not None and high is not None else 0.0
    return _change(figure, min(9, max(2, 1 - _exponent(width / 2))) if width > 0 else 4)


def _change(figure: Figure | None, places: int) -> str:
    low, high = (figure.ci if figure else None) or (None, None)
    interval = (
        f" [{low:+.{places}f}, {high:+.{places}f}]" if low is not None and high is not None else ""
    )
    return _figure(figure, lambda value: f"{value:+.{places}f}{interval}", lambda error: "")


def _figure(
    figure: Figure | None, value: Callable[[float], str], error: Callable[[float], str]
) -> str:
    if figure is None:
        return MISSING
    if figure.value is None:
        return NOT_FINITE
    told = error(figure.se) if figure.se is not None else ""
    return f"{value(figure.value)} ±{told}" if told else value(figure.value)


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
