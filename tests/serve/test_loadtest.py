"""`quantkit loadtest`: scenarios and results of GuideLLM, stored files, output, errors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.loadtest_example import GOLDEN_RESULTS, make_load_test
from support.stub_engine import RunningApp, StubEngine, send_json
from tools import demo_load

from quantkit.artifact.layout import LOADTEST as FILE
from quantkit.artifact.layout import LOADTEST_PAGE
from quantkit.artifact.loadtest_schema import CacheCounters, parse_load_test
from quantkit.cli.main import main
from quantkit.errors import ArtifactError, QuantkitError, UsageError
from quantkit.serve.loadtest import engine, guidellm, tables
from quantkit.serve.loadtest.charts import make_charts
from quantkit.serve.loadtest.page import render_page
from quantkit.serve.loadtest.prompts import read_prompts
from quantkit.verify.shallow import verify_artifact

REAL = os.environ.get("QUANTKIT_GUIDELLM", "")

FAKE = """#!{python}
import json, pathlib, shutil, sys, urllib.request
if sys.argv[1] == "--version":
    sys.exit(print("guidellm version: 0.0"))
assert sys.argv[1:3] == ["run", "--config"], sys.argv
spec = json.loads(pathlib.Path(sys.argv[3]).read_text())["spec"]
with open({log!r}, "a") as log:
    log.write(json.dumps(spec) + "\\n")
prompt = json.loads(pathlib.Path(spec["data"][0]["path"]).read_text().splitlines()[0])["prompt"]
values = {{"prompt": json.dumps({{"name": prompt}}), "model": spec["backend"]["model"]}}
body = json.dumps(values).encode()
urllib.request.urlopen(spec["backend"]["target"] + spec["backend"]["request_format"], body)
{then}
shutil.copy({golden!r}, spec["outputs"][0]["path"])
"""


class Counting(StubEngine):
    """A stub with vLLM's counters: 100 tokens per prompt, 40 of them cached after the first."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics":
            n = len(self.asked)
            asked = f'vllm:prefix_cache_queries_total{{engine="0"}} {100.0 * n}'
            hits = f'vllm:prefix_cache_hits_total{{engine="0"}} {40.0 * max(n - 1, 0)}'
            text = f"# TYPE x counter\n{asked}\n{hits}\n"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": text.encode()})
        elif (
            scope["type"] == "http"
            and scope["path"] == "/v1/models"
            and getattr(self, "two", False)
        ):
            await send_json(send, 200, {"data": [{"id": "a"}, {"id": "b"}]})
        else:
            await super().__call__(scope, receive, send)


def fake(folder: Path, then: str = "") -> tuple[str, Path]:
    """Return a program in place of GuideLLM, and the log of its scenarios."""
    program, log = folder / "guidellm", folder / "log.jsonl"
    program.write_text(
        FAKE.format(python=sys.executable, log=str(log), golden=str(GOLDEN_RESULTS), then=then)
    )
    program.chmod(0o755)
    return str(program), log


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["loadtest", *words], prog_name="quantkit")


def test_level_matches_guidellm_results() -> None:
    """The stub waited 10 ms before each of its 8 tokens; the golden file is the reference."""
    raw = json.loads(GOLDEN_RESULTS.read_text())["benchmarks"][0]
    level = guidellm.parse_level(json.loads(GOLDEN_RESULTS.read_text()), 1, "golden")
    assert (level.answered, level.errored, level.output_tokens, level.prompt_tokens) == (
        6,
        0,
        8.0,
        11.0,
    )
    assert 10 <= level.ttft_ms.p50 <= level.ttft_ms.p90 <= level.ttft_ms.p99 < 20
    assert 10 <= level.inter_token_ms.p50 < 15 and 80 <= level.latency_ms.p50 < 120
    assert level.latency_ms.p50 == pytest.approx(
        1000 * raw["metrics"]["request_latency"]["successful"]["percentiles"]["p50"]
    )
    assert level.output_tokens_per_second == pytest.approx(48 / raw["duration"])
    assert level.requests_per_second == pytest.approx(6 / raw["duration"])


