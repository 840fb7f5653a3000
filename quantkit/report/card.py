"""The model card: README.md of an artifact, rendered from its report."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.report import (
    card_data,
    engine_tables,
    format_numbers,
    markdown,
    notes,
    reproduce,
    snippets,
    tables,
    verdict,
)

MAX_CHARACTERS = 60_000
"""Limit of a model card, so that it fits into a GitHub comment (65,536 characters)."""

_LIMITS = (
    (markdown.ROWS, markdown.CELL),
    (40, 160),
    (12, 100),
    (4, 40),
)  # rows of a table, characters of a cell
MOST_COMMAND = reproduce.MAX_CHARACTERS + 2_000
"""Characters of the command that builds the artifact again; a longer one is not on the card."""


def render_card(fidelity: Fidelity) -> str:
    """Return README.md, always under MAX_CHARACTERS: long tables are cut and say so."""
    text = ""
    for rows, cell in _LIMITS:
        text = _render(fidelity, rows, cell)
        if len(text) < MAX_CHARACTERS:
            break
    return text


def _render(fidelity: Fidelity, rows: int, cell: int) -> str:
    text = (
        make_environment(rows, cell)
        .get_template("card.md.j2")
        .render(
            fidelity=fidelity,
            head=card_data.format_front_matter(fidelity, cell),
            title=card_data.make_title(fidelity),
            snippets=snippets,
            engine_tables=engine_tables,
            rows=rows,
            tables=tables,
            notes=notes,
            size_change=format_numbers.format_size_change,
            verdict=verdict.format_verdict(fidelity),
            same_bytes=reproduce.SAME_BYTES,
            most_command=MOST_COMMAND,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text)


@cache  # holds the compiled template
def make_environment(rows: int, cell: int) -> Environment:
    """Return the environment of the card for limits of rows and cells."""
    environment = Environment(
        loader=PackageLoader("quantkit.report", "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML; the filters escape untrusted text
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = lambda table: markdown.format_table(table, rows, cell)
    environment.filters["cell"] = lambda text: markdown.escape_cell(text, cell)
    environment.filters["code"] = lambda text: markdown.format_code_block(text, 4 * cell)
    environment.filters["python"] = lambda text: markdown.format_code_block(text, language="python")
    environment.filters["command"] = lambda text: markdown.format_code_block(text, MOST_COMMAND)
    environment.filters["size"] = format_numbers.format_size
    environment.filters["parameters"] = format_numbers.format_parameters
    return environment
