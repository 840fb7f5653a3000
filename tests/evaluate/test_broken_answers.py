"""Tasks whose answers are cut or cannot be read are not valid; seeds show their noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
from support.report_variants import make_example, render_to_text

from quantkit.artifact.fidelity_schema import BenchmarkResult
from quantkit.evaluate import results, source_comparison
from quantkit.evaluate.broken_answers import LEAST_ANSWERS, MOST_BROKEN, describe_broken
from quantkit.evaluate.item_results import ItemPair, ItemResult
from quantkit.evaluate.options import Decoding, EvaluationOptions
from quantkit.evaluate.results import EvaluationResult, TaskResult
from quantkit.recipe.schema import Gate
from quantkit.report import gates, notes, tables, terminal
from quantkit.report.evaluation_tables import make_evaluation_tables

TASK: Any = SimpleNamespace(name="t", filters=("answer",), sha256="ab" * 32, domain="math")


def make_item(
    number: int, *, score: float = 1.0, cut: bool = False, read: bool = True
) -> ItemResult:
    return ItemResult(
        task="t", domain="math", filter="answer", doc_id=number, doc_hash="d",
        prompt_hash="p", target_hash="h", prompt="q", target="a", response="r", score=score,
        outcome="a", n_tokens=5, truncated=cut, parsed=read,
    )  # fmt: skip


def make_row(cut: int, n: int = 40, unread: int = 0) -> BenchmarkResult:
    """Return the row of `n` items; the artifact's first answers are cut, or have no result."""
    pairs = [
        ItemPair(baseline=make_item(i), candidate=make_item(i, cut=i < cut, read=i >= unread))
        for i in range(n)
    ]
    return source_comparison.make_benchmark_row(TASK, pairs, 0.98)


def test_share_at_the_limit_is_valid_and_above_it_is_not() -> None:
    limit = round(40 * MOST_BROKEN)
    assert make_row(limit).fault == "" and make_row(0, unread=limit).fault == ""
    assert make_row(limit + 1).fault == (
        "t: expected at most 20%, but 22% of the answers of the artifact were cut at the token "
        "limit; raise max_gen_toks of the task"
    )
    assert "22% of the answers of the artifact have no result" in make_row(0, unread=9).fault


def test_few_answers_are_not_judged() -> None:
    assert make_row(LEAST_ANSWERS - 1, n=LEAST_ANSWERS - 1).fault == ""
    assert make_row(LEAST_ANSWERS, n=LEAST_ANSWERS).fault


def test_both_models_are_named() -> None:
    fault = describe_broken("t", 99, {"source": (0.5, 0.0), "artifact": (0.0, 0.3)})
    assert "50% of the answers of the source were cut" in fault
    assert "30% of the answers of the artifact have no result" in fault


def test_gate_on_a_task_that_is_not_valid_is_missed() -> None:
    """Both models score the same, and the bound is kept: the answers decide nothing."""
    gate = {"t": Gate(min_recovery=0.9)}
    good, bad = (make_example({"benchmarks": [make_row(cut).model_dump()]}) for cut in (0, 30))
    assert gates.apply_gates(gate, good).status == "accepted"
    judged = gates.apply_gates(gate, bad)
    (result,) = judged.gates
    assert judged.status == "rejected" and result.outcome == "missed"
    assert "not valid: t: expected at most 20%" in result.reason
    assert any(note.startswith("Not valid: t: ") for note in notes.list_notes(bad))
    assert tables.make_benchmark_table(bad).rows[0][-1].startswith("not valid; ")
    assert "Not valid: t: " in render_to_text(terminal.render_report(bad), 300)


def make_result(runs: list[list[ItemResult]]) -> TaskResult:
    """Return the row of an evaluation with these runs, one per seed."""
    from quantkit.evaluate.item_results import average_runs

    loaded: Any = SimpleNamespace(tasks=(SimpleNamespace(**vars(TASK), filter_list=()),), failed={})
    both: Any = SimpleNamespace(runs=runs, items=average_runs(runs), loaded=loaded)
    (row,) = results.summarize_tasks(both)
    return row


@pytest.fixture(autouse=True)
def plain_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub of a task has no prompts to describe."""
    monkeypatch.setattr(results.task_runner, "describe_variant", lambda *_, **__: "plain")


def test_seeds_show_the_spread_of_their_scores() -> None:
    """Three seeds of 10 items score 0.5, 0.7 and 0.9."""
    runs = [[make_item(i, score=float(i < right)) for i in range(10)] for right in (5, 7, 9)]
    row = make_result(runs)
    assert row.seed_scores == pytest.approx((0.5, 0.7, 0.9))
    assert row.score == pytest.approx(0.7)
    assert row.noise == pytest.approx(stdev([0.5, 0.7, 0.9]))
    assert results.task_result_to_json(row)["noise"] == row.noise
    outcome = EvaluationResult(
        folder=Path("x"),
        task_results=(row,),
        not_run={"u": "u: no data"},
        comparison=(),
        document={},
    )
    setup = EvaluationOptions(seeds=3, decoding=Decoding(temperature=0.6))
    (table,) = make_evaluation_tables(outcome, setup)
    assert table.rows[0][table.columns.index(">seeds")] == "±20.0"
    assert {len(cells) for cells in table.rows} == {len(table.columns)}
    assert "noise of sampling" in table.note


def test_one_seed_has_no_spread() -> None:
    row = make_result([[make_item(i) for i in range(10)]])
    assert row.seed_scores == () and row.noise is None
    outcome = EvaluationResult(
        folder=Path("x"), task_results=(row,), not_run={}, comparison=(), document={}
    )
    (table,) = make_evaluation_tables(outcome, EvaluationOptions())
    assert ">seeds" not in table.columns


def test_evaluation_lists_its_faults() -> None:
    row = replace(make_result([[make_item(i, cut=True) for i in range(25)]]))
    outcome = EvaluationResult(
        folder=Path("x"), task_results=(row,), not_run={}, comparison=(), document={}
    )
    assert outcome.faults == (row.fault,) and "100% of the answers of the model" in row.fault
