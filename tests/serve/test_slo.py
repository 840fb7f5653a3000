"""`quantkit loadtest --slo`, `--gpu-metrics` and `--compare`: judgement, metrics, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.loadtest_example import (
    GOLDEN_RESULTS,
    make_conversations,
    make_level,
    make_load_test,
    make_requests,
)
from support.places.raw_server import RawServer, endless, make_head

from quantkit.artifact.layout import LOADTEST
from quantkit.artifact.loadtest_schema import Answer, GpuReadings, LoadTest
from quantkit.cli.main import main
from quantkit.errors import NotComparable, RecipeError
from quantkit.recipe.slo import Slo, parse_figure, parse_slo
from quantkit.serve.cost.hourly import HourlyCost
from quantkit.serve.loadtest import compare, gpu_metrics, guidellm, slo, slo_file, slo_tables
from quantkit.serve.loadtest.conversations import SYSTEM_PROMPT
from quantkit.serve.loadtest.conversations import make_conversations as make_rows

GOLDEN = GOLDEN_RESULTS.parent
DCGM, VLLM = ((GOLDEN / f"{name}_metrics.txt").read_text() for name in ("dcgm", "vllm"))
COST = """version: 1
volume: {million_output_tokens_per_month: 1}
throughput: {output_tokens_per_s: 1}
rented: {cards: 2, price_per_card_hour: 1.8}
api: [{name: big, input: 0.5, output: 2}]
"""


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["loadtest", *words], prog_name="quantkit")


def make_run(latencies: list[float], **changes: Any) -> LoadTest:
    """Return a run of one level."""
    level = make_level(make_requests(latencies, [100] * len(latencies)), **changes)
    return make_load_test().model_copy(update={"levels": (level,)})


def judge(targets: str, tested: LoadTest, cost: HourlyCost | None = None) -> Any:
    """Judge targets in flow style; return the only result."""
    (result,) = slo.judge_slo(parse_slo(f"slo: {{targets: {targets}}}", "t"), tested, cost).results
    return result


def judge_bound(key: str, side: str, bound: float, tested: LoadTest) -> Any:
    return judge(f"{{{key}: {{{side}: {bound}}}}}", tested)


def test_percentiles_have_three_outcomes_by_order_statistics() -> None:
    """Latencies of 1 to 100 s: the 95 % interval of the median is X(40) to X(61)."""
    tested = make_run([float(n) for n in range(1, 101)])
    for bound, outcome in ((60.9, "kept, not proven"), (61, "kept"), (50.4, "missed")):
        result = judge(f"{{latency_p50: {{max: {bound}}}}}", tested)
        assert result.outcome == outcome and result.n == 100
        assert result.value == pytest.approx(50.5) and result.ci == pytest.approx((40, 61))
    proven = judge("{latency_p50: {max: 60.9, proven: true}}", tested)
    assert proven.outcome == "missed" and "not proven" in proven.reason


def test_p99_is_not_proven_by_few_requests() -> None:
    required = slo_tables.count_required(99)
    assert required == 371  # .99^n <= 2.5 % from 368 on, and Student's quantile in place of z
    few, many = make_run([1.0] * (required - 1)), make_run([1.0] * required)
    assert judge("{latency_p99: {max: 30}}", few).outcome == "kept, not proven"
    assert judge("{latency_p99: {max: 30}}", many).outcome == "kept"


def test_prompts_are_selected_by_length() -> None:
    requests = make_requests([1.0, 2.0, 9.0, 9.0], [10, 999, 1000, None])
    tested = make_load_test().model_copy(update={"levels": (make_level(requests),)})
    for key, value, n in (("<1000", 1.5, 2), (">=1000", 9, 1)):
        result = judge(f"{{latency_p50@{key}: {{max: 99}}}}", tested)
        assert (result.value, result.n) == (value, n)
    absent = judge("{ttft_p99@>=5000: {max: 99}}", tested)
    assert absent.ok is None and "no request of this kind" in absent.reason
    rows = slo_tables.make_length_rows(tested.levels[0])
    assert [row[1:3] for row in rows] == [("under 1,000", "2"), ("1,000 to 7,999", "1")]


def test_errors_cache_hits_and_utilization() -> None:
    tested = make_run([1.0] * 95, errored=5)
    errors = judge("{errors: {max: 0.06}}", tested)
    assert errors.value == 0.05 and errors.outcome == "kept, not proven" and errors.n == 100
    assert judge_bound("errors", "max", 0.2, tested).outcome == "kept"
    assert judge_bound("errors", "max", 0.01, tested).outcome == "missed"
    assert "not measured" in judge("{cache_hits: {min: 0.6}}", tested).reason
    assert "--gpu-metrics" in judge("{gpu_utilization: {min: 0.85}}", tested).reason
    turns = make_requests(
        [1.0] * 8, [100] * 8, cached=[0, 80, 90, 90, 0, 80, 90, 94], conversations=[0] * 4 + [1] * 4
    )
    talks = make_conversations(make_level(turns))
    hits = judge("{cache_hits: {min: 0.5}}", tested.model_copy(update={"conversations": talks}))
    assert hits.value == pytest.approx(0.655) and hits.ci[0] < 0.655 < hits.ci[1]
    assert hits.outcome == "kept"
    gpu = GpuReadings(source="x", gpus=1, utilization=(0.9, 0.8) * 20)
    busy = judge("{gpu_utilization: {min: 0.85}}", make_run([1.0] * 9, gpu=gpu))
    assert busy.value == pytest.approx(0.85) and busy.n == 40 and busy.ok is True


def test_counters_alone_prove_nothing() -> None:
    """The example's second level has the engine's counters, and no cached tokens per answer."""
    tested = make_load_test()
    talks = make_conversations(tested.levels[1])
    hits = judge("{cache_hits: {min: 0.2}}", tested.model_copy(update={"conversations": talks}))
    assert hits.value == 0.25 and hits.outcome == "kept, not proven"
    assert "by the engine's counters" in hits.reason


def test_throughput_has_an_interval_of_batch_means_and_a_price() -> None:
    steady = judge("{tokens_per_second: {min: 7}}", make_run([1.0] * 50))
    assert steady.value == pytest.approx(8) and steady.outcome == "kept"
    uneven = judge("{tokens_per_second: {min: 7}}", make_run([0.1] * 30 + [2.0] * 20))
    low, high = uneven.ci
    assert low < uneven.value < high and uneven.outcome == "kept, not proven"
    cost = HourlyCost(per_hour=3.6, currency="EUR", side="rented")
    priced = judge("{tokens_per_currency: {min: 7000}}", make_run([1.0] * 50), cost)
    assert priced.value == pytest.approx(8000) and priced.outcome == "kept"
    assert "3.6 EUR per hour" in priced.reason


def test_requests_of_a_run_of_version_1_are_judged_by_its_percentiles() -> None:
    old = make_load_test().levels[0].model_copy(update={"requests": None})
    tested = make_load_test().model_copy(update={"levels": (old,)})
    result = judge("{latency_p99: {max: 30}}", tested)
    assert result.value == old.latency_ms.p99 / 1000 and result.outcome == "kept, not proven"
    assert judge("{latency_p50@<1000: {max: 2}}", tested).ok is None


def test_defaults_are_the_published_targets() -> None:
    targets = slo_file.read_slo("default").targets
    bounds = {key: bound.max if bound.min is None else bound.min for key, bound in targets.items()}
    assert bounds == {
        "latency_p50@<1000": 2, "latency_p99": 30, "errors": 0.01, "gpu_utilization": 0.85,
        "cache_hits": 0.6,
    }  # fmt: skip
    commented = [
        line.strip().removeprefix("# ").partition(" #")[0]
        for line in slo_file.read_default_text().splitlines()
        if line.startswith("    # ")
    ]
    assert len(commented) == 4
    for line in commented:
        parse_slo(f"slo: {{targets: {{{line}}}}}", "t")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1", "slo: missing"),
        ("slo: {}", "t:1: slo.targets: missing"),
        ("slo: {targets: {}}", "expected one entry or more"),
        ("slo: {target: {}, targets: {errors: {max: 1}}}", "unknown key. Did you mean"),
        ("slo: {targets: {latency_p51: {max: 1}}}", "no figure named"),
        ("slo: {targets: {latency_p50: {min: 1}}}", "expected {max: NUMBER}"),
        ("slo: {targets: {cache_hits: {max: 0.5}}}", "expected {min: NUMBER}"),
        ("slo: {targets: {cache_hits: {min: 60}}}", "a share from 0 to 1, found 60"),
        ("slo: {targets: {latency_p50@1000: {max: 1}}}", "expected prompts as @<1000"),
        ("slo: {targets: {errors@<1000: {max: 1}}}", "no figure named"),
        ("slo: {targets: {errors: {max: a}}}", "expected a number, found 'a'"),
        ("slo: {concurrency: 0, targets: {errors: {max: 0}}}", "expected at least 1, found 0"),
    ],
)
def test_bad_targets_are_one_sentence(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_slo(text, "t")
    (fault,) = caught.value.faults
    assert expected in fault and fault.startswith("t:1: ")
    file, stored = tmp_path / "slo.yaml", tmp_path / "run.json"
    file.write_text(text)
    stored.write_text(make_load_test().model_dump_json())
    result = run(str(stored), "--slo", str(file))
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_figures_are_described() -> None:
    assert parse_figure("latency_p50@<1000").meaning == (
        "p50 of the latency of a request, s; prompts under 1,000 tokens"
    )


def test_command_judges_a_stored_run_and_exits_with_3(tmp_path: Path) -> None:
    stored, file, cost = tmp_path / "run.json", tmp_path / "slo.yaml", tmp_path / "cost.yaml"
    stored.write_text(make_run([1.0] * 50).model_dump_json())
    cost.write_text(COST)
    file.write_text(
        "slo: {targets: {latency_p50: {max: 2}, latency_p99: {max: 2}, gpu_utilization: "
        "{min: 0.5}, tokens_per_currency: {min: 9000}}}"
    )
    result = run(str(stored), "--slo", str(file), "--cost", str(cost), "--json")
    assert result.exit_code == 3
    values = json.loads(result.stdout)
    outcomes = {row["figure"]: row["outcome"] for row in values["slo"]["targets"]}
    assert outcomes == {
        "latency_p50": "kept", "latency_p99": "kept, not proven",
        "gpu_utilization": "not judged", "tokens_per_currency": "missed",
    }  # fmt: skip
    assert "slo: at concurrency 1: tokens_per_currency >= 9000: found 8,000" in result.stderr
    file.write_text("slo: {targets: {latency_p50: {max: 2}, latency_p99: {max: 2}}}")
    kept = run(str(stored), "--slo", str(file))
    assert kept.exit_code == 0 and "kept, not proven" in kept.stdout
    assert "from 371 requests on" in " ".join(kept.stdout.split())
    file.write_text("slo: {concurrency: 7, targets: {errors: {max: 1}}}")
    absent = run(str(stored), "--slo", str(file))
    assert (
        absent.exit_code == 2 and "expected a level of the load test (1), found 7" in absent.stderr
    )
    ahead = run("http://127.0.0.1:9/v1", "--slo", str(file), "--concurrency", "1,2")
    assert ahead.exit_code == 2 and "expected a level of --concurrency 1,2" in ahead.stderr


def test_recipe_of_an_artifact_holds_targets(artifact: Path) -> None:
    """The plan of the artifact holds the recipe; its key `slo` is read without --slo."""
    plan = artifact / "quantkit/plan.json"
    values = json.loads(plan.read_text())
    assert "slo" not in values["recipe"]
    values["recipe"]["slo"] = Slo.model_validate({
        "targets": {"latency_p50": {"max": 0.5}}
    }).model_dump(mode="json")
    plan.write_text(json.dumps(values))
    (artifact / LOADTEST).write_text(make_run([1.0] * 50).model_dump_json())
    result = run(str(artifact))
    assert result.exit_code == 3 and "latency_p50 <= 0.5: found 1" in result.stderr


# ------------------------------------------------------------------------------- GPU and requests


def test_recorded_endpoints_are_read() -> None:
    """A value of 2^63 - 14 is DCGM's blank; labels hold spaces and braces."""
    reading = gpu_metrics.parse_reading([VLLM, DCGM], at=5.0)
    assert reading.utilization == pytest.approx(0.93) and reading.gpus == 2
    assert reading.watts == pytest.approx(1211) and reading.cache == pytest.approx(0.3)
    assert reading.memory_gb == pytest.approx(71680 * 2**20 / 1e9)
    assert reading.source == "DCGM exporter, vLLM"
    assert gpu_metrics.parse_reading([VLLM], at=0).utilization is None
    assert gpu_metrics.collect_readings([gpu_metrics.parse_reading(["nothing 1"], 0)]) is None
    assert gpu_metrics.list_valid('a{x="1"} NaN\na 1e999\na\na x\na -1\na 2 1700\n', "a") == [2]


