"""The comparison as text for a terminal and as Markdown for a pull request.

Nothing is printed here.
"""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment
from rich.console import Group
from rich.text import Text

from quantkit.diff import tables
from quantkit.diff.diff_schema import ComparedModel, Diff, FlippedItem
from quantkit.report import html_page, markdown, terminal
from quantkit.report.samples import find_divergence

MAX_CHARACTERS = 60_000
"""Limit of the Markdown view; a GitHub comment takes 65,536."""

TERMINAL_ROWS = 10
_REFERENCES = re.compile(
    r"(?<!\w)[@#](?=\w)"  # a user, an issue
    r"|#(?=\d)|\bGH-(?=\d)"  # an issue of another repository
    r"|[\w.+-]@(?=[\w-]+\.\w)"  # an address of mail
    r"|\b\w+:(?=/)|\b(?:mailto|xmpp|tel|data|javascript):|\bwww(?=\.)",  # an address of the web
    re.IGNORECASE,
)
_LIMITS = (
    (60, 240, 40, 1_200),
    (40, 160, 20, 700),
    (20, 120, 10, 400),
    (8, 60, 3, 200),
    (3, 30, 0, 0),
)
"""Rows of a table, characters of a cell, flipped items, characters of an answer; the first that
fits."""


def describe_model(model: ComparedModel) -> str:
    """Return "tiny-v3-awq4: awq, int4 g128 asymmetric, bfloat16 scales, format awq; accepted"."""
    status = "" if model.status == "source" else f"; {model.status}"
    return f"{model.name}: {model.scheme}, format {model.format}{status}"


def render_terminal(diff: Diff) -> Group:
    """Return both models, notes, tables and the headline."""
    head = Text(
        f"A  {terminal.strip_control_characters(describe_model(diff.a))}\nB  "
        f"{terminal.strip_control_characters(describe_model(diff.b))}",
        style="bold",
    )
    lines = [
        Text(terminal.strip_control_characters(f"left out: {reason}"), style="yellow")
        for reason in diff.left_out
    ]
    lines += [Text(terminal.strip_control_characters(note), style="dim") for note in diff.notes]
    rendered = [terminal.render_table(table) for table in tables.make_tables(diff, TERMINAL_ROWS)]
    return Group(
        head,
        Text(),
        *lines,
        *([Text()] if lines else []),
        *rendered,
        Text(terminal.strip_control_characters(diff.headline)),
    )


def render_markdown(diff: Diff) -> str:
    """Return Markdown of fewer than MAX_CHARACTERS; cut tables and answers say so."""
    text = ""
    for rows, cell, items, answer in _LIMITS:
        text = _render_markdown(diff, rows, cell, items, answer)
        if len(text) < MAX_CHARACTERS:
            break
    return text


def _render_markdown(diff: Diff, rows: int, cell: int, items: int, answer: int) -> str:
    text = (
        make_environment(rows, cell, answer)
        .get_template("diff.md.j2")
        .render(
            diff=diff,
            tables=tables,
            headline=diff.headline,
            describe=describe_model,
            rows=rows,
            items=diff.flips[:items],
            around=cut_to_difference,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text)


@cache  # holds the compiled template
def make_environment(rows: int, cell: int, answer: int) -> Environment:
    """Return the environment of the Markdown for limits of rows, cells and answers."""
    environment = html_page.make_environment(
        autoescape=False
    )  # Markdown: the filters escape untrusted text
    environment.filters["table"] = lambda table: disable_references(
        markdown.format_table(table, rows, cell, "quantkit diff --json")
    )
    environment.filters["cell"] = lambda text: disable_references(
        markdown.escape_cell(text, 4 * cell)
    )
    environment.filters["answer"] = lambda text: fence_text(text, answer)
    return environment


def cut_to_difference(flip: FlippedItem, limit: int = 300) -> tuple[str, str]:
    """Return both answers from shortly before their first difference."""
    place = find_divergence(flip.a.text, flip.b.text)
    start = max(0, place - limit)
    cut = f"[{start:,} characters before] … " if start else ""
    return cut + flip.a.text[start:], cut + flip.b.text[start:]


def disable_references(text: str) -> str:
    """Break mentions, issue numbers and addresses with a character of no width.

    "@decorator" in an answer notifies no user, and no text of a model becomes a link.
    """
    return _REFERENCES.sub(lambda match: match[0] + "\u200b", text)


def fence_text(text: str, limit: int) -> str:
    """Return a fenced block that its text cannot end."""
    kept = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    kept = kept if len(kept) <= limit else kept[:limit] + " …"
    longest = max((len(run) for run in re.findall(r"`+", kept)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{kept}\n{fence}"
