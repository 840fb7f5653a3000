"""A comparison as tables of text, made once for the terminal, Markdown and the page. Pure."""

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
from quantkit.figures import ALL_TEXT, NOT_FINITE, FigureDefinition, list_figures
from quantkit.report import format_numbers
from quantkit.report.tables import Table

MORE = "--json has all"


def format_headline(diff: Diff) -> str:
    """What a reviewer wants to know first, in one or two sentences."""
    told = [_size_told(diff.sizes)]
    kl = next(
        (row for row in diff.distribution if row.domain == "all" and row.figure == "kl_mean"), None
    )
    if kl and kl.a is not None and kl.b is not None:
        change = f" ({100 * (kl.b / kl.a - 1):+.0f} %)" if kl.a else ""
        sure = {
            "better": ", lower beyond doubt",
            "worse": ", higher beyond doubt",
            "not resolved": ", not resolved",
        }
        told.append(
            f"mean KL {format_numbers.format_digits(kl.a)} -> {format_numbers.format_digits(kl.b)}{change}{sure.get(kl.resolved, '')}"
        )
    paired = [row for row in diff.benchmarks if row.delta_pp and row.task != ALL_TASKS]
    if paired:
        words = {
            word: [row.task for row in paired if row.verdict == word]
            for word in ("worse", "better")
        }
        sides = [f"{word} on {', '.join(tasks)}" for word, tasks in words.items() if tasks]
        told.append(
            "B is " + " and ".join(sides)
            if sides
            else f"no resolved difference on {_counted(len(paired), 'benchmark')}"
        )
        lost = sum(flip.lost for flip in diff.flips)
        told.append(f"{_counted(lost, 'item')} lost, {len(diff.flips) - lost:,} gained")
    return "; ".join(part for part in told if part) + "."


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _size_told(rows: Sequence[Quantity]) -> str:
    row = next((row for row in rows if row.name == "weights"), None)
    if row is None or row.a is None or row.b is None:
        return ""
    if row.a == row.b:
        return f"Both have {format_numbers.format_size(round(row.a))} of weights"
    return f"Weights {format_numbers.format_size(round(row.a))} -> {format_numbers.format_size(round(row.b))} ({_relative(row.a, row.b)})"


# ------------------------------------------------------------------------------------------------------------- tables


def make_size_table(diff: Diff) -> Table:
    """Bytes, bits and counts."""
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
            format_numbers.MISSING if row.a is None or row.b is None else _relative(row.a, row.b),
        )
        for row in diff.sizes
    )
    return Table(title="Size", columns=("what", ">A", ">B", ">change"), rows=rows)


def make_benchmark_table(diff: Diff) -> Table:
    """Task by task, paired item by item."""
    several = {row.task for row in diff.benchmarks if row.filter and _filters(diff, row.task) > 1}
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
        "B against A on the same items; p is McNemar's exact test on the items that flipped."
        if rows
        else ""
    )
    return Table(title="Benchmarks", columns=columns, rows=rows, note=note)


def _filters(diff: Diff, task: str) -> int:
    return len({row.filter for row in diff.benchmarks if row.task == task})


def make_distribution_table(diff: Diff, domain: str | None = None) -> Table:
    """Figures of all text, and the paired means of every domain; or the paired means of one."""
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
        sure = sum(row.resolved != "" for row in shown)
        note = f"Differences are means over the same {n:,} tokens, each taken as independent; of the perplexity, B / A. "
        note += (
            f"Of {sure} intervals at 95 % about one in twenty misses by chance." if sure > 1 else ""
        )
    elif rows:
        note = "The tokens of both are not at hand, so the differences have no interval."
    columns = ("figure", "text", ">A", ">B", ">B - A [95 % CI]", "B is")
    return Table(title="Next-token distributions", columns=columns, rows=rows, note=note)


def make_likelihood_table(diff: Diff) -> Table:
    """Right answers behind their prompts, task by task."""
    rows = tuple(
        (
            row.task, format_numbers.format_count(row.n), format_numbers.format_digits(row.source, 4), format_numbers.format_digits(row.a, 4),
            format_numbers.format_digits(row.b, 4), format_numbers.format_nats(row.difference), row.resolved,
        )
        for row in diff.likelihood
    )  # fmt: skip
    columns = ("task", ">n", ">source", ">A", ">B", ">B - A [95 % CI]", "B is")
    note = (
        "Log-likelihood of a right answer behind its prompt, nats per token; nothing is generated."
        if rows
        else ""
    )
    return Table(title="Gold solutions (teacher-forced)", columns=columns, rows=rows, note=note)


def make_recipe_table(diff: Diff) -> Table:
    """Keys of the recipes, as resolved."""
    return _changes("Recipe", "key", diff.recipe)


def make_plan_table(diff: Diff) -> Table:
    """What the rules came to."""
    return _changes("Plan", "key", diff.plan)


def make_version_table(diff: Diff) -> Table:
    """Versions and machines that differ."""
    return _changes("Made with", "what", diff.made_with)


def make_gate_table(diff: Diff) -> Table:
    """Every bound of either recipe."""
    return _changes("Gates", "bound", diff.gates)


def make_fallback_table(diff: Diff) -> Table:
    """Modules that took each fallback."""
    return _changes("Fallbacks", "kind", diff.fallbacks)


