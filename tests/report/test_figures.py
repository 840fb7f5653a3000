"""The table of figures: a new row shows in every view and is accepted as a gate, with no other
change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.diff_example import make_side_a, make_side_b
from support.report_example import FIDELITY
from support.report_variants import make_example, render_to_text

from quantkit import figures
from quantkit.artifact.fidelity_schema import DistributionResult, Fidelity, TextSet
from quantkit.diff import page as diff_page
from quantkit.diff import render_text
from quantkit.diff import tables as diff_tables
from quantkit.diff.compare import compare_sides
from quantkit.errors import RecipeError
from quantkit.figure_readers import NOT_MEASURED, Reading, list_seen_kinds, read_distribution
from quantkit.figures import FigureDefinition, Pairing
from quantkit.recipe.parse import parse_gates
from quantkit.report import card, gates, html_page, runs, tables, terminal
from quantkit.report.runs import Run
from quantkit.report.samples import Samples
from quantkit.verify.check_report import compute_status

README = Path(figures.__file__).parent / "report" / "README.md"


def read_tail(report: Fidelity, domain: str) -> Reading:
    """Read the 99th percentile of KL divided by its mean."""
    p99, mean = (read_distribution(key, report, domain) for key in ("kl_p99", "kl_mean"))
    if p99.value is None or not mean.value:
        return Reading(value=None, reason=NOT_MEASURED)
    return Reading(value=p99.value / mean.value)


TAIL = FigureDefinition(
    key="kl_tail",
    label="KL tail",
    meaning="99th percentile of KL divided by its mean.",
    style="ratio",
    direction="lower",
    reader=read_tail,
    tile="Tail of KL",
    tile_note="times the mean",
    run_column="tail",
    run_heading="tail",
    diff_label="KL tail",
    diff_tile="Tail of KL",
    pairing=Pairing(statistic="mean", column=lambda tokens: [10 * kl for kl in tokens.kl]),
)
VALUE = 0.0051 / 0.000361  # of the example report


@pytest.fixture(autouse=True)
def one_more_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one row more: all that adding a figure takes."""
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, TAIL))


def find_row(rows: Sequence[tuple[str, ...]], label: str) -> tuple[str, ...]:
    """Return the row of a table with a label."""
    return next(row for row in rows if row[0] == label)


def test_recipe_accepts_a_new_figure_as_gate_and_it_is_judged() -> None:
    text = "gates: {kl_tail: {max: 10}, kl_tail@math: {max: 1}}"
    bounds = parse_gates(text, "g.yaml", [])
    results = gates.judge_gates(bounds, make_example())
    assert [(row.figure, row.bound, row.ok) for row in results] == [
        ("kl_tail", "<= 10", False),
        ("kl_tail@math", "<= 1", None),
    ]
    assert results[0].value == pytest.approx(VALUE)
    assert results[1].reason == NOT_MEASURED
    judged = gates.apply_gates(bounds, make_example())
    assert judged.status == compute_status([False, None]) == "rejected"
    with pytest.raises(RecipeError, match="Did you mean 'kl_tail'"):
        parse_gates("gates: {kl_tial: {max: 10}}", "g.yaml", [])


def test_report_table_card_and_terminal_show_a_new_figure() -> None:
    report = make_example()
    assert find_row(tables.make_distribution_table(report).rows, "KL tail") == (
        "KL tail",
        f"{VALUE:.4f}",
        "-",
    )
    assert f"| KL tail | {VALUE:.4f} | - |" in card.render_card(report)
    assert "KL tail" in render_to_text(terminal.render_report(report))


def test_page_shows_a_new_figure_as_tile_and_in_its_table() -> None:
    report = make_example()
    tile = next(tile for tile in html_page.make_tiles(report) if tile.label == "Tail of KL")
    assert (tile.value, tile.note) == (f"{VALUE:.4f}", "times the mean")
    text = html_page.render_page(report, Samples())
    assert f'<dt title="{TAIL.meaning}">Tail of KL</dt>' in text
    assert f'<th scope="row" title="{TAIL.meaning}">KL tail</th>' in text
    assert text.count(f"<dd>{TAIL.meaning}</dd>") == 2  # of the tiles and of the table


def test_diff_pairs_and_shows_a_new_figure_in_every_view() -> None:
    diff = compare_sides(make_side_a(), make_side_b())
    row = next(row for row in diff.distribution if (row.domain, row.figure) == ("all", "kl_tail"))
    tokens = [side.tokens for side in (make_side_a(), make_side_b()) if side.tokens]
    change = sum(tokens[1].kl) - sum(tokens[0].kl)
    assert row.a == pytest.approx(VALUE) and row.b == pytest.approx(0.0051 / 0.004)
    assert row.difference is not None
    assert row.difference.value == pytest.approx(10 * change / len(tokens[0].kl))
    assert row.resolved == "worse"
    cells = find_row(diff_tables.make_distribution_table(diff).rows, "KL tail")
    assert cells[1] == f"{VALUE:.4f}" and cells[-1] == "worse" and "[" in cells[3]
    assert "KL tail" in render_to_text(render_text.render_terminal(diff))
    assert "| KL tail |" in render_text.render_markdown(diff)
    assert ">Tail of KL</dt>" in diff_page.render_page(diff)


