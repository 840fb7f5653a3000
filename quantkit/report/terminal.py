"""Reports and plans for a terminal, as rich renderables that fit its width.

Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.table import Table as RichTable
from rich.text import Text

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.plan.plan_schema import PlanSummary
from quantkit.report import card, format_numbers, notes, tables
from quantkit.report.table import Table
from quantkit.texts.exposure import format_labels

_STYLES = {"accepted": "green", "rejected": "bold red", "not judged": "yellow"}
SHARDS = 4  # output files that a plan shows
NARROWEST = 12  # minimum characters of a text column


def render_table(table: Table) -> Group:
    """Return title, rows and note of a table; words and numbers are folded only on narrow lines."""
    note = [Text(strip_control_characters(table.note), style="dim")] if table.note else []
    return Group(
        Text(table.title, style="bold"),
        FittedTable(_each_cell(table, strip_control_characters)),
        *note,
        Text(),
    )


@dataclass(frozen=True)
class FittedTable:
    """The rows of a table, in columns that depend on the width of the terminal."""

    table: Table

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """Yield the table for rich."""
        layout, widths = fit_table(self.table, options.max_width)
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name, width in zip(layout.columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
            shown.add_column(
                Text(name.removeprefix(">")), justify=justify, overflow="fold", width=width
            )
        for row in layout.rows:
            shown.add_row(*map(Text, row))
        yield shown


def fit_table(table: Table, line: int) -> tuple[Table, list[int | None]]:
    """Return the first layout of a table whose numbers fit into a line, with its column widths."""
    for layout in iterate_layouts(table):
        widths = compute_widths(layout, line)
        if None not in widths:
            break
    return layout, widths


def iterate_layouts(table: Table) -> Iterator[Table]:
    """Yield narrower and narrower layouts of a table.

    First unchanged; then with intervals below their numbers; then with headings of numbers, then
    numbers, one word per line, in one more column each time, the column that saves most first.
    """
    yield table
    table = _each_cell(table, lambda cell: cell.replace(" [", "\n["))
    yield table
    numbers_at = [index for index, name in enumerate(table.columns) if name.startswith(">")]
    for names in (True, False):
        gains = {
            index: _width(table, index) - _width(_stacked(table, index, names), index)
            for index in numbers_at
        }
        for index in sorted(
            filter(gains.__getitem__, numbers_at), key=gains.__getitem__, reverse=True
        ):
            table = _stacked(table, index, names)
            yield table


def _stacked(table: Table, index: int, names: bool) -> Table:
    """Return the table with one word per line in the heading of a column, or in its cells."""

    def stack(cells: tuple[str, ...]) -> tuple[str, ...]:
        return (*cells[:index], cells[index].replace(" ", "\n"), *cells[index + 1 :])

    return (
        replace(table, columns=stack(table.columns))
        if names
        else replace(table, rows=tuple(map(stack, table.rows)))
    )


def _width(table: Table, index: int) -> int:
    """Return the characters of the longest line in a column."""
    cells = (table.columns[index].removeprefix(">"), *(row[index] for row in table.rows))
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _each_cell(table: Table, change: Callable[[str], str]) -> Table:
    rows = tuple(tuple(map(change, row)) for row in table.rows)
    return replace(table, columns=tuple(map(change, table.columns)), rows=rows)


def strip_control_characters(text: str) -> str:
    """Return one line without control characters, so that untrusted names cannot control a
    terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def compute_widths(table: Table, line: int) -> list[int | None]:
    """Return characters per column: the cells' width if it fits, at least a number or a word.

    [None, ...] lets rich decide if even that does not fit into a line.
    """
    names = [name.removeprefix(">") for name in table.columns]
    cells = [[name, *(row[index] for row in table.rows)] for index, name in enumerate(names)]
    natural = [_width(table, index) for index in range(len(names))]
    least = [
        full
        if name.startswith(">")
        else max(len(word) for cell in column for word in (cell.split() or [""]))
        for name, column, full in zip(table.columns, cells, natural)
    ]
    spare = line - sum(least) - 2 * len(least) + 1  # a space and a divider between columns
    texts = [index for index, name in enumerate(table.columns) if not name.startswith(">")]
    while spare < 0:  # a pattern or path without spaces: the widest column breaks inside words
        widest = max(texts, key=lambda index: least[index], default=None)
        if widest is None or least[widest] <= NARROWEST:
            return [None] * len(least)
        least[widest] -= 1
        spare += 1
    widths = list(least)
    while spare > 0 and widths != natural:
        narrowest = min(
            (i for i in range(len(widths)) if widths[i] < natural[i]), key=lambda i: widths[i]
        )
        widths[narrowest] += 1
        spare -= 1
    return list(widths)


