"""Markdown tables, cells, code blocks and front matter. Pure.

Untrusted text is escaped: it can neither end a cell nor start HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from quantkit.report.error_tables import MORE
from quantkit.report.table import Table

_LINK_END = re.compile(r"\](?=[(\[:])")
"""Where the text of a link or an image ends, or the name of a link's definition."""
_ENTITY = re.compile(r"&(?=#?\w+;)")
"""A character by its name or number, which Markdown decodes before it looks for addresses."""
ROWS = 100
CELL = 240


def format_table(table: Table, rows: int = ROWS, cell_limit: int = CELL, more: str = MORE) -> str:
    """Return a GitHub table with its note, "" without rows.

    At most `rows` rows are shown; `more` names the file or command with the rest.
    """
    if not table.rows:
        return ""
    names = [escape_cell(name.removeprefix(">"), cell_limit) for name in table.columns]
    rules = ["---:" if name.startswith(">") else "---" for name in table.columns]
    lines = [
        names,
        rules,
        *([escape_cell(text, cell_limit) for text in row] for row in table.rows[:rows]),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    hidden = len(table.rows) - rows
    notes = [escape_cell(table.note, 6 * cell_limit)] if table.note else []
    notes += [f"{hidden:,} more rows in {more}."] if hidden > 0 else []
    return "\n\n".join([text, *notes])


def escape_cell(text: str, limit: int = CELL) -> str:
    """Return text as one line that neither ends a cell nor starts HTML, a link or an image."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    line = _ENTITY.sub("&amp;", line.replace("\\", "\\\\"))
    return (
        _LINK_END
        .sub(r"\\]", line)
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("`", "\\`")
    )


def format_code_block(text: str, limit: int = 4 * CELL, language: str = "bash") -> str:
    """Return a fenced block of code, character by character; a long one is cut."""
    code = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text).strip()
    code = code if len(code) <= limit else code[: limit - 1] + "…"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def format_front_matter(
    values: Mapping[str, str | Sequence[str] | list[dict[str, object]] | None],
) -> str:
    """Return the YAML front matter of a model card.

    Texts and objects are written as JSON, a subset of YAML; None is left out.
    """
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_quoted(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {_quoted(item)}" for item in value)]
    return "\n".join([*lines, "---"])


def _quoted(value: str | dict[str, object]) -> str:
    """Return JSON on one line without control characters; escape sequences of JSON stay."""
    if isinstance(value, str):
        value = "".join(character for character in value if character.isprintable())
    text = json.dumps(value, ensure_ascii=False)
    return "".join(character for character in text if character.isprintable())