def test_runs_list_and_sort_by_a_new_figure() -> None:
    smaller = [
        {**row, "kl_p99": {"value": 0.001}} if row["domain"] == "all" else row
        for row in FIDELITY["distribution"]  # type: ignore[attr-defined]
    ]
    both = [
        Run(name="long", fidelity=make_example()),
        Run(name="short", fidelity=make_example({"distribution": smaller})),
    ]
    shown = runs.make_run_table(both)
    assert shown.columns[-1] == ">tail" and shown.rows[0][-1] == f"{VALUE:.4f}"
    assert both[0].values()["tail"] == pytest.approx(VALUE)
    assert [run.name for run in runs.sort_runs(both, "tail")] == ["short", "long"]


def test_new_figure_of_the_whole_artifact_is_judged_and_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = FigureDefinition(
        key="shrink",
        label="shrink",
        meaning="Bytes of the source divided by bytes of the artifact.",
        style="ratio",
        direction="higher",
        scope="artifact",
        is_streamed=False,
        reader=lambda report, _: Reading(
            value=report.artifact.bytes_source / report.artifact.bytes_artifact
        ),
        tile="Shrink",
        run_column="shrink",
        run_heading="shrink",
    )
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, row))
    (result,) = gates.judge_gates(
        parse_gates("gates: {shrink: {min: 1.2}}", "g", []), make_example()
    )
    assert result.ok is True
    assert "Shrink" in {tile.label for tile in html_page.make_tiles(make_example())}
    assert ">shrink" in runs.make_run_table([Run(name="a", fidelity=make_example())]).columns


def test_new_stored_figure_is_a_key_of_fidelity_json(monkeypatch: pytest.MonkeyPatch) -> None:
    row = FigureDefinition(
        key="entropy_gap", label="entropy gap", meaning="", style="nats", direction="lower"
    )
    assert "entropy_gap" not in json.loads(make_example().to_json())["distribution"][0]
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, row))
    values = [{"domain": "all", "tokens": 3, "entropy_gap": {"value": 0.25, "ci": [0.2, 0.3]}}]
    report = make_example({"distribution": values})
    stored = json.loads(report.to_json())["distribution"][0]
    assert list(stored)[-1] == "entropy_gap" and stored["entropy_gap"]["value"] == 0.25
    assert (
        find_row(tables.make_distribution_table(report).rows, "entropy gap")[1]
        == "0.250 [0.200, 0.300]"
    )


def test_stored_keys_stay_in_order_and_unknown_ones_are_refused() -> None:
    row = DistributionResult.model_validate({"tokens": 1, "top1": {"value": 1.0}, "domain": "all"})
    assert list(row.model_dump()) == [
        "domain", "tokens", "kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max", "ppl_source",
        "ppl_artifact", "ppl_ratio", "top1", "mean_delta_p", "rms_delta_p",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="speed: extra keys"):
        DistributionResult.model_validate({"domain": "all", "tokens": 1, "speed": {"value": 1.0}})


def test_readme_defines_every_figure() -> None:
    text = README.read_text(encoding="utf-8")
    for row in figures.list_figures()[:-1]:  # without the row of these tests
        meaning = row.meaning.replace("|", "\\|")
        assert f"| `{row.key}` | {meaning} | " in text, row.key
        assert f" | {row.direction} | {row.places} |" in text, row.key


def test_keys_and_run_columns_are_unique() -> None:
    for name in ("key", "run_column"):
        names = [getattr(row, name) for row in figures.list_figures() if getattr(row, name)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(("members", "is_seen"), [(("web", "web-de"), True), (("web-ko",), False)])
def test_pooled_kind_is_seen_if_all_its_members_are(
    members: tuple[str, ...], is_seen: bool
) -> None:
    text = {"set": "a", "license": "b", "sha256": "c", "sequences": 1, "length": 1, "tokens": 1}
    report = SimpleNamespace(
        calibration=TextSet.model_validate({**text, "kinds": {"web": 9, "web-de": 9}}),
        measured_on=TextSet.model_validate({**text, "pooled": {"web-mul": members}}),
    )
    assert list_seen_kinds(report) == {"web", "web-de"} | ({"web-mul"} if is_seen else set())
