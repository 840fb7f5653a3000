"""A plan's summary of its texts, benchmarks, gates, engines and scratch disk."""

from __future__ import annotations

from dataclasses import replace

from support.plans import plan_checkpoint
from support.report_variants import make_example, render_to_text

from quantkit.evaluate.local_checks import count_tokens
from quantkit.plan.measurements import GATE_BOUNDS, list_gates
from quantkit.plan.plan_schema import PlanSummary, PlanTime
from quantkit.plan.summary import summarize_plan
from quantkit.recipe.schema import Gate
from quantkit.report import gates, terminal_plan

EVERY = {
    "kl_mean": Gate(max=0.25, min=0.0),
    "size": Gate(max=7 * 10**9),
    "tiny-v3-math": Gate(
        min_recovery=0.98,
        margin_pp=2,
        max_lost=3,
        min_score=0.5,
        max_truncated_pp=1,
        max_unparsed_pp=1,
        proven=True,
    ),
}


def test_gates_are_named_as_in_the_report() -> None:
    judged = gates.judge_gates(EVERY, make_example())
    named = {f"{row.figure} {row.bound}" for row in judged}
    listed = [bound.removesuffix(", proven") for bound in list_gates(EVERY)]
    assert set(listed) == named and len(listed) == 9
    keys = {key for key in Gate.model_fields if key != "proven"}
    assert set(GATE_BOUNDS) == keys
    assert "tiny-v3-math.lost <= 3, proven" in list_gates(EVERY)


def summarize(**keys: str) -> PlanSummary:
    return summarize_plan(plan_checkpoint(**keys))


def test_tokens_are_bounds_until_they_are_counted() -> None:
    plan = plan_checkpoint(evaluation="{tasks: [gsm8k], likelihood: 2}")
    first = summarize_plan(plan).streams
    assert [(row.use, row.tokens, row.is_counted) for row in first] == [
        ("calibration", 1024, False),
        ("fidelity", 1024 - 2 * 128, False),
    ]
    counted = count_tokens(plan, {"calibration": 900, "fidelity": 500})
    second = summarize_plan(counted).streams
    assert [(row.tokens, row.is_counted) for row in second] == [(900, True), (500, True)]
    assert counted.tokens == {"calibration": 900, "fidelity": 500 + 2 * 128}
    assert counted.memory.scratch_bytes < plan.memory.scratch_bytes
    assert counted.memory.peak_bytes == plan.memory.peak_bytes
    assert count_tokens(plan, {}) is plan


def test_summary_has_benchmarks_gates_engines_and_the_reason_of_the_scratch_disk() -> None:
    summary = summarize(
        evaluation="{tasks: [gsm8k, mbpp], limit: 100}", gates="{kl_mean: {max: 0.1}}"
    )
    assert summary.tasks.names == ("gsm8k", "mbpp") and summary.tasks.limit == 100
    assert summary.gates == ("kl_mean <= 0.1",)
    engines = {row.engine: row for row in summary.engines}
    assert engines["vLLM"].is_supported and engines["vLLM"].tried
    assert engines["quantkit.load"].is_supported
    assert all(bool(row.reason) is not row.is_supported for row in summary.engines)
    assert "1,024 calibration tokens" in summary.memory.scratch_reason
    plan = plan_checkpoint()
    none = replace(plan, memory=replace(plan.memory, scratch_bytes=0))
    assert summarize_plan(none).memory.scratch_reason == ""


def test_terminal_shows_each_with_a_label() -> None:
    summary = summarize(evaluation="{tasks: [gsm8k]}", gates="{kl_mean: {max: 0.1}}")
    time = PlanTime(seconds=5400.0, steps={"quantize": 5000.0, "benchmarks": 400.0}, reason="r")
    text = render_to_text(
        terminal_plan.render_plan(summary.model_copy(update={"time": time})), width=80
    )
    labels = [line.split("  ")[0] for line in text.splitlines()]
    for label in ("calibration", "benchmarks", "gates", "loads in", "memory", "scratch", "time"):
        assert label in labels
    assert "time         about 1.5 h (quantize 83 min, benchmarks 7 min), r" in text
    assert max(map(len, text.splitlines())) <= 80
    unknown = PlanTime(reason="no build was measured")
    assert terminal_plan.describe_time(unknown) == "not known: no build was measured"
