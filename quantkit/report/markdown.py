"""Pieces of Markdown that the model card is made of. Pure; text from elsewhere ends no cell and starts no HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from quantkit.report.tables import MORE, Table

ROWS = 100
CELL = 240


def format_table(made: Table, rows: int = ROWS, cell_limit: int = CELL, more: str = MORE) -> str:
    """A GitHub table of at most `rows` rows with its note below; nothing for no rows. `more`: what holds the rest."""
    if not made.rows:
        return ""
    names = [escape_cell(name.removeprefix(">"), cell_limit) for name in made.columns]
    rules = ["---:" if name.startswith(">") else "---" for name in made.columns]
    lines = [
        names,
        rules,
        *([escape_cell(text, cell_limit) for text in row] for row in made.rows[:rows]),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    hidden = len(made.rows) - rows
    notes = [escape_cell(made.note, 6 * cell_limit)] if made.note else []
    notes += [f"{hidden:,} more rows in {more}."] if hidden > 0 else []
    return "\n\n".join([text, *notes])


def escape_cell(text: str, limit: int = CELL) -> str:
    """One line that neither ends a cell nor starts HTML."""
    line = " ".join(text.split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return (
        line
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("`", "\\`")
    )


def format_code_block(text: str, limit: int = 4 * CELL) -> str:
    """A fenced block of one command."""
    line = text.replace("```", "'''").strip()
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return f"```bash\n{line}\n```"


def format_front_matter(
    values: Mapping[str, str | Sequence[str] | list[dict[str, object]] | None],
) -> str:
    """The YAML head of a model card. Texts and objects are written as JSON, which is YAML; None is left out."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def _quoted(value: str | dict[str, object]) -> str:
    """JSON on one line without characters that a terminal obeys; what JSON escapes, line ends above all, stays."""
    if isinstance(value, str):
        value = "".join(character for character in value if character.isprintable())
    text = json.dumps(value, ensure_ascii=False)
    return "".join(character for character in text if character.isprintable())