def test_invalid_or_empty_results_are_rejected() -> None:
    with pytest.raises(QuantkitError, match=r"expected results of GuideLLM 0\.8"):
        guidellm.parse_level({"benchmarks": []}, 1, "x")
    raw = json.loads(GOLDEN_RESULTS.read_text())
    raw["benchmarks"][0]["metrics"]["request_totals"] = {
        "successful": 0,
        "errored": 5,
        "incomplete": 0,
        "total": 5,
    }
    with pytest.raises(QuantkitError, match=r"at concurrency 3, found none of 5 \(5 errors\)"):
        guidellm.parse_level(raw, 3, "x")


def test_load_test_runs_levels_reads_cache_and_stores_result(
    artifact: Path, tmp_path: Path
) -> None:
    program, log = fake(tmp_path)
    page, output = tmp_path / "load.html", tmp_path / "out.json"
    with RunningApp(Counting()) as serving:
        words = [
            serving.url,
            "--artifact",
            str(artifact),
            "--guidellm",
            program,
            "--concurrency",
            "4,1",
            "--requests",
            "8",
        ]
        result = run(
            *words,
            "--html",
            str(page),
            "--output",
            str(output),
            "--max-tokens",
            "9",
            "--note",
            "a stub",
        )
    assert result.exit_code == 0, result.output
    specs = [json.loads(line) for line in log.read_text().splitlines()]
    one = specs[1]
    assert [spec["profile"]["streams"] for spec in specs] == [[1], [1], [4], [4]]
    counts = [spec["constraints"][0]["count"] for spec in specs]
    assert counts == [4, 8, 16, 32]  # at least 4 per place; 8 conversations of 4 turns
    assert [spec["metrics"]["sample_size"] for spec in specs] == [0, None, 0, 0]
    backend = one["backend"]
    assert backend["target"] == serving.url.removesuffix("/v1") and backend["model"] == "stub"
    assert (
        backend["extras"]["body"] == {"temperature": 0, "ignore_eos": True}
        and backend["max_tokens"] == 9
    )
    kept = parse_load_test(json.loads((artifact / FILE).read_text()), "kept")
    assert kept == parse_load_test(json.loads(output.read_text()), "output")
    assert [level.concurrency for level in kept.levels] == [1, 4] and kept.note == "a stub"
    assert [level.cache for level in kept.levels] == [CacheCounters(asked=100, hits=40)] * 2
    assert "40.0%" in result.output and "Under load" in result.output
    assert "<script" in page.read_text()
    assert not (artifact / LOADTEST_PAGE).exists()  # nothing could vouch for it
    assert verify_artifact(artifact).unsealed == (FILE,)  # it knows the added file
    again = run(str(artifact), "--json")
    assert parse_load_test(json.loads(again.output), "again") == kept


def test_other_files_are_not_written_into_an_artifact(artifact: Path) -> None:
    """A file that its manifest does not list would invalidate it."""
    for option, place in (
        ("--html", "load.html"),
        ("--output", "quantkit/x.json"),
        ("--html", FILE),
        ("--html", LOADTEST_PAGE),
    ):
        result = run("http://127.0.0.1:9/v1", option, str(artifact / place))
        assert (
            result.exit_code == 2
            and f"{option}: {artifact / place}: expected a place outside" in result.output
        )
    (artifact / FILE).write_text(make_load_test().model_dump_json())
    assert run(str(artifact), "--output", str(artifact / FILE)).exit_code == 0
    assert verify_artifact(artifact).unsealed == (FILE,)


