"""A table as text, shared by the model card, the pages and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.report.definitions import Meanings


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under named columns.

    A column whose name starts with ">" holds numbers and is aligned right. meanings: headings of
    columns and rows, each with the sentence that defines it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    meanings: Meanings = ()
