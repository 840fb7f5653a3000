"""The time of a build: work of a plan, scaling from measured builds, the record on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.plans import plan_checkpoint

from quantkit.evaluate.local_checks import count_tokens
from quantkit.plan import time_estimate
from quantkit.plan.time_estimate import (
    MOST_RECORDS,
    BuildRate,
    compute_work,
    estimate_plan,
    estimate_time,
    read_rates,
    record_build,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of recorded builds in a cache of its own."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    return tmp_path / "builds" / "rates.json"


def make_rate(name: str = "now", **changes: object) -> BuildRate:
    values: dict[str, object] = {
        "name": name,
        "date": "2026-01-02",
        "host": "h",
        "device": "cpu",
        "threads": 4,
        "methods": ("awq",),
        "tasks": ("gsm8k", "limit None"),
        "work": {"quantize": 1e12, "benchmarks": 1e9},
        "seconds": {"quantize": 100.0, "benchmarks": 40.0},
    }
    return BuildRate.model_validate({**values, **changes})


def test_seconds_are_scaled_by_work_from_the_nearest_build() -> None:
    wanted = make_rate(work={"quantize": 6e12, "benchmarks": 2e9}, seconds={})
    far = make_rate("far", work={"quantize": 1e12, "benchmarks": 1e9})
    near = make_rate("near", work={"quantize": 5e12}, seconds={"quantize": 400.0})
    estimate = estimate_time(wanted, [near, far])
    assert estimate.steps == {"quantize": pytest.approx(480), "benchmarks": pytest.approx(80)}
    assert estimate.seconds == pytest.approx(560)
    assert estimate.reason == (
        "scaled from builds on this machine: near (2026-01-02), far (2026-01-02)"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "other"},
        {"device": "cuda"},
        {"threads": 1},
        {"methods": ("gptq",)},
        {"work": {"quantize": 1e12 / 31}},
        {"work": {"quantize": 31e12}},
        {"seconds": {}},
    ],
)
def test_builds_that_are_not_comparable_give_no_estimate(changes: dict[str, object]) -> None:
    estimate = estimate_time(make_rate(), [make_rate("other", **changes)])
    assert estimate.seconds is None and estimate.steps == {}
    assert estimate.reason == (
        "no complete build of a similar size with awq was measured on this machine (cpu, 4 threads)"
    )


def test_other_benchmarks_are_left_out_and_said() -> None:
    estimate = estimate_time(make_rate(), [make_rate("old", tasks=("mbpp", "limit None"))])
    assert estimate.seconds == pytest.approx(100)
    assert estimate.reason.endswith("; without benchmarks, not measured here")


def test_newest_of_two_equal_builds_counts() -> None:
    rates = [make_rate("old"), make_rate("new", seconds={"quantize": 60.0})]
    assert estimate_time(make_rate(), rates).steps["quantize"] == pytest.approx(60)


def test_work_of_a_step_is_what_it_multiplies() -> None:
    """A dense model: forward passes of two streams each, statistics and rounding per matrix."""
    plan = plan_checkpoint("llama", quantize="{method: gptq, symmetric: true}", format="gptq")
    blocks, tokens = plan.layout.blocks, 1024
    weights = sum(linear.n_parameters for block in blocks for linear in block.linears)
    work = compute_work(plan)
    head = plan.layout.head or plan.layout.embedding
    assert work["distribution"] == 2 * tokens * head.n_parameters
    assert work["source hashes"] == plan.source_bytes() and work["benchmarks"] == 0
    forward = (2 + 2) * tokens * weights
    assert work["quantize"] > forward
    rounding = work["quantize"] - forward
    largest = max(linear.in_features for block in blocks for linear in block.linears)
    n = sum(len(block.linears) for block in blocks)
    assert rounding < n * largest**2 * (tokens + 10 * largest)


def test_experts_count_by_the_share_that_a_token_uses() -> None:
    plan = plan_checkpoint(quantize="{method: rtn}", calibration="null")
    experts = [block.experts for block in plan.layout.blocks if block.experts]
    share = experts[0].top_k / experts[0].count
    routed = sum(
        linear.n_parameters
        for block in plan.layout.blocks
        if block.experts and block.kind != "mtp"
        for linear in block.linears
        if linear.role == "routed_expert"
    )
    others = sum(
        linear.n_parameters
        for block in plan.layout.blocks
        if block.kind != "mtp"
        for linear in block.linears
        if linear.role != "routed_expert"
    )
    forward = 2 * plan.tokens["fidelity"] * (others + share * routed)
    assert 0 < share < 1 and forward < compute_work(plan)["quantize"] < forward * 10


def test_work_of_a_counted_text_is_that_of_the_build() -> None:
    """The plan bounds the tokens of gold solutions; the build has counted them."""
    plan = plan_checkpoint(evaluation="{tasks: [gsm8k], likelihood: 4}")
    counted = count_tokens(plan, {"calibration": 900, "fidelity": 500})
    tokens = {"calibration": 900, "fidelity": 500 + 77}
    built = replace(counted, tokens=tokens)
    assert compute_work(counted) == compute_work(built)
    assert compute_work(plan)["quantize"] > compute_work(counted)["quantize"]


def test_measured_build_is_recorded_and_gives_the_estimate(cache: Path) -> None:
    plan = plan_checkpoint()
    assert estimate_plan(plan).seconds is None
    steps = {"plan": 1.0, "source hashes": 0.5, "distribution": 2.0, "benchmarks": 9.0}
    record_build(plan, steps, [3.0, 4.0], is_scored=False)
    estimate = estimate_plan(plan)
    assert estimate.seconds == pytest.approx(9.5)
    assert estimate.steps == {"source hashes": 0.5, "quantize": 7.0, "distribution": 2.0}
    assert "out (20" in estimate.reason
    for _ in range(MOST_RECORDS):
        record_build(plan, steps, [3.0], is_scored=False)
    assert len(json.loads(cache.read_text())["builds"]) == MOST_RECORDS


@pytest.mark.parametrize("content", ["", "[]", '{"builds": [{"name": 3}]}', "\x00"])
def test_damaged_record_is_no_record(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert read_rates() == ()
    record_build(plan_checkpoint(), {}, [1.0], is_scored=True)
    assert len(read_rates()) == 1


def test_folder_that_cannot_be_written_does_not_fail_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(time_estimate, "locate_rates", lambda: tmp_path / "file" / "rates.json")
    record_build(plan_checkpoint(), {}, [1.0], is_scored=True)
    assert read_rates() == ()