def test_api_key_is_in_no_command_line_and_no_result(
    artifact: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    program, log = fake(tmp_path)
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with RunningApp(Counting()) as serving:
        result = run(
            serving.url,
            "--guidellm",
            program,
            "--concurrency",
            "1",
            "--key-variable",
            "MY_KEY",
            "--json",
        )
    assert result.exit_code == 0 and "sk-secret" not in result.output
    assert json.loads(log.read_text().splitlines()[0])["backend"]["api_key"] == "sk-secret"


def test_failing_or_hanging_guidellm_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidellm, "SLACK_SECONDS", 3)
    with RunningApp(Counting()) as serving:
        for name, then, expected in (
            ("a", "sys.exit('it broke')", "exited with 1; its last output: it broke"),
            ("b", "import time; time.sleep(60)", "still running 3 s after its time limit"),
            ("c", "sys.exit(0)", "exited with 0; its last output: nothing"),
        ):
            (tmp_path / name).mkdir()
            program, _ = fake(tmp_path / name, then)
            result = run(serving.url, "--guidellm", program, "--seconds", "1")
            assert result.exit_code == 1 and expected in result.output


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["localhost:8000"], 2, "expected http://HOST:PORT/v1"),
        (["http://127.0.0.1:9/v1"], 1, "expected an OpenAI-compatible server, found none"),
        (["http://127.0.0.1:9/v1", "--concurrency", "0"], 2, "expected numbers from 1"),
        (["http://127.0.0.1:9/v1", "--model", "m"], 1, "expected a response, found none"),
        (
            ["http://127.0.0.1:9/v1", "--model", "m", "--metrics", "http://127.0.0.1:9"],
            1,
            "--metrics http://127.0.0.1",
        ),
        (
            ["http://127.0.0.1:9/v1", "--concurrency", "1,1"],
            2,
            "expected every number once, found '1,1'",
        ),
        (["http://127.0.0.1:9/v1", "--concurrency", "1,x"], 2, "expected numbers from 1"),
        (
            ["http://127.0.0.1:9/v1", "--data", "nothing"],
            2,
            "expected a file, or one of tiny-v3-code, tiny-v3-math",
        ),
        (
            ["http://127.0.0.1:9/v1", "--guidellm", "no-such-program"],
            2,
            "expected GuideLLM, found none",
        ),
        (["http://127.0.0.1:9/v1", "--artifact", "EMPTY"], 1, "not an artifact of quantkit"),
        (["EMPTY"], 2, "expected a load test, found none"),
    ],
)
def test_invalid_options_are_rejected(
    words: list[str], code: int, expected: str, tmp_path: Path
) -> None:
    program, _ = fake(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "EMPTY" else word for word in words]
    result = run(*words, *([] if "--guidellm" in words else ["--guidellm", program]))
    assert (
        result.exit_code == code and expected in result.output and "Traceback" not in result.output
    )


