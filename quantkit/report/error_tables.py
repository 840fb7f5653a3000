"""Tables of modules, blocks, routers, experts, coverage and fallbacks. Pure."""

from __future__ import annotations

from math import inf
from statistics import median

from quantkit.artifact.fidelity_schema import Fidelity, ModuleResult
from quantkit.artifact.layout import FIDELITY
from quantkit.figure_readers import LOW_COVERAGE, NOT_FINITE, list_seen_kinds
from quantkit.report import format_numbers
from quantkit.report.definitions import NORM_RATIOS, define_columns
from quantkit.report.table import Table

WORST = 10
EXAMPLES = 3
MORE = FIDELITY


def make_module_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the quantized matrices with the largest relative output error.

    Matrices without output error come after them, by their weight error.
    """
    quantized = [row for row in fidelity.modules if row.method is not None]
    worst = sorted(quantized, key=_rank_module, reverse=True)[:limit]
    rows = tuple(
        (
            row.name,
            f"{row.method}+{row.rounding}"
            if row.rounding not in (None, row.method)
            else str(row.method),
            format_numbers.format_percent(row.relative_error),
            format_numbers.MISSING if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            format_numbers.format_percent(row.output_relative_error),
            format_numbers.format_count(row.tokens),
            row.fallback or ("rescaled" if row.rescaled else ""),
        )
        for row in worst
    )
    columns = ("module", "method", ">weights", ">SQNR dB", ">outputs", ">tokens", "note")
    note = _describe_cut(len(rows), len(quantized), f"worst of {len(quantized):,}; all in {MORE}. ")
    return Table(
        title="Relative error of weights and outputs, worst modules",
        columns=columns,
        rows=rows,
        note=note + NORM_RATIOS if rows else "",
        meanings=define_columns(columns),
    )


def make_block_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the relative error of the hidden states after a block, largest first."""
    worst = sorted(fidelity.blocks, key=lambda row: _rank(row.relative_error, inf), reverse=True)[
        :limit
    ]
    rows = tuple((row.block, _format_share(row.relative_error)) for row in worst)
    total = len(fidelity.blocks)
    note = _describe_cut(len(rows), total, f"worst of {total} blocks.")
    return Table(
        title="Relative error of the hidden states after a block",
        columns=("block", ">error"),
        rows=rows,
        note=note,
        meanings=define_columns(("error",)),
    )


def make_router_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the share of expert choices that agree with the source's, lowest first."""
    lowest = sorted(fidelity.routers, key=lambda row: _rank(row.agreement, missing=-1.0))[:limit]
    rows = tuple((row.block, _format_share(row.agreement)) for row in lowest)
    total = len(fidelity.routers)
    note = _describe_cut(len(rows), total, f"lowest of {total} layers.")
    columns = ("block", ">same experts")
    return Table(
        title="Router agreement",
        columns=columns,
        rows=rows,
        note=note,
        meanings=define_columns(columns),
    )


def make_expert_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the calibration tokens per expert by layer, the layer with the lowest minimum
    first."""
    coverage = fidelity.experts
    columns = ("block", ">experts", ">min tokens", ">median", ">max", ">under-calibrated")
    if coverage is None or not coverage.layers:
        return Table(title="Calibration tokens per expert", columns=columns, rows=())
    layers = sorted(
        (row for row in coverage.layers if row.tokens), key=lambda row: min(row.tokens)
    )[:limit]
    rows = tuple(
        (
            row.block,
            str(len(row.tokens)),
            format_numbers.format_count(min(row.tokens)),
            format_numbers.format_count(round(median(row.tokens))),
            format_numbers.format_count(max(row.tokens)),
            str(sum(tokens < coverage.min_tokens for tokens in row.tokens)),
        )
        for row in layers
    )
    low = coverage.list_uncalibrated()
    examples = ", ".join(
        f"{block} expert {expert} ({tokens:,})" for block, expert, tokens in low[:limit]
    )
    note = (
        f"{len(low)} of {sum(len(row.tokens) for row in coverage.layers):,} experts "
        f"saw fewer than {coverage.min_tokens} "
    )
    note += (
        f"tokens and got {coverage.policy}: {examples}{_format_rest(len(low), limit)}."
        if low
        else "tokens."
    )
    return Table(
        title="Calibration tokens per expert",
        columns=columns,
        rows=rows,
        note=note,
        meanings=define_columns(columns),
    )


def make_coverage_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the kinds of text that calibration does not cover, each at its worst input."""
    seen = list_seen_kinds(fidelity) or frozenset()
    low = [
        (share, kind, place)
        for kind, (share, place) in fidelity.find_worst_inputs().items()
        if share is not None and share > 1 - LOW_COVERAGE
    ]
    low.sort(key=lambda row: -row[0])
    rows = tuple(
        (
            f"{kind} ({format_numbers.format_exposure(kind, seen)})",
            place.input,
            format_numbers.format_percent(share, 1),
            format_numbers.format_digits(place.effective_rank),
            format_numbers.format_count(place.channels),
        )
        for share, kind, place in low[:limit]
    )
    note = ""
    if low:
        share, kind, place = low[0]
        percent = format_numbers.format_percent(share, 0)
        note = f"The text {kind} has {percent} of its energy at {place.input} outside of what "
        note += "calibration covers. Add text of this kind to the calibration set."
    columns = ("text", "at the input of", ">outside", ">rank", ">channels")
    title = "Text that calibration does not cover"
    return Table(
        title=title, columns=columns, rows=rows, note=note, meanings=define_columns(columns)
    )


def make_fallback_table(fidelity: Fidelity) -> Table:
    """Return every fallback in use with its number of modules."""
    rows = tuple(
        (
            row.kind,
            format_numbers.format_count(len(row.modules)),
            row.meaning,
            ", ".join(row.modules[:EXAMPLES]) + _format_rest(len(row.modules), EXAMPLES),
        )
        for row in fidelity.fallbacks
    )
    return Table(title="Fallbacks", columns=("kind", ">modules", "meaning", "examples"), rows=rows)


def _rank_module(row: ModuleResult) -> tuple[bool, float]:
    error = (
        row.output_relative_error if row.output_relative_error is not None else row.relative_error
    )
    return row.output_relative_error is not None, _rank(error, missing=-1.0)


def _rank(value: float | None, missing: float) -> float:
    return missing if value is None else value


def _format_share(share: float | None) -> str:
    """Return a share that was measured; None is one that is not finite."""
    return NOT_FINITE if share is None else format_numbers.format_percent(share)


def _describe_cut(shown: int, total: int, rest: str) -> str:
    """Return "The 10 worst of 61 blocks." for a table that does not show all rows."""
    return f"The {shown} {rest}" if shown < total else ""


def _format_rest(total: int, shown: int) -> str:
    return f" and {total - shown:,} more" if total > shown else ""
