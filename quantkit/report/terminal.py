"""The same tables for a terminal, as rich renderables that fit its width. Nothing is printed here."""

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
from quantkit.report import card, format_numbers, tables
from quantkit.report.tables import Table

_STYLES = {"accepted": "green", "rejected": "bold red", "not judged": "yellow"}
SHARDS = 4  # files that a plan shows
NARROWEST = 12  # characters that a column of text keeps


def render_table(made: Table) -> Group:
    """Title, rows and note of one table. Numbers and words stay whole where a line has room, else they are folded."""
    note = [Text(strip_control_characters(made.note), style="dim")] if made.note else []
    return Group(
        Text(made.title, style="bold"),
        FittedTable(_each_cell(made, strip_control_characters)),
        *note,
        Text(),
    )


@dataclass(frozen=True)
class FittedTable:
    """The rows of a table, in columns that depend on how wide a line is."""

    made: Table

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """rich's protocol."""
        form, chosen = fit_table(self.made, options.max_width)
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name, width in zip(form.columns, chosen, strict=True):
            flush: Literal["left", "right"] = "right" if name.startswith(">") else "left"
            shown.add_column(
                Text(name.removeprefix(">")), justify=flush, overflow="fold", width=width
            )
        for row in form.rows:
            shown.add_row(*map(Text, row))
        yield shown


def fit_table(made: Table, line: int) -> tuple[Table, list[int | None]]:
    """The table in the first of its `forms` that has its numbers whole in a line, with its `widths`."""
    for form in iterate_layouts(made):
        found = compute_widths(form, line)
        if None not in found:
            break
    return form, found


def iterate_layouts(made: Table) -> Iterator[Table]:
    """Ever narrower: as it is; intervals below their numbers; then names of numbers, then numbers, one word below the
    other, in one column more each time, that which gains most first."""
    yield made
    made = _each_cell(made, lambda cell: cell.replace(" [", "\n["))
    yield made
    numbers_at = [index for index, name in enumerate(made.columns) if name.startswith(">")]
    for names in (True, False):
        gains = {
            index: _width(made, index) - _width(_stacked(made, index, names), index)
            for index in numbers_at
        }
        for index in sorted(
            filter(gains.__getitem__, numbers_at), key=gains.__getitem__, reverse=True
        ):
            made = _stacked(made, index, names)
            yield made


def _stacked(made: Table, index: int, names: bool) -> Table:
    """One word below the other in the name of a column, or in its cells."""

    def stack(cells: tuple[str, ...]) -> tuple[str, ...]:
        return (*cells[:index], cells[index].replace(" ", "\n"), *cells[index + 1 :])

    return (
        replace(made, columns=stack(made.columns))
        if names
        else replace(made, rows=tuple(map(stack, made.rows)))
    )


def _width(made: Table, index: int) -> int:
    """Characters of the longest line in a column."""
    cells = (made.columns[index].removeprefix(">"), *(row[index] for row in made.rows))
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _each_cell(made: Table, change: Callable[[str], str]) -> Table:
    rows = tuple(tuple(map(change, row)) for row in made.rows)
    return replace(made, columns=tuple(map(change, made.columns)), rows=rows)


def strip_control_characters(text: str) -> str:
    """One line without control characters: a name from a checkpoint must not steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def compute_widths(made: Table, line: int) -> list[int | None]:
    """Characters per column: as wide as the cells where a line has room, else no narrower than a number or a word.

    [None, ...], for rich to decide, where even that is too much for a line.
    """
    names = [name.removeprefix(">") for name in made.columns]
    cells = [[name, *(row[index] for row in made.rows)] for index, name in enumerate(names)]
    natural = [_width(made, index) for index in range(len(names))]
    least = [
        full
        if name.startswith(">")
        else max(len(word) for cell in column for word in (cell.split() or [""]))
        for name, column, full in zip(made.columns, cells, natural)
    ]
    spare = line - sum(least) - 2 * len(least) + 1  # a blank and a divider between columns
    texts = [index for index, name in enumerate(made.columns) if not name.startswith(">")]
    while (
        spare < 0
    ):  # a pattern or a path without blanks: the widest column folds in the middle of its words
        widest = max(texts, key=lambda index: least[index], default=None)
        if widest is None or least[widest] <= NARROWEST:
            return [None] * len(least)
        least[widest] -= 1
        spare += 1
    chosen = list(least)
    while spare > 0 and chosen != natural:
        narrowest = min(
            (i for i in range(len(chosen)) if chosen[i] < natural[i]), key=lambda i: chosen[i]
        )
        chosen[narrowest] += 1
        spare -= 1
    return list(chosen)


def render_report(fidelity: Fidelity) -> Group:
    """The report: what came out, the tables, the verdict."""
    artifact = fidelity.artifact
    head = Text(
        strip_control_characters(f"{artifact.name}: {artifact.scheme}, format {artifact.format}"),
        style="bold",
    )
    head.append(
        f"\n{format_numbers.format_size(artifact.bytes_source)} -> {format_numbers.format_size(artifact.bytes_artifact)}, "
        f"{artifact.bits_per_weight:.2f} bits per quantized weight",
        style="not bold",
    )
    verdict = Text(card.format_verdict(fidelity), style=_STYLES[fidelity.status])
    return Group(
        head, Text(), *(render_table(made) for made in tables.make_tables(fidelity)), verdict
    )


def render_plan(plan: PlanSummary) -> Group:
    """What a build will do: source, rules, totals, memory, shards, warnings."""
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
    head.append(
        "\n"
        + strip_control_characters(
            f"{facts}{format_numbers.format_size(source.bytes)}; read from {source.read_from}"
        ),
        style="not bold",
    )
    fits = memory.peak <= memory.budget
    waves = f", {memory.experts_per_wave} experts at once" if memory.experts_per_wave else ""
    parts = ", ".join(
        f"{name} {format_numbers.format_size(n_bytes)}" for name, n_bytes in memory.parts.items()
    )
    lines = Text(
        f"memory: {format_numbers.format_size(memory.peak)} of {format_numbers.format_size(memory.budget)}{waves}"
        f"{f' ({parts})' if parts else ''}; scratch disk {format_numbers.format_size(memory.scratch_disk)}",
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
        lines,
        *warnings,
    )


def render_plans(plans: Sequence[PlanSummary]) -> Group:
    """The plans of a recipe with several formats: the first in full, of the others what differs."""
    first, lines = plans[0], list[Text]()
    for plan in plans[1:]:
        told = f"and {plan.output}: {format_numbers.format_size(plan.totals.bytes_after)} in {len(plan.shards)} files"
        lines.append(Text(strip_control_characters(told), style="bold"))
        new = [warning for warning in plan.warnings if warning not in first.warnings]
        lines += [
            Text(strip_control_characters(f"warning: {warning}"), style="yellow") for warning in new
        ]
    return Group(render_plan(first), *lines)


def render_reports(reports: Sequence[Fidelity]) -> Group:
    """The reports of a recipe with several formats; figures that are those of one before are not shown again."""
    shown: list[Fidelity] = []
    for report in reports:
        if not any(report.modules == other.modules for other in shown):
            shown.append(report)
    return Group(*map(render_report, shown))


def make_rules_table(plan: PlanSummary) -> Table:
    """What each rule decided, with the totals below."""
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
        "does",
        ">modules",
        ">parameters",
        ">before",
        ">after",
        ">bits/weight",
    )
    return Table(title="Rules", columns=columns, rows=tuple(rows))


def make_shards_table(plan: PlanSummary) -> Table:
    """The first and the last output files."""
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