def render_report(fidelity: Fidelity) -> Group:
    """Return a report: sizes, tables, verdict."""
    artifact = fidelity.artifact
    head = Text(
        strip_control_characters(f"{artifact.name}: {artifact.scheme}, format {artifact.format}"),
        style="bold",
    )
    size = format_numbers.format_size_change(artifact.bytes_source, artifact.bytes_artifact)
    head.append(
        f"\n{size}; {artifact.bits_overall:.2f} bits per weight overall "
        f"({artifact.bits_per_weight:.2f} of the quantized ones)",
        style="not bold",
    )
    verdict = Text(card.format_verdict(fidelity), style=_STYLES[fidelity.status])
    sentences = [
        Text(strip_control_characters(note), style="yellow") for note in notes.list_notes(fidelity)
    ]
    return Group(
        head,
        Text(),
        *(render_table(table) for table in tables.make_tables(fidelity)),
        *sentences,
        verdict,
    )


def render_plan(plan: PlanSummary) -> Group:
    """Return a plan: source, rules, totals, memory, shards, warnings."""
    source, memory = plan.source, plan.memory
    head = Text(strip_control_characters(f"{source.model} -> {plan.output}"), style="bold")
    revision = f" at {source.revision}" if source.revision else ""
    weights, bare = (
        format_numbers.format_parameters(source.parameters),
        source.parameters_without_mtp,
    )
    mtp = (
        f" ({format_numbers.format_parameters(bare)} without the MTP layer)"
        if bare is not None
        else ""
    )
    facts = f"{source.architecture}{revision}, {weights} parameters{mtp}, {source.dtype}, "
    facts += f"{format_numbers.format_size(source.bytes)}; read from {source.read_from}"
    if source.compared_with not in ("", source.dtype):
        facts += f"; compared with the {source.compared_with}"
    head.append("\n" + strip_control_characters(facts), style="not bold")
    totals = plan.totals
    size = format_numbers.format_size_change(totals.bytes_before, totals.bytes_after)
    head.append(f"\n{size}; {totals.bits_per_weight:.2f} bits per weight overall", style="not bold")
    if source.code:
        code = f"code carried over, not run: {', '.join(source.code)}"
        head.append("\n" + strip_control_characters(code), style="not bold")
    if plan.copied:
        parts = format_numbers.format_parts(plan.copied)
        how = format_numbers.describe_copy(plan.copied)
        copied = f"{how}: {parts}; {format_numbers.TEXT_ONLY}"
        head.append("\n" + strip_control_characters(copied), style="not bold")
    for text in (*plan.sampled, *plan.costs):
        head.append("\n" + strip_control_characters(text), style="not bold")
    fits = memory.peak <= memory.budget
    waves = f", {memory.experts_per_wave} experts per wave" if memory.experts_per_wave else ""
    parts = ", ".join(
        f"{name} {format_numbers.format_size(n_bytes)}" for name, n_bytes in memory.parts.items()
    )
    lines = Text(
        f"memory: {format_numbers.format_size(memory.peak)} of "
        f"{format_numbers.format_size(memory.budget)}{waves}{f' ({parts})' if parts else ''}; "
        f"scratch disk {format_numbers.format_size(memory.scratch_disk)}",
        style="" if fits else "bold red",
    )
    warnings = [
        Text(strip_control_characters(f"warning: {warning}"), style="yellow")
        for warning in plan.warnings
    ]
    return Group(
        head,
        Text(),
        render_table(make_rules_table(plan)),
        render_table(make_shards_table(plan)),
        *((render_table(make_texts_table(plan)),) if plan.texts else ()),
        lines,
        *warnings,
    )


