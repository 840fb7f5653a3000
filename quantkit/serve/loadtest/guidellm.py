"""GuideLLM as a separate process: it pins another version of click, and imports torch.

One process per level, so that the engine's counters can be read between levels.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.artifact.loadtest_schema import Answer, LoadLevel, Percentiles
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.files import parse_json, read_bytes, write_atomic
from quantkit.serve.loadtest.request_rows import parse_answers, parse_requests

PROGRAM = "guidellm"
MAX_RESULT_BYTES = 2_000_000_000
"""Results hold 3 kB per request, more with prompts and answers."""
SLACK_SECONDS = 180
"""Time beyond the duration of a level: GuideLLM starts worker processes and loads a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class LoadTestSetup:
    """The options of a load test.

    tokenizer: a folder or a hub id, to count tokens if a server reports no usage. key: "" for none.
    """

    program: str
    url: str
    model: str
    chat: bool
    max_tokens: int
    ignore_eos: bool
    tokenizer: str
    key: str
    requests: int
    seconds: float

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


def find_program(name: str) -> str:
    """Return the path of GuideLLM; UsageError if it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise UsageError(
            f"{name}: expected GuideLLM, found none; make an environment for it (python -m venv "
            "ENV; ENV/bin/pip install guidellm) and name it: --guidellm ENV/bin/guidellm"
        )
    return path


def read_version(program: str) -> str:
    """Return the tool's name and version."""
    process = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=SLACK_SECONDS, check=False
    )
    return " ".join(process.stdout.split()) or PROGRAM


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """A level, the time of its requests (seconds since 1970; None if unknown), and its answers."""

    level: LoadLevel
    span: tuple[float, float] | None
    answers: tuple[Answer, ...]


def make_scenario(
    setup: LoadTestSetup, concurrency: int, prompts: Path, results: Path, *, keep_texts: bool
) -> dict[str, Any]:
    """Return GuideLLM's scenario (version 0.8) of one level; keep_texts: requests and answers."""
    # A server that is not vLLM or SGLang may refuse a parameter that it does not know.
    body = {"temperature": 0} | ({"ignore_eos": True} if setup.ignore_eos else {})
    backend = {
        "kind": "openai_http",
        "target": setup.url,
        "model": setup.model,
        "request_format": setup.path,
        "api_key": setup.key or None,
        "max_tokens": setup.max_tokens,
        "http2": False,
        "extras": {"body": body},
    }
    spec = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": [concurrency]},
        "constraints": [
            {"kind": "max_requests", "count": setup.requests},
            {"kind": "max_duration", "seconds": setup.seconds},
        ],
        "tokenizer": {"kind": "huggingface_auto", "model": setup.tokenizer},
        "data": [{"kind": "json_file", "path": str(prompts)}],
        "outputs": [{"kind": "json", "path": str(results)}],
        "metrics": {"kind": "generative", "sample_size": None if keep_texts else 0},
    }
    return {"spec": spec}


