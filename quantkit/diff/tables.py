"""The tables of a comparison as text, shared by the terminal, Markdown and the page. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from quantkit.diff.diff_schema import (
    Change,
    Diff,
    ErrorShift,
    TensorGroup,
)
from quantkit.diff.token_tables import (
    make_distribution_table,
    make_kind_table,
    make_worse_token_table,
)
from quantkit.figure_readers import NOT_FINITE
from quantkit.report import format_numbers
from quantkit.report.definitions import HEADINGS, HIDDEN_STATES, define_columns
from quantkit.report.table import Table
from quantkit.report.token_tables import SHOWN

MORE = "all in --json"
SCORES = {"A": "Score of A.", "B": "Score of B, on the same items."}
SHIFTS = {
    **{name: HEADINGS[name] for name in ("weights", "outputs", "same experts")},
    "hidden states": HIDDEN_STATES,
}
"""Measured value of an `ErrorShift` (`by`) -> its definition."""


# ------------------------------------------------------------------------------------------- tables


def make_size_table(diff: Diff) -> Table:
    """Return bytes, bits and counts."""
    show: dict[str, Callable[[float], str]] = {
        "B": lambda value: format_numbers.format_size(round(value)),
        "bits": "{:.2f}".format,
        "": lambda value: format_numbers.format_count(round(value)),
    }
    rows = tuple(
        (
            row.name,
            format_numbers.MISSING if row.a is None else show[row.unit](row.a),
            format_numbers.MISSING if row.b is None else show[row.unit](row.b),
            format_numbers.MISSING
            if row.a is None or row.b is None
            else _format_relative(row.a, row.b),
        )
        for row in diff.sizes
    )
    return Table(title="Size", columns=("quantity", ">A", ">B", ">change"), rows=rows)


def make_benchmark_table(diff: Diff) -> Table:
    """Return the scores by task, paired item by item."""
    several = {
        row.task for row in diff.benchmarks if row.filter and _count_filters(diff, row.task) > 1
    }
    rows = tuple(
        (
            f"{row.task} ({row.filter})" if row.task in several else row.task,
            format_numbers.format_count(row.n or None),
            format_numbers.format_percent(row.source, 1),
            format_numbers.format_percent(row.a, 1),
            format_numbers.format_percent(row.b, 1),
            format_numbers.format_points(row.delta_pp),
            format_numbers.MISSING if row.lost is None else f"{row.lost}/{row.gained}",
            format_numbers.format_probability(row.mcnemar_p),
            row.verdict,
        )
        for row in diff.benchmarks
    )
    columns = (
        "task",
        ">n",
        ">source",
        ">A",
        ">B",
        ">Δ pp [95 % CI]",
        ">lost/gained",
        ">p",
        "verdict",
    )
    note = (
        "B against A on the same items; p is McNemar's exact test on the flipped items."
        if rows
        else ""
    )
    return Table(
        title="Benchmarks",
        columns=columns,
        rows=rows,
        note=note,
        meanings=define_columns(columns, SCORES),
    )


def _count_filters(diff: Diff, task: str) -> int:
    return len({row.filter for row in diff.benchmarks if row.task == task})


def make_likelihood_table(diff: Diff) -> Table:
    """Return the log-likelihood of gold solutions by task."""
    rows = tuple(
        (
            row.task,
            format_numbers.format_count(row.n),
            format_numbers.format_digits(row.source, 4),
            format_numbers.format_digits(row.a, 4),
            format_numbers.format_digits(row.b, 4),
            format_numbers.format_nats(row.difference),
            row.resolved,
        )
        for row in diff.likelihood
    )
    columns = ("task", ">n", ">source", ">A", ">B", ">B - A [95 % CI]", "B is")
    note = (
        "Log-likelihood of a correct answer after its prompt, nats per token; nothing is generated."
        if rows
        else ""
    )
    return Table(title="Gold solutions (teacher-forced)", columns=columns, rows=rows, note=note)


def make_recipe_table(diff: Diff) -> Table:
    """Return the differing keys of the resolved recipes."""
    return _make_change_table("Recipe", "key", diff.recipe)


def make_plan_table(diff: Diff) -> Table:
    """Return the differing keys of the plans."""
    return _make_change_table("Plan", "key", diff.plan)


def make_version_table(diff: Diff) -> Table:
    """Return the differing versions and machines."""
    return _make_change_table("Environment", "item", diff.made_with)


def make_gate_table(diff: Diff) -> Table:
    """Return every bound of either recipe."""
    return _make_change_table("Gates", "bound", diff.gates)


def make_fallback_table(diff: Diff) -> Table:
    """Return the number of modules per fallback, if it differs."""
    return _make_change_table("Fallbacks", "kind", diff.fallbacks)


def make_decision_table(diff: Diff) -> Table:
    """Return the matrices with different decisions."""
    return _make_group_table(
        "Matrices in different schemes", ">matrices", diff.decisions, 12, with_change=False
    )


def make_tensor_table(diff: Diff, names: int = 12) -> Table:
    """Return the changes of tensors, at most `names` lines of folded names per group."""
    return _make_group_table("Tensors", ">tensors", diff.tensors, names, with_change=True)


def make_module_table(diff: Diff, limit: int) -> Table:
    """Return the largest shifts of a matrix's error, in both directions."""
    moved = [row for row in diff.modules if row.shift != 0]
    return _make_shift_table(
        "Error of modules, largest shift first", "module", moved, limit, rising="larger"
    )