class Refusing(StubEngine):
    """A stub that rejects every request."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await send_json(send, 400, {"error": {"message": f"no {scope['path']} of 'foo'"}})
        else:
            await super().__call__(scope, receive, send)


@pytest.mark.parametrize(
    ("words", "path"), [([], "/v1/completions"), (["--chat"], "/v1/chat/completions")]
)
def test_server_error_is_reported_before_guidellm_starts(
    words: list[str], path: str, tmp_path: Path
) -> None:
    program, log = fake(tmp_path)
    with RunningApp(Refusing()) as serving:
        result = run(serving.url, "--guidellm", program, "--model", "foo", *words)
    assert result.exit_code == 1 and not log.exists()
    assert (
        f"expected status 200, found 400: no {path} of 'foo'; request a model that it serves (stub)"
        in result.output
    )
    assert (
        engine.extract_message("<html>\nno") == "<html> no"
        and engine.extract_message("") == "no message"
    )


def test_server_with_several_models_requires_a_name(tmp_path: Path) -> None:
    stub = Counting()
    stub.two = True  # type: ignore[attr-defined]
    with (
        RunningApp(stub) as serving,
        pytest.raises(UsageError, match="expected one served model, found a, b"),
    ):
        engine.read_served_model(serving.url, "")


def test_prompts_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "a"}\n\n{"prompt": "b", "text": "c"}\n')
    assert read_prompts(str(file)).texts == ("a", "b") and read_prompts(str(file)).take(3) == [
        "a",
        "b",
        "a",
    ]
    (tmp_path / "p.txt").write_text("x y\nz\n")
    assert read_prompts(str(tmp_path / "p.txt")).texts == ("x y", "z")
    for text, expected in (
        ("", "expected prompts, found none"),
        ('{"a": 1}', ":1: expected a text under"),
        ("[", ":1: "),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=expected):
            read_prompts(str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="expected UTF-8"):
        read_prompts(str(file))


def test_cache_counters_are_parsed_and_subtracted() -> None:
    vllm = 'vllm:prefix_cache_queries_total{e="0"} 10\nvllm:prefix_cache_queries_total{e="1"} 5\n'
    assert engine.parse_cache_counters(
        vllm + 'vllm:prefix_cache_hits_total{e="0"} 3.0\n'
    ) == CacheCounters(asked=15, hits=3)
    sglang = 'sglang:prompt_tokens_total{m="x y"} 8\nsglang:cached_tokens_total{m="x y"} 2\n'
    assert engine.parse_cache_counters(sglang) == CacheCounters(asked=8, hits=2)
    assert engine.parse_cache_counters("quantkit_gateway_running 3\n") is None
    later, earlier = CacheCounters(asked=9, hits=4), CacheCounters(asked=4, hits=1)
    assert (
        engine.subtract_counters(earlier, later) == CacheCounters(asked=5, hits=3)
        and engine.subtract_counters(later, earlier) is None
    )


def test_table_charts_and_page_show_every_level() -> None:
    made = make_load_test()
    table = tables.make_level_table(made)
    assert [row[:2] for row in table.rows] == [("1", "6"), ("4", "6, 1 failed")]
    assert [row[-1] for row in table.rows] == ["-", "25.0%"]
    assert "fewer than 100 requests" in table.note
    many = made.levels[0].model_copy(update={"answered": 100})
    assert (
        "fewer than"
        not in tables.make_level_table(made.model_copy(update={"levels": (many,)})).note
    )
    for name, (_, _, spec) in make_charts(made).items():
        assert {row["at"] for row in spec["data"]["values"]} == {1, 4}, name
    page = render_page(made)
    assert "&lt;m&gt;" in page and "<m>" not in page


def test_diff_compares_load_tests_with_the_same_settings(artifact: Path, tmp_path: Path) -> None:
    """A copy of the artifact with a slower run, then with a run with other settings."""
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    first = make_load_test()
    slow = first.levels[1].model_copy(
        update={"output_tokens_per_second": first.levels[1].output_tokens_per_second / 2}
    )
    (artifact / FILE).write_text(first.model_dump_json())
    (other / FILE).write_text(
        first.model_copy(update={"levels": (slow,), "note": "2 x A100"}).model_dump_json()
    )
    result = CliRunner().invoke(main, ["diff", str(artifact), str(other), "--json"])
    assert result.exit_code == 0, result.output
    diff = json.loads(result.stdout)
    rows = {(row["at_once"], row["figure"]): (row["a"], row["b"]) for row in diff["load"]}
    assert {at for at, _ in rows} == {4}
    a, b = rows[4, "output tokens/s"]
    assert b == pytest.approx(a / 2) and any(
        "Servers: A: not noted, B: 2 x A100." in note for note in diff["notes"]
    )
    for words, text in (
        ([], "-50.0%"),
        (["--markdown"], "Load test"),
        (["--html"], 'id="t-load"'),
    ):
        assert text in CliRunner().invoke(main, ["diff", str(artifact), str(other), *words]).stdout
    (other / FILE).write_text(first.model_copy(update={"max_tokens": 9}).model_dump_json())
    result = CliRunner().invoke(main, ["diff", str(artifact), str(other)])
    assert (
        "The load tests have different settings (max_tokens: 8 and 9)"
        in " ".join(result.stdout.split())
        and "-50.0%" not in result.stdout
    )


def test_verify_rejects_damaged_result_and_diff_shows_the_rest(
    artifact: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    (artifact / FILE).write_text(make_load_test().model_dump_json())
    assert verify_artifact(artifact).unsealed == (FILE,)
    for text, expected in (
        ("{", "expected JSON, found an error"),
        ('{"evil": 1}', r"tool: Field required; run the load test again"),
    ):
        (other / FILE).write_text(text)
        with pytest.raises(ArtifactError, match=rf"{FILE}: .*{expected}"):
            verify_artifact(other)
        result = CliRunner().invoke(main, ["diff", str(artifact), str(other)])
        output = " ".join(result.stdout.split())
        assert (
            result.exit_code == 0 and "The load test is left out:" in output and "KL" in output
        ), result.output


def test_damaged_result_is_reported_by_key() -> None:
    values = make_load_test().model_dump(mode="json")
    values["levels"][0]["ttft_ms"]["p99"] = -1
    with pytest.raises(ArtifactError, match=r"x: levels\.0\.ttft_ms\.p99: "):
        parse_load_test(values, "x")
    changed = make_load_test().model_copy(update={"max_tokens": 9})
    assert (
        make_load_test().comparable(changed) == "max_tokens: 8 and 9"
        and make_load_test().comparable(make_load_test()) is None
    )


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="QUANTKIT_GUIDELLM names no GuideLLM; `make demo-load` does")
def test_load_test_with_real_guidellm(built: Path) -> None:
    demo_load.main(built, REAL, "1,2")
