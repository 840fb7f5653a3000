"""Conversion of fidelity.json of earlier versions to the present one, before validation. Pure.

Version 1 measured the outputs of a module by an energy ratio, ||W X - Q X||^2 / ||W X||^2, next to
norm ratios of weights and hidden states. Version 2 has norm ratios alone, and 95 % intervals where
version 1 had standard errors. Values that cannot be converted stay as they are: the schema says
what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from quantkit.figure_readers import ALL_TEXT, make_normal_interval
from quantkit.figures import ENERGY_GATE, NORM_GATE, convert_energy

QUANTILES = ("kl_median", "kl_p99", "kl_p999")
Row = Mapping[str, Any]
"""An object of JSON, whose values are not checked yet."""


def convert_report(values: Row) -> Row:
    """Return the values of a report as of the present version; those of another one unchanged."""
    if values.get("version") != 1:
        return values
    distribution = _convert_rows(values.get("distribution"), _convert_distribution)
    intervals = _list_intervals(distribution, values.get("benchmarks"))
    return {
        **values,
        "version": 2,
        "converted_from": 1,
        "distribution": distribution,
        "modules": _convert_rows(values.get("modules"), _convert_module),
        "gates": _convert_rows(
            values.get("gates"), lambda row: _add_interval(_convert_gate(row), intervals)
        ),
    }


def _convert_rows(rows: object, convert: Callable[[Row], Row]) -> object:
    if not isinstance(rows, list | tuple):
        return () if rows is None else rows
    return [convert(row) if isinstance(row, Mapping) else row for row in rows]


def _convert_distribution(row: Row) -> Row:
    """Return the figures of a domain with 95 % intervals in place of errors alone.

    Tokens counted as independent. The errors of quantiles are dropped: half the distance of two
    ranks is 0 where they have the same value.
    """
    return {
        key: {**figure, "se": None if key in QUANTILES else figure["se"], "ci": _widen(key, figure)}
        if isinstance(figure, Mapping) and isinstance(figure.get("se"), int | float)
        else figure
        for key, figure in row.items()
    }


def _widen(key: str, figure: Row) -> tuple[float, float] | None:
    """Return the interval of a figure by its standard error, None without one."""
    value, error = figure.get("value"), figure["se"]
    if key in QUANTILES or not isinstance(value, int | float):
        return None
    try:
        return make_normal_interval(value, error)
    except OverflowError:  # an integer of JSON that is too large for a float
        return None


def _convert_module(row: Row) -> Row:
    key = "output_relative_error"
    return {**row, key: convert_energy(row[key])} if key in row else row


def _list_intervals(distribution: object, benchmarks: object) -> dict[str, tuple[Any, Any]]:
    """Return gate -> interval and number of tokens or items, as far as the report has them."""
    intervals = dict[str, tuple[Any, Any]]()
    for row in distribution if isinstance(distribution, list) else ():
        for key, figure in row.items() if isinstance(row, Mapping) else ():
            if isinstance(figure, Mapping) and figure.get("ci"):
                name = key if row.get("domain") == ALL_TEXT else f"{key}@{row.get('domain')}"
                intervals[name] = (figure["ci"], row.get("tokens"))
    for row in benchmarks if isinstance(benchmarks, list) else ():
        recovery = row.get("recovery") if isinstance(row, Mapping) else None
        if isinstance(recovery, Mapping) and recovery.get("ci"):
            intervals[f"{row.get('task')}.recovery"] = (recovery["ci"], row.get("n"))
    return intervals


def _split_bound(row: Row) -> tuple[str, str]:
    """Return sign and number of a gate's bound, "<= 0.05"; "" for a bound that is no text."""
    bound = row.get("bound")
    sign, _, number = bound.partition(" ") if isinstance(bound, str) else ("", "", "")
    return sign, number


def _add_interval(row: Row, intervals: Mapping[str, tuple[Any, Any]]) -> Row:
    """Return a gate with its interval, and not proven if the interval crosses its bound."""
    sign, number = _split_bound(row)
    ci, n = intervals.get(str(row.get("figure")), (None, None))
    try:
        ends, limit = [float(end) for end in ci or ()], float(number)
    except (TypeError, ValueError, OverflowError):  # an unknown end, a bound that is no number
        return row
    if len(ends) != 2 or row.get("ok") is not True:
        return row
    is_proven = ends[1] <= limit if sign == "<=" else ends[0] >= limit
    return {**row, "ci": ends, "n": n, "outcome": "kept" if is_proven else "kept, not proven"}


def _convert_gate(row: Row) -> Row:
    """Return a gate on outputs with bound and value as norm ratios; other gates unchanged."""
    if row.get("figure") != ENERGY_GATE:
        return row
    (sign, number), bound = _split_bound(row), row.get("bound")
    with suppress(ValueError):  # no number, which the schema reports
        bound = f"{sign} {convert_energy(float(number)):g}"
    return {**row, "figure": NORM_GATE, "bound": bound, "value": convert_energy(row.get("value"))}
