"""Reports for a terminal, as rich renderables that fit its width.

Nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.text import Text

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.report import format_numbers, notes, tables
from quantkit.report.short_form import STYLES, make_short_form
from quantkit.report.terminal_tables import render_table as render_table
from quantkit.report.terminal_tables import strip_control_characters as strip_control_characters
from quantkit.report.verdict import choose_status, format_verdict


def render_report(fidelity: Fidelity, artifact: Path | None = None) -> Group:
    """Return a report: sizes, tables, notes, and the verdict, or the short form of an artifact
    whose folder is named.
    """
    summary = fidelity.artifact
    head = Text(
        strip_control_characters(f"{summary.name}: {summary.scheme}, format {summary.format}"),
        style="bold",
    )
    size = format_numbers.format_size_change(summary.bytes_source, summary.bytes_artifact)
    head.append(
        f"\n{size}; {summary.bits_overall:.2f} bits per weight overall "
        f"({summary.bits_per_weight:.2f} of the quantized ones)",
        style="not bold",
    )
    sentences = [
        Text(strip_control_characters(note), style="yellow") for note in notes.list_notes(fidelity)
    ]
    end = (
        (Text(), make_short_form(fidelity, artifact, warnings=False))
        if artifact
        else (Text(format_verdict(fidelity), style=STYLES[choose_status(fidelity)]),)
    )
    return Group(
        head,
        Text(),
        *(render_table(table) for table in tables.make_tables(fidelity)),
        *sentences,
        *end,
    )


def render_results(results: Sequence[tuple[Path, Fidelity]], *, full: bool) -> Group:
    """Return the artifacts of a build in short form, with their tables before it if `full`.

    Tables of artifacts with equal figures, which hold the same codes, are shown once.
    """
    shown: list[Fidelity] = []
    parts: list[Group] = []
    for artifact, report in results:
        is_new = not any(report.modules == other.modules for other in shown)
        if full and is_new:
            shown.append(report)
            parts.append(Group(render_report(report, artifact)))
            continue
        title = [Text(strip_control_characters(str(artifact)), style="bold")]
        parts.append(Group(*title[: len(results) - 1], make_short_form(report, artifact)))
    spaced = [part for group in parts for part in (Text(), group)]
    return Group(*spaced[1:])