def render_plans(plans: Sequence[PlanSummary]) -> Group:
    """Return the plans of a recipe with several formats: the first in full, the others'
    differences."""
    first, lines = plans[0], list[Text]()
    for plan in plans[1:]:
        summary = (
            f"and {plan.output}: {format_numbers.format_size(plan.totals.bytes_after)} in "
            f"{len(plan.shards)} files"
        )
        lines.append(Text(strip_control_characters(summary), style="bold"))
        new = [warning for warning in plan.warnings if warning not in first.warnings]
        lines += [
            Text(strip_control_characters(f"warning: {warning}"), style="yellow") for warning in new
        ]
    return Group(render_plan(first), *lines)


def render_reports(reports: Sequence[Fidelity]) -> Group:
    """Return the reports of a recipe with several formats; equal figures are shown once."""
    shown: list[Fidelity] = []
    for report in reports:
        if not any(report.modules == other.modules for other in shown):
            shown.append(report)
    return Group(*map(render_report, shown))


def make_rules_table(plan: PlanSummary) -> Table:
    """Return the result of each rule, with the totals last."""
    rows = [
        (
            rule.label,
            rule.match,
            rule.action,
            format_numbers.format_count(rule.modules),
            format_numbers.format_parameters(rule.parameters),
            format_numbers.format_size(rule.bytes_before),
            format_numbers.format_size(rule.bytes_after),
            f"{rule.bits_per_weight:.2f}",
        )
        for rule in plan.rules
    ]
    totals = plan.totals
    rows.append((
        "total",
        "",
        f"{totals.modules_quantized:,} quantized, {totals.modules_kept:,} kept",
        format_numbers.format_count(totals.modules_quantized + totals.modules_kept),
        format_numbers.format_parameters(totals.parameters),
        format_numbers.format_size(totals.bytes_before),
        format_numbers.format_size(totals.bytes_after),
        f"{totals.bits_per_weight:.2f}",
    ))
    columns = (
        "rule",
        "matches",
        "action",
        ">modules",
        ">parameters",
        ">before",
        ">after",
        ">bits/weight",
    )
    return Table(title="Rules", columns=columns, rows=tuple(rows))


def make_texts_table(plan: PlanSummary) -> Table:
    """Return the parts of the calibration and fidelity text."""
    rows = tuple(
        (
            row.use,
            f"{row.set}: {row.part}" if row.part else row.set,
            format_labels(row.kinds),
            f"{row.share:.1%}",
            "all" if row.tokens is None else format_numbers.format_count(row.tokens),
            row.license,
            row.version,
        )
        for row in plan.texts
    )
    columns = ("use", "text", "kind", ">share", ">tokens", "license", "sha256 or revision")
    return Table(title="Texts", columns=columns, rows=rows)


def make_shards_table(plan: PlanSummary) -> Table:
    """Return the first output files and the last."""
    shards = plan.shards
    shown = shards if len(shards) <= SHARDS else (*shards[: SHARDS - 1], shards[-1])
    rows = tuple(
        (
            shard.file,
            format_numbers.format_count(shard.tensors),
            format_numbers.format_size(shard.bytes),
        )
        for shard in shown
    )
    note = (
        f"{len(shards)} files, {plan.totals.tensors:,} tensors." if len(shards) > len(shown) else ""
    )
    return Table(title="Output", columns=("file", ">tensors", ">size"), rows=rows, note=note)