def make_block_table(diff: Diff, limit: int) -> Table:
    """Return the errors of the hidden states after each block."""
    return _make_shift_table(
        "Error of the hidden states", "block", diff.blocks, limit, rising="larger"
    )


def make_router_table(diff: Diff, limit: int) -> Table:
    """Return the share of expert choices that agree with the source."""
    moved = [row for row in diff.routers if row.shift != 0]
    return _make_shift_table(
        "Router agreement with the source", "block", moved, limit, rising="higher"
    )


def make_flip_table(diff: Diff, limit: int) -> Table:
    """Return the flipped items with both results."""
    rows = tuple(
        (
            "lost" if flip.lost else "gained",
            flip.task,
            str(flip.item),
            _format_result(flip.a.outcome, flip.a.score),
            _format_result(flip.b.outcome, flip.b.score),
            _shorten(flip.target),
        )
        for flip in diff.flips[:limit]
    )
    note = (
        f"{len(diff.flips):,} of {diff.compared_items:,} items flipped; "
        f"{diff.reworded:,} more differ in wording only."
    )
    note += (
        f" The first {limit} are shown; {MORE}, with both answers."
        if len(diff.flips) > limit
        else ""
    )
    columns = ("B", "task", ">item", "A's result", "B's result", "expected")
    return Table(title="Flipped items", columns=columns, rows=rows, note=note if rows else "")


def make_loadtest_table(diff: Diff) -> Table:
    """Return the figures of both load tests by concurrency."""
    rows = tuple(
        (
            f"{row.at_once:,}",
            row.figure,
            f"{row.a:,.4g}",
            f"{row.b:,.4g}",
            f"{row.b / row.a - 1:+.1%}" if row.a else "",
        )
        for row in diff.load
    )
    columns = (">concurrency", "figure", ">A", ">B", ">B - A")
    return Table(
        title="Load test",
        columns=columns,
        rows=rows,
        note="One run each: no interval." if rows else "",
    )


# ------------------------------------------------------------------------------------------- pieces


def _make_change_table(title: str, heading: str, changes: Sequence[Change]) -> Table:
    rows = tuple(
        (row.key, row.a or format_numbers.MISSING, row.b or format_numbers.MISSING)
        for row in changes
    )
    return Table(title=title, columns=(heading, "A", "B"), rows=rows)


def _make_group_table(
    title: str, counted: str, groups: Iterable[TensorGroup], names: int, *, with_change: bool
) -> Table:
    rows = tuple(
        (
            *((row.change,) if with_change else ()),
            row.a,
            row.b,
            format_numbers.format_count(row.count),
            _join_names(row.names, names),
        )
        for row in groups
    )
    columns = (*(("change",) if with_change else ()), "A", "B", counted, "names")
    return Table(title=title, columns=columns, rows=rows)


def _make_shift_table(
    title: str, heading: str, shifts: Sequence[ErrorShift], limit: int, rising: str
) -> Table:
    rows = tuple(
        (
            row.name,
            row.by,
            format_numbers.format_percent(row.a, 3),
            format_numbers.format_percent(row.b, 3),
            _format_shift(row.shift),
        )
        for row in shifts[:limit]
    )
    up = sum(row.shift is not None and row.shift > 0 for row in shifts)
    note = f"{rising} in B: {up:,} of {len(shifts):,}." if rows else ""
    note += f" {len(shifts) - limit:,} more; {MORE}." if len(shifts) > limit else ""
    columns = (heading, "of", ">A", ">B", ">B - A [points]")
    names = dict.fromkeys(row.by for row in shifts[:limit])
    meanings = [(name, SHIFTS[name]) for name in names]
    return Table(
        title=title,
        columns=columns,
        rows=rows,
        note=note[:1].upper() + note[1:],
        meanings=(*meanings, *define_columns(columns[-1:])),
    )


def _join_names(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit:,} more patterns" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _format_shift(shift: float | None) -> str:
    return NOT_FINITE if shift is None else f"{100 * shift:+.3f}"


def _format_relative(a: float, b: float) -> str:
    if a == b:
        return "="
    return f"{100 * (b / a - 1):+.2f} %" if a else f"{b - a:+,.0f}"


def _format_result(outcome: str, score: float) -> str:
    return f"{_shorten(outcome)} ({score:g})" if outcome else f"scores {score:g}"


def _shorten(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def make_tables(diff: Diff, limit: int) -> list[Table]:
    """Return all tables with rows, in the order of a review; `limit` bounds the rows of long
    ones."""
    tables = (
        make_size_table(diff),
        make_benchmark_table(diff),
        make_distribution_table(diff),
        make_kind_table(diff),
        make_worse_token_table(diff, min(limit, SHOWN)),
        make_likelihood_table(diff),
        make_gate_table(diff),
        make_recipe_table(diff),
        make_plan_table(diff),
        make_decision_table(diff),
        make_tensor_table(diff),
        make_block_table(diff, limit),
        make_module_table(diff, limit),
        make_router_table(diff, limit),
        make_fallback_table(diff),
        make_version_table(diff),
        make_flip_table(diff, limit),
        make_loadtest_table(diff),
    )
    return [table for table in tables if table.rows]
