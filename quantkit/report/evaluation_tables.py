"""Tables of `quantkit eval`. Pure."""

from __future__ import annotations

from quantkit.evaluate.options import EvaluationOptions
from quantkit.evaluate.results import EvaluationResult
from quantkit.report.format_numbers import MISSING
from quantkit.report.table import Table
from quantkit.report.tables import make_comparison_table


def make_evaluation_tables(outcome: EvaluationResult, setup: EvaluationOptions) -> list[Table]:
    """Return the scores, and the paired comparison if there is a baseline."""
    has_seeds = any(row.noise is not None for row in outcome.task_results)
    rows = [
        (
            row.task,
            row.filter,
            f"{row.n:,}",
            "not run" if row.score is None else f"{100 * row.score:.1f} %",
            *((MISSING if row.noise is None else f"±{100 * row.noise:.1f}",) if has_seeds else ()),
            f"{100 * row.interval.low:.1f} to {100 * row.interval.high:.1f}"
            if row.interval
            else row.not_run[:60],
            f"{100 * row.truncated:.0f} %",
            f"{100 * row.unparsed:.0f} %",
            f"{row.n_tokens:.0f}",
        )
        for row in outcome.task_results
    ]
    between = (">seeds",) if has_seeds else ()
    columns = ("task", "filter", ">n", ">score", *between, ">95 %", ">cut", ">no result", ">tokens")
    note = "cut: answers that reached the token limit; no result: answers without an extractable "
    note += "result; tokens: mean per answer."
    if has_seeds:
        note += " seeds: standard deviation of the score between seeds, in points; a difference "
        note += "below it is noise of sampling."
    note += "".join(f"\nNot valid: {fault}." for fault in outcome.faults)
    variants = {row.task: row.variant for row in outcome.task_results if row.variant != "plain"}
    note += "".join(f"\n{task}: {variant}." for task, variant in variants.items())
    note += "".join(f"\nNot run: {reason}." for reason in outcome.not_run.values())
    empty = ("",) * (len(columns) - 4)
    rows += [(name, "", "0", "not run", *empty) for name in outcome.not_run]
    tables = [Table(title="Scores", columns=columns, rows=tuple(rows), note=note)]
    temperature = setup.decoding.temperature
    how = f"{setup.seeds} answers per item at temperature {temperature}, averaged per item"
    if not temperature:
        how = "Greedy"
    if outcome.comparison:
        tables.append(make_comparison_table(outcome.comparison, f"{how}, the same prompts on both"))
    return tables
