"""The tables of a comparison as text, shared by the terminal, Markdown and the page. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from quantkit.artifact.fidelity_schema import Figure
from quantkit.diff.diff_schema import (
    Change,
    Diff,
    DistributionDiff,
    ErrorShift,
    Quantity,
    TensorGroup,
)
from quantkit.diff.paired_figures import ALL_TASKS
from quantkit.figure_readers import ALL_TEXT, NOT_FINITE
from quantkit.figures import FigureDefinition, list_figures
from quantkit.report import format_numbers
from quantkit.report.definitions import HEADINGS, HIDDEN_STATES, define_columns
from quantkit.report.table import Table

MORE = "all in --json"
SCORES = {"A": "Score of A.", "B": "Score of B, on the same items."}
SHIFTS = {
    **{name: HEADINGS[name] for name in ("weights", "outputs", "same experts")},
    "hidden states": HIDDEN_STATES,
}
"""What a shift is measured by -> its definition."""


def format_headline(diff: Diff) -> str:
    """Return the result in one sentence: size, mean KL, benchmarks, flipped items."""
    parts = [_describe_size(diff.sizes)]
    kl = next(
        (row for row in diff.distribution if row.domain == "all" and row.figure == "kl_mean"), None
    )
    if kl and kl.a is not None and kl.b is not None:
        change = f" ({100 * (kl.b / kl.a - 1):+.0f} %)" if kl.a else ""
        resolution = {
            "better": ", significantly lower",
            "worse": ", significantly higher",
            "not resolved": ", not resolved",
        }
        parts.append(
            f"mean KL {format_numbers.format_digits(kl.a)} -> "
            f"{format_numbers.format_digits(kl.b)}{change}{resolution.get(kl.resolved, '')}"
        )
    paired = [row for row in diff.benchmarks if row.delta_pp and row.task != ALL_TASKS]
    if paired:
        words = {
            word: [row.task for row in paired if row.verdict == word]
            for word in ("worse", "better")
        }
        sides = [f"{word} on {', '.join(tasks)}" for word, tasks in words.items() if tasks]
        parts.append(
            "B is " + " and ".join(sides)
            if sides
            else f"no resolved difference on {_format_quantity(len(paired), 'benchmark')}"
        )
        lost = sum(flip.lost for flip in diff.flips)
        parts.append(f"{_format_quantity(lost, 'item')} lost, {len(diff.flips) - lost:,} gained")
    return "; ".join(part for part in parts if part) + "."


def _format_quantity(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _describe_size(rows: Sequence[Quantity]) -> str:
    row = next((row for row in rows if row.name == "weights"), None)
    if row is None or row.a is None or row.b is None:
        return ""
    if row.a == row.b:
        return f"Both have {format_numbers.format_size(round(row.a))} of weights"
    return (
        f"Weights {format_numbers.format_size(round(row.a))} -> "
        f"{format_numbers.format_size(round(row.b))} ({_format_relative(row.a, row.b)})"
    )


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


def make_distribution_table(diff: Diff, domain: str | None = None) -> Table:
    """Return all figures over all text and the paired figures of every domain.

    With `domain`: the paired figures of that domain.
    """
    figures = {row.key: row for row in list_figures()}
    shown = [
        row
        for row in diff.distribution
        if domain in (None, row.domain)
        and (figures[row.figure].pairing or (domain is None and row.domain == ALL_TEXT))
    ]
    rows = tuple(
        (
            figures[row.figure].diff_label,
            row.domain,
            format_numbers.format_value(figures[row.figure], row.a),
            format_numbers.format_value(figures[row.figure], row.b),
            _format_difference(figures[row.figure], row),
            row.resolved,
        )
        for row in shown
    )
    note = ""
    if any(row.difference for row in shown):
        n = max(row.tokens for row in shown)
        n_intervals = sum(row.resolved != "" for row in shown)
        note = (
            f"Differences are over the same {n:,} tokens, assumed independent; for "
            f"perplexity, B / A. "
        )
        note += (
            f"{n_intervals} intervals at 95 %: about one in twenty misses the true value by chance."
            if n_intervals > 1
            else ""
        )
    elif rows:
        note = "The tokens of both sides are not available, so the differences have no interval."
    columns = ("figure", "text", ">A", ">B", ">B - A [95 % CI]", "B is")
    return Table(
        title="Next-token distributions",
        columns=columns,
        rows=rows,
        note=note,
        meanings=tuple(
            {
                row.diff_label: row.meaning
                for row in figures.values()
                if any(row.key == each.figure for each in shown)
            }.items()
        ),
    )


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


def _format_difference(figure: FigureDefinition, row: DistributionDiff) -> str:
    """Return "+0.000378 [+0.000279, +0.000478]"; without an interval if the tokens are not
    paired."""
    is_ratio = figure.pairing is not None and figure.pairing.statistic == "ratio"
    show = "x{:.4f}".format if is_ratio else format_numbers.STYLES[figure.style].difference
    difference: Figure | None = row.difference
    if difference is None or difference.value is None:
        if row.a is None or row.b is None or is_ratio:
            return format_numbers.MISSING
        return show(row.b - row.a)
    low, high = difference.ci or (None, None)
    if low is None or high is None:
        return show(difference.value)
    return f"{show(difference.value)} [{show(low)}, {show(high)}]"


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
