"""Writes a recipe as YAML text with a comment for each value. Pure."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.io.yaml_document import parse_scalar, printable

WIDTH = 100
COMMENT_COLUMN = 38
"""Column of the comments, as in the recipes that ship with quantkit."""

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:@+-]*(?<!:)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A key, its value as YAML, and the reason, "" for none. is_text: the value needs quotes if
    YAML would read it as something else.
    """

    key: str
    value: str
    reason: str = ""
    is_text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Keys of one section of a recipe; name "": top-level keys."""

    name: str
    choices: tuple[Choice, ...]


def write_recipe(title: str, sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """Return the text of a recipe: a head of comments, then the sections.

    notes: paragraphs for the head.
    """
    head = [title, "", "  quantkit plan FILE     layers, sizes, memory, before a weight is read"]
    head += ["  quantkit build FILE    builds the artifact, or resumes an interrupted build"]
    for note in notes:
        head += ["", *note.split("\n")]
    head += ["", "recipes/README.md documents every key."]
    lines = [f"# {printable(line, 300)}".rstrip() for line in head]
    lines += ["", "version: 1"]
    for section in sections:
        lines += ["", *write_section(section)]
    return "\n".join(lines) + "\n"


def write_section(section: Section) -> list[str]:
    """Return the lines of a section."""
    indent = "  " if section.name else ""
    lines = [f"{section.name}:"] if section.name else []
    for choice in section.choices:
        value = quote_text(choice.value) if choice.is_text else choice.value
        lines += write_line(f"{indent}{choice.key}: {value}", choice.reason)
    return lines


def write_line(content: str, reason: str) -> list[str]:
    """Return a line with its comment, which continues on lines of its own if it is long."""
    if not reason:
        return [content]
    start = max(COMMENT_COLUMN, len(content) + 2)
    width = max(30, WIDTH - start - 2)
    first, *rest = textwrap.wrap(reason, width)
    indent = " " * start
    return [
        f"{content.ljust(start)}# {first}",
        *(f"{indent}#   {line}" for line in textwrap.wrap(" ".join(rest), width - 2)),
    ]


def quote_text(text: str) -> str:
    """Return a text as a YAML scalar, in quotes unless it is plain."""
    if _PLAIN.fullmatch(text) and parse_scalar(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)