def make_request_body(setup: LoadTestSetup, text: str) -> dict[str, Any]:
    """Return the body of a request as GuideLLM sends it."""
    prompt = {"messages": [{"role": "user", "content": text}]} if setup.chat else {"prompt": text}
    limit = "max_completion_tokens" if setup.chat else "max_tokens"
    body = {
        "model": setup.model,
        **prompt,
        limit: setup.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    return body | ({"ignore_eos": True} if setup.ignore_eos else {})


def make_rows(setup: LoadTestSetup, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return GuideLLM's rows of prompts with one turn.

    The number of output tokens makes GuideLLM send ignore_eos.
    """
    length = {"output_tokens_count": setup.max_tokens} if setup.ignore_eos else {}
    return [{"prompt": text, **length} for text in texts]


def run_level(
    setup: LoadTestSetup,
    concurrency: int,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    texts: Sequence[str] = (),
) -> LevelResult:
    """Run one level; QuantkitError if GuideLLM fails or has no result.

    rows: prompts or conversations. texts: the prompts whose answers are kept.
    """
    prompts, results = folder / "prompts.jsonl", folder / "results.json"
    scenario, log = folder / "scenario.json", folder / "log.txt"
    write_atomic(prompts, "\n".join([*map(json.dumps, rows), ""]).encode())
    results.unlink(missing_ok=True)
    # A file, not arguments: it has the API key.
    content = json.dumps(
        make_scenario(setup, concurrency, prompts, results, keep_texts=bool(texts))
    )
    write_atomic(scenario, content.encode())
    command = [setup.program, "run", "--config", str(scenario), "--disable-console"]
    status = run_process(command, setup.seconds + SLACK_SECONDS, log)
    if status or not results.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        message = " ".join(lines[-3:])[-400:] or "nothing"
        raise QuantkitError(f"{PROGRAM}: exited with {status}; its last output: {message}")
    content_bytes = read_bytes(results, MAX_RESULT_BYTES, QuantkitError)
    values = parse_json(content_bytes, str(results), QuantkitError)
    return parse_result(values, concurrency, str(results), texts)


def run_process(command: Sequence[str], seconds: float, log: Path) -> int:
    """Run a program and its children for at most `seconds`; return its exit status."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=make_environment(),
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise QuantkitError(
                f"{PROGRAM}: still running {SLACK_SECONDS} s after its time limit; check that the "
                "server answers"
            ) from None
        finally:
            with suppress(ProcessLookupError):  # it ended already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def make_environment() -> dict[str, str]:
    """Return this process's environment, without parallel tokenizers in worker processes."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def parse_result(
    values: Mapping[str, Any], concurrency: int, where: str, texts: Sequence[str] = ()
) -> LevelResult:
    """Convert GuideLLM's results of one level with its requests; raises as parse_level."""
    level = parse_level(values, concurrency, where)
    try:
        timed = parse_requests(values["benchmarks"][0])
        answers = parse_answers(values["benchmarks"][0], texts)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise make_format_error(where, fault) from None
    return LevelResult(
        level=level.model_copy(update={"requests": timed.requests}) if timed else level,
        span=(timed.started, timed.ended) if timed else None,
        answers=answers,
    )


def make_format_error(where: str, fault: Exception) -> QuantkitError:
    """Return the error for results in another format."""
    return QuantkitError(
        f"{where}: expected results of GuideLLM 0.8, found others ({fault!r}); install guidellm 0.8"
    )


def parse_level(values: Mapping[str, Any], concurrency: int, where: str) -> LoadLevel:
    """Convert GuideLLM's results of one level.

    Raises QuantkitError for results in another format, or without a completed request.
    """
    try:
        benchmark = values["benchmarks"][0]
        duration, metrics = benchmark["duration"], benchmark["metrics"]
        counts = metrics["request_totals"]
        if not counts["successful"]:
            raise QuantkitError(
                f"expected completed requests at concurrency {concurrency}, found none of "
                f"{counts['total']} ({counts['errored']} errors); try one by hand, and see the "
                "server's log"
            )
        output_tokens = metrics["output_token_count"]["successful"]
        return LoadLevel(
            concurrency=concurrency,
            seconds=duration,
            answered=counts["successful"],
            errored=counts["errored"],
            unfinished=counts["incomplete"],
            ttft_ms=parse_spread(metrics, "time_to_first_token_ms"),
            inter_token_ms=parse_spread(metrics, "inter_token_latency_ms"),
            latency_ms=parse_spread(metrics, "request_latency", 1000.0),
            requests_per_second=counts["successful"] / duration,
            output_tokens_per_second=output_tokens["total_sum"] / duration,
            prompt_tokens=metrics["prompt_token_count"]["successful"]["mean"],
            output_tokens=output_tokens["mean"],
        )
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as fault:
        raise make_format_error(where, fault) from None


def parse_spread(metrics: Mapping[str, Any], name: str, factor: float = 1.0) -> Percentiles:
    """Return mean and quantiles over the completed requests, times `factor`."""
    values = metrics[name]["successful"]
    quantiles = values["percentiles"]
    return Percentiles(
        mean=values["mean"] * factor,
        p50=quantiles["p50"] * factor,
        p90=quantiles["p90"] * factor,
        p99=quantiles["p99"] * factor,
    )
