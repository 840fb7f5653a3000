"""Coverage in reports: the figure, its gate, and the table that names text and remedy."""

from __future__ import annotations

import pytest
from support.report_variants import make_example, render_to_text

from quantkit import figures
from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.recipe.schema import Gate
from quantkit.report import card, gates, html_page, runs, tables, terminal
from quantkit.report.runs import Run
from quantkit.report.samples import Samples

DOWN = "model.layers.3.mlp.down_proj"
SENTENCE = (
    f"The text web-zh has 32 % of its energy at {DOWN} outside of what calibration covers. Add "
    "text of this kind to the calibration set."
)


def make_report(chinese: float | None = 0.318, kinds: dict[str, int] | None = None) -> Fidelity:
    """Return a report whose Chinese text has a share outside of calibration at one input."""

    def place(name: str, shares: dict[str, float | None]) -> dict[str, object]:
        sizes = {"channels": 1536, "tokens": 65536, "effective_rank": 1204.25}
        return {"input": name, "unspanned": shares, **sizes}

    blocks = [
        {
            "block": "model.layers.2",
            "inputs": [place("model.layers.2.mlp.down_proj", {"math": 0.06, "web-zh": 0.2})],
        },
        {
            "block": "model.layers.3",
            "inputs": [
                place("model.layers.3.mlp.gate_proj", {"math": 0.07, "web-zh": 0.11}),
                place(DOWN, {"math": 0.05, "web-zh": chinese}),
            ],
        },
    ]
    changes: dict[str, object] = {"coverage": blocks}
    calibration = make_example().calibration
    if kinds is not None and calibration is not None:
        changes["calibration"] = {**calibration.model_dump(), "kinds": kinds}
    return make_example(changes)


def render_all(report: Fidelity) -> list[str]:
    """Return card, terminal text and page, each on one line."""
    texts = (
        card.render_card(report),
        render_to_text(terminal.render_report(report), width=200),
        html_page.render_page(report, Samples()),
    )
    return [" ".join(text.replace("\\_", "_").split()) for text in texts]


def test_figure_is_one_minus_the_largest_share_and_names_text_and_input() -> None:
    row = figures.find_figure("coverage")
    assert row is not None
    reading = row.read(make_report())
    assert reading.value == pytest.approx(0.682) and reading.reason == f"web-zh at {DOWN}"
    assert runs.Run(name="a", fidelity=make_report()).values()["coverage"] == pytest.approx(0.682)
    assert ">coverage" in runs.make_run_table([Run(name="a", fidelity=make_report())]).columns


def test_gate_is_judged_and_says_where() -> None:
    low, high = (
        gates.judge_gates({"coverage": Gate(min=bound)}, make_report())[0] for bound in (0.7, 0.6)
    )
    assert (low.ok, high.ok) == (False, True)
    assert low.reason == f"web-zh at {DOWN}"


def test_without_coverage_the_gate_is_not_judged_and_nothing_is_shown() -> None:
    (result,) = gates.judge_gates({"coverage": Gate(min=0)}, make_example())
    assert (result.ok, result.value, result.reason) == (None, None, "not measured")
    assert tables.make_coverage_table(make_example()).rows == ()


def test_share_that_is_not_finite_fails_the_gate() -> None:
    (result,) = gates.judge_gates({"coverage": Gate(min=0)}, make_report(chinese=None))
    assert (result.ok, result.reason) == (False, "not finite")


def test_every_view_names_the_text_its_worst_input_and_the_remedy() -> None:
    report = make_report(kinds={"math": 100})
    table = tables.make_coverage_table(report)
    assert table.rows == (("web-zh (unseen)", DOWN, "31.8 %", "1204", "1,536"),)
    assert table.note == SENTENCE
    for text in render_all(report):
        assert SENTENCE in text


def test_table_is_absent_where_everything_is_covered() -> None:
    report = make_report(chinese=0.1)
    low = report.model_copy(update={"coverage": (report.coverage or ())[1:]})
    assert tables.make_coverage_table(low).rows == ()
    for text in render_all(low):
        assert "outside of what calibration covers" not in text
