"""The KL of the same tokens: what is resolved leads, whatever one token does to the mean."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import exp
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from support.diff_example import N_TOKENS, make_side_a, make_side_b, make_tokens
from support.report_variants import render_to_text

from quantkit.diff import page, render_text, tables
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import Diff
from quantkit.diff.sides import Side, read_tokens


def make_pair(
    factor: float, *, spike: float = 0.0, documents: bool = True, scale: float = 1.0
) -> Diff:
    """Return a diff in which B has `factor` times the KL of A on most tokens, and one spike.

    scale: of the KL of both.
    """
    dice = random.Random(3)
    first = make_tokens(0.0004, seed=1)
    first = replace(first, kl=[scale * value for value in first.kl])
    kl = [value * factor * exp(dice.gauss(0, 0.5)) for value in first.kl]
    kl[5] += spike
    sides = [
        replace(make_side_a(), tokens=first),
        replace(make_side_b(), tokens=replace(first, kl=kl)),
    ]
    if not documents:
        sides = [replace(s, tokens=replace(s.tokens, documents=None)) for s in sides if s.tokens]
    return compare_sides(*sides)


def test_one_spike_does_not_hide_that_most_tokens_are_worse() -> None:
    diff = make_pair(3.0, spike=5.0)
    (row, *_), mean = diff.kl, next(r for r in diff.distribution if r.figure == "kl_mean")
    assert row.typical_resolved == row.larger_resolved == row.documents_resolved == "worse"
    assert row.typical.value == pytest.approx(3, rel=0.1) and row.trimmed_resolved == "worse"
    assert row.trimmed.value == pytest.approx(3.4, rel=0.1)
    assert row.top_share_b > 0.6
    assert mean.ratio is not None and mean.ratio.ci is not None
    low, high = mean.ratio.ci
    assert low is not None and high is not None and high / low > 10
    start = "B is worse: KL of a typical token 2.9x"
    assert diff.headline.startswith(start) and "in 50 of 50 documents" in diff.headline
    assert "% of B's from one token" in diff.headline and "without it" in diff.headline


def test_the_headline_is_the_same_in_every_view() -> None:
    diff = make_pair(3.0)
    words = "".join(diff.headline.split())
    assert words in "".join(render_to_text(render_text.render_terminal(diff)).split())
    assert diff.headline.split(";")[0] in render_text.render_markdown(diff)
    assert diff.headline.split(";")[0].replace("'", "&#39;") in page.render_page(diff)
    assert json.loads(diff.model_dump_json())["headline"] == diff.headline
    assert "%)" not in diff.headline  # factors


def test_equal_artifacts_are_not_resolved_and_a_better_one_is_better() -> None:
    diff = make_pair(1.0)
    assert diff.kl[0].typical_resolved == diff.kl[0].larger_resolved == "not resolved"
    assert "(not resolved)" in diff.headline and not diff.headline.startswith("B is")
    better = make_pair(0.5)
    assert better.headline.startswith("B is better: KL of a typical token 0.4")
    assert "smaller on 93.2 % of 600 tokens and in 50 of 50 documents" in better.headline
    tails = {r.figure: r.resolved for r in better.distribution if r.domain == "all"}
    assert tails["kl_median"] == tails["kl_mean"] == "better"


def test_tokens_without_documents_count_as_independent_and_the_table_says_so() -> None:
    diff = make_pair(3.0, documents=False)
    assert diff.kl[0].documents is None and diff.kl[0].sign_p is None
    assert "do not record their documents" in tables.make_distribution_table(diff).note
    note = tables.make_distribution_table(make_pair(3.0)).note
    assert "in 50 documents, which are the independent units" in note


def test_rows_have_one_notation_and_definitions() -> None:
    table = tables.make_distribution_table(make_pair(3.0))
    assert not any("e-" in cell for row in table.rows for cell in row)
    named = {row[0] for row in table.rows}
    assert named == {name for name, _ in table.meanings}
    kinds = tables.make_kind_table(make_pair(3.0))
    assert [row[0] for row in kinds.rows] == ["math"] and kinds.rows[0][-1] == "worse"


def test_definitions_have_the_names_of_rows_in_a_power_of_ten() -> None:
    table = tables.make_distribution_table(make_pair(3.0, scale=0.1))
    assert "KL mean without the largest [10⁻⁶]" in {row[0] for row in table.rows}
    assert {row[0] for row in table.rows} == {name for name, _ in table.meanings}


def test_samples_with_and_without_documents_are_read(tmp_path: Path) -> None:
    values = {
        "domain": ["a", "b"],
        "kl": [0.1, 0.2],
        "nll_source": [1.0, 2.0],
        "nll_artifact": [1.5, 2.5],
        "same_top": [True, False],
    }
    path = tmp_path / "tokens.parquet"
    parquet.write_table(arrow.table(values), path)
    assert read_tokens(path).documents is None
    parquet.write_table(arrow.table({**values, "document": arrow.array([4, 9])}), path)
    assert read_tokens(path).documents == [4, 9]


def test_a_source_has_no_typical_ratio() -> None:
    a = make_side_a()
    assert a.tokens is not None
    source: Side = replace(a, tokens=replace(a.tokens, kl=[0.0] * N_TOKENS))
    diff = compare_sides(source, make_side_b())
    mean = next(r for r in diff.distribution if r.figure == "kl_mean" and r.domain == "all")
    assert diff.kl == () and mean.ratio is None and mean.resolved == "worse"