def test_readings_outside_of_the_requests_do_not_count() -> None:
    sampler = gpu_metrics.GpuSampler(["u", "u"], scrape=lambda url: DCGM)
    sampler.take()
    (reading,) = sampler._readings
    assert sampler.select_readings(reading.at + 1, reading.at + 2) is None
    inside = sampler.select_readings(reading.at - 1, reading.at + 1)
    assert inside is not None and inside.utilization == (pytest.approx(0.93),)


def test_hostile_endpoint_ends(tmp_path: Path) -> None:
    server = RawServer(lambda *_: endless())
    try:
        sampler = gpu_metrics.GpuSampler([server.url])
        sampler.take()
        assert sampler.select_readings(0, 1e12) is None
        assert server.sent < 60_000_000
    finally:
        server.close()
    text = b"".join([b'DCGM_FI_DEV_GPU_UTIL{gpu="', b"9" * 3_000_000, b'"} 50\n'])
    server = RawServer(lambda *_: [make_head(Content_Length=str(len(text))), text])
    try:
        sampler = gpu_metrics.GpuSampler([server.url])
        sampler.take()
        kept = sampler.select_readings(0, 1e12)
        assert kept is not None and kept.utilization == (0.5,)
    finally:
        server.close()


def test_requests_and_answers_of_the_golden_results() -> None:
    values = json.loads(GOLDEN_RESULTS.read_text())
    prompts = [json.dumps({"name": f"p{n}", "tokens": 8, "pause": 0.01}) for n in range(9)]
    result = guidellm.parse_result(values, 1, "golden", prompts)
    requests = result.level.requests
    assert requests is not None and result.span is not None
    assert requests.prompt_tokens == (11,) * 6 and requests.output_tokens == (8,) * 6
    assert requests.conversation == tuple(range(6)) and requests.start_s[0] == 0
    assert np.median(requests.latency_ms) == pytest.approx(result.level.latency_ms.p50, rel=0.05)
    assert result.span[1] - result.span[0] <= result.level.seconds
    assert [answer.prompt for answer in result.answers] == [0, 1, 2, 3, 4, 5]
    assert {answer.text for answer in result.answers} == {"0 1 2 3 4 5 6 7 "}


