"""Tables at every width: no word and no number is broken where the line has room for it."""

from __future__ import annotations

import pytest
from support.report_example import PLAN
from support.report_variants import GATES, make_example, render_to_text

from quantkit.plan.plan_schema import PlanSummary
from quantkit.report import gates, tables, terminal_plan
from quantkit.report.table import Table
from quantkit.report.terminal_tables import render_table, wrap_cell

BREAKS_AFTER = tuple("./_,:=|-")


def find_broken(table: Table, width: int) -> list[str]:
    """Return words of the table that its text breaks, other than after punctuation of a name."""
    text = render_to_text(render_table(table), width)
    assert max(map(len, text.splitlines())) <= width
    shown = {word for line in text.splitlines() for word in line.split()}
    ends = {word for word in shown if word.endswith(BREAKS_AFTER)}
    shown |= {word.removesuffix(":") for word in shown}  # a heading of a record
    cells = [name.removeprefix(">") for name in table.columns] + [
        cell for row in table.rows for cell in row
    ]
    words = {word for cell in cells for word in cell.split()}
    broken = []
    for word in words - shown:
        rest = word
        while rest and rest not in shown:
            end = max((e for e in ends if rest.startswith(e)), key=len, default="")
            if not end:
                broken.append(word)
                break
            rest = rest.removeprefix(end)
    return broken


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_of_report_and_plan_break_no_word(width: int) -> None:
    report = gates.apply_gates(GATES, make_example())
    plan = PlanSummary.model_validate(PLAN)
    for table in (
        *tables.make_tables(report),
        terminal_plan.make_rules_table(plan),
        terminal_plan.make_shards_table(plan),
        terminal_plan.make_texts_table(plan),
    ):
        assert find_broken(table, width) == [], table.title


def test_a_name_longer_than_its_column_is_broken_after_a_dot() -> None:
    assert wrap_cell("model.layers.12.mlp.experts.10.down_proj kept", 20).split("\n") == [
        "model.layers.12.mlp.",
        "experts.10.down_proj",
        "kept",
    ]
    assert wrap_cell("artifacts/out", 10).split("\n") == ["artifacts/", "out"]
    assert wrap_cell("a" * 25, 10).split("\n") == ["a" * 10, "a" * 10, "a" * 5]
    assert wrap_cell("two words\nof text", 20) == "two words\nof text"
    assert "".join(wrap_cell("q" * 9 + "/" + "r" * 30, 12).split("\n")) == "q" * 9 + "/" + "r" * 30


def test_table_without_room_for_columns_becomes_records() -> None:
    columns = ("module", *(f">{name}" for name in ("1234567890" * 2, "b" * 20, "c" * 20)))
    rows = (("model.layers.0", "1.0", "", "3.0"), ("model.layers.1", "4.0", "5.0", "6.0"))
    text = render_to_text(render_table(Table(title="T", columns=columns, rows=rows)), 40)
    assert text.splitlines()[1:4] == [
        "module: model.layers.0",
        f"  {columns[1][1:]}: 1.0",
        "  " + "c" * 20 + ": 3.0",
    ]
    assert "module: model.layers.1" in text.splitlines()


def test_mark_of_a_row_stands_before_its_first_cell() -> None:
    columns = (" ", "name", *(f">{letter * 20}" for letter in "abcd"))
    rows = (("*", "best", *"1234"), (" ", "other", *"5678"))
    lines = render_to_text(render_table(Table(title="T", columns=columns, rows=rows)), 60)
    assert lines.splitlines()[1] == "* name: best" and "\nname: other\n" in lines
    assert f"  {'a' * 20}: 1" in lines.splitlines()


def test_short_words_stay_whole_and_get_their_room_first() -> None:
    columns = ("license", "text", ">n")
    text = "a description of several words, much longer than a line of the terminal has room for"
    table = Table(title="T", columns=columns, rows=(("Apache-2.0", f"{text} {text}", "1"),))
    for width in (30, 40, 60, 80):
        assert "Apache-2.0" in render_to_text(render_table(table), width).split()