def make_decision_table(diff: Diff) -> Table:
    """What the plans do otherwise."""
    return _groups("Matrices stored otherwise", ">matrices", diff.decisions, 12, with_change=False)


def make_tensor_table(diff: Diff, names: int = 12) -> Table:
    """What lies in the files; at most `names` lines of folded names per group."""
    return _groups("Tensors", ">tensors", diff.tensors, names, with_change=True)


def make_module_table(diff: Diff, limit: int) -> Table:
    """The largest shifts of a matrix's error, either way."""
    moved = [row for row in diff.modules if row.shift != 0]
    return _shifts("Error of modules, largest shift first", "module", moved, limit, rising="larger")


def make_block_table(diff: Diff, limit: int) -> Table:
    """Hidden states after each block."""
    return _shifts("Error of the hidden states", "block", diff.blocks, limit, rising="larger")


def make_router_table(diff: Diff, limit: int) -> Table:
    """Choices of experts."""
    moved = [row for row in diff.routers if row.shift != 0]
    return _shifts("Router agreement with the source", "block", moved, limit, rising="higher")


def make_flip_table(diff: Diff, limit: int) -> Table:
    """Items that one has right and the other wrong: results only."""
    rows = tuple(
        (
            "lost" if flip.lost else "gained",
            flip.task,
            str(flip.item),
            _result(flip.a.outcome, flip.a.score),
            _result(flip.b.outcome, flip.b.score),
            _brief(flip.target),
        )
        for flip in diff.flips[:limit]
    )
    note = f"{len(diff.flips):,} of {diff.compared_items:,} items flipped; {diff.reworded:,} more differ in words only."
    note += (
        f" The first {limit} are shown; {MORE}, with both answers."
        if len(diff.flips) > limit
        else ""
    )
    columns = ("B", "task", ">item", "A's result", "B's result", "expected")
    return Table(title="Items that flipped", columns=columns, rows=rows, note=note if rows else "")


def make_loadtest_table(diff: Diff) -> Table:
    """Load tests that both sides have, level by level."""
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
    columns = (">requests at once", "figure", ">A", ">B", ">B - A")
    return Table(
        title="Under load",
        columns=columns,
        rows=rows,
        note="One run each: no interval." if rows else "",
    )


# ------------------------------------------------------------------------------------------------------------- pieces


def _changes(title: str, what: str, found: Sequence[Change]) -> Table:
    rows = tuple(
        (row.key, row.a or format_numbers.MISSING, row.b or format_numbers.MISSING) for row in found
    )
    return Table(title=title, columns=(what, "A", "B"), rows=rows)


def _groups(
    title: str, counted: str, found: Iterable[TensorGroup], names: int, *, with_change: bool
) -> Table:
    rows = tuple(
        (
            *((row.change,) if with_change else ()),
            row.a,
            row.b,
            format_numbers.format_count(row.count),
            _listed(row.names, names),
        )
        for row in found
    )
    columns = (*(("change",) if with_change else ()), "A", "B", counted, "which")
    return Table(title=title, columns=columns, rows=rows)


def _shifts(title: str, what: str, found: Sequence[ErrorShift], limit: int, rising: str) -> Table:
    rows = tuple(
        (
            row.name,
            row.by,
            format_numbers.format_percent(row.a, 3),
            format_numbers.format_percent(row.b, 3),
            _points(row.shift),
        )
        for row in found[:limit]
    )
    up = sum(row.shift is not None and row.shift > 0 for row in found)
    note = f"{rising} in B: {up:,} of {len(found):,}." if rows else ""
    note += f" {len(found) - limit:,} more; {MORE}." if len(found) > limit else ""
    columns = (what, "of", ">A", ">B", ">B - A [points]")
    return Table(title=title, columns=columns, rows=rows, note=note[:1].upper() + note[1:])


def _listed(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit:,} more patterns" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _points(shift: float | None) -> str:
    return NOT_FINITE if shift is None else f"{100 * shift:+.3f}"


def _relative(a: float, b: float) -> str:
    if a == b:
        return "="
    return f"{100 * (b / a - 1):+.2f} %" if a else f"{b - a:+,.0f}"


def _format_difference(figure: FigureDefinition, row: DistributionDiff) -> str:
    """Return "+0.000378 [+0.000279, +0.000478]"; without an interval if the tokens are not paired."""
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


def _result(outcome: str, score: float) -> str:
    return f"{_brief(outcome)} ({score:g})" if outcome else f"scores {score:g}"


def _brief(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def make_tables(diff: Diff, limit: int) -> list[Table]:
    """All of them in the order of a review; empty ones left out. `limit`: rows of the long ones."""
    made = (
        make_size_table(diff), make_benchmark_table(diff), make_distribution_table(diff), make_likelihood_table(diff), make_gate_table(diff), make_recipe_table(diff), make_plan_table(diff),
        make_decision_table(diff), make_tensor_table(diff), make_block_table(diff, limit), make_module_table(diff, limit), make_router_table(diff, limit),
        make_fallback_table(diff), make_version_table(diff), make_flip_table(diff, limit), make_loadtest_table(diff),
    )  # fmt: skip
    return [table for table in made if table.rows]