def test_conversations_share_a_system_prompt() -> None:
    rows = make_rows(20, 16, ignore_eos=True)
    assert {row["system_prompt"] for row in rows} == {SYSTEM_PROMPT}
    assert len({row["prompt_0"] for row in rows}) == 20 and rows[0]["output_tokens_count_3"] == 16
    assert not [key for key in make_rows(1, 16, ignore_eos=False)[0] if "count" in key]


# ---------------------------------------------------------------------------------- side by side


def test_two_runs_are_compared_with_prices_and_answers(tmp_path: Path) -> None:
    texts = ["same", "abcd", "x"]
    answers = tuple(Answer(prompt=n, text=text) for n, text in enumerate(texts))
    own = make_run([1.0] * 50).model_copy(update={"answers": answers, "note": "own"})
    other = make_run([2.0] * 50).model_copy(
        update={"answers": (answers[0], Answer(prompt=1, text="abXY"), Answer(prompt=9, text=""))}
    )
    agreement = compare.compare_answers(own, other)
    assert agreement is not None and (agreement.prompts, agreement.equal) == (2, 1)
    assert agreement.prefix == pytest.approx(0.75)
    files = tmp_path / "own.json", tmp_path / "api.json", tmp_path / "cost.yaml"
    files[0].write_text(own.model_dump_json())
    files[1].write_text(other.model_dump_json())
    files[2].write_text(COST)
    words = [str(files[0]), "--compare", str(files[1]), "--cost", str(files[2]), "--api", "big"]
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)["compare"]
    figures = {row["figure"]: (row["a"], row["b"]) for row in compared["figures"]}
    assert figures["output tokens/s"] == pytest.approx((8, 4))
    level = own.levels[0]
    price = 2 + 0.5 * level.prompt_tokens / level.output_tokens
    own_price = 3.6 * 1e6 / (8 * 3600)
    assert figures["price of 1 M output tokens"] == pytest.approx((own_price, price))
    text = " ".join(run(*words).stdout.split())
    assert "Answers to 2 prompts: 1 are equal, 50.0 %" in text and "A: own" in text
    others = other.model_copy(update={"max_tokens": 9})
    files[1].write_text(others.model_dump_json())
    failed = run(*words)
    assert failed.exit_code == 1 and "max_tokens: 8 and 9" in failed.stderr
    with pytest.raises(NotComparable, match="a concurrency that both runs have"):
        far = other.levels[0].model_copy(update={"concurrency": 3})
        far_run = other.model_copy(update={"levels": (far,)})
        compare.pair_figures(own, far_run, (compare.SideCost(), compare.SideCost()))
    alone = run(str(files[0]), "--api", "big")
    assert alone.exit_code == 2 and "expected --cost and --compare" in alone.stderr
