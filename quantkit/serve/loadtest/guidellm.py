"""GuideLLM as a process of its own: it pins another click than quantkit's other packages allow, and loads torch.

One process per level, so that the engine's counters can be read between them.
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

from quantkit.artifact.loadtest_schema import LoadLevel, Percentiles
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.files import read_json, write_atomic

PROGRAM = "guidellm"
SLACK_SECONDS = 180
"""What it may take beyond the time that a level was given: it starts worker processes and loads a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class LoadTestSetup:
    """How it asks. tokenizer: a folder or a hub id, for counting where a server tells no usage; key: "" sends none."""

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


def find_program(named: str) -> str:
    """The program to run; UsageError when it is not there."""
    found = shutil.which(named)
    if found is None:
        raise UsageError(
            f"{named}: expected GuideLLM, found none; make an environment for it (python -m venv ENV; "
            "ENV/bin/pip install guidellm) and name it: --guidellm ENV/bin/guidellm"
        )
    return found


def version(found: str) -> str:
    """The tool's name and version."""
    told = subprocess.run(
        [found, "--version"], capture_output=True, text=True, timeout=SLACK_SECONDS, check=False
    )
    return " ".join(told.stdout.split()) or PROGRAM


def scenario(
    setup: LoadTestSetup, concurrency: int, prompts: Path, results: Path
) -> dict[str, Any]:
    """GuideLLM's own words (0.8) for one level."""
    body = {"temperature": 0, "ignore_eos": setup.ignore_eos}
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
        "metrics": {"kind": "generative", "sample_size": 0},
    }
    return {"spec": spec}


def request(setup: LoadTestSetup, text: str) -> dict[str, Any]:
    """The body of a request as GuideLLM sends it."""
    asked = {"messages": [{"role": "user", "content": text}]} if setup.chat else {"prompt": text}
    most = "max_completion_tokens" if setup.chat else "max_tokens"
    body = {"model": setup.model, **asked, most: setup.max_tokens, "temperature": 0, "stream": True}
    return body | ({"ignore_eos": True} if setup.ignore_eos else {})


def run(setup: LoadTestSetup, concurrency: int, texts: Sequence[str], folder: Path) -> LoadLevel:
    """One level. QuantkitError when the tool fails, says nothing or finds no answer."""
    prompts, results, told = (
        folder / "prompts.jsonl",
        folder / "results.json",
        folder / "scenario.json",
    )
    rows = [json.dumps({"prompt": text, "output_tokens_count": setup.max_tokens}) for text in texts]
    write_atomic(prompts, "\n".join([*rows, ""]).encode())
    results.unlink(missing_ok=True)
    write_atomic(
        told, json.dumps(scenario(setup, concurrency, prompts, results)).encode()
    )  # the key is in it
    words = [setup.program, "run", "--config", str(told), "--disable-console"]
    log = folder / "log.txt"
    ended = within(words, setup.seconds + SLACK_SECONDS, log)
    if ended or not results.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " ".join(lines[-3:])[-400:] or "nothing"
        raise QuantkitError(f"{PROGRAM}: ended with {ended}, and said: {said}")
    return level(read_json(results, QuantkitError), concurrency, str(results))


def within(words: Sequence[str], seconds: float, log: Path) -> int:
    """Run a program and everything it starts, at most so long; its exit status."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            words,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=surroundings(),
            start_new_session=True,
        )
        try:
            return started.wait(seconds)
        except subprocess.TimeoutExpired:
            raise QuantkitError(
                f"{PROGRAM}: did not end {SLACK_SECONDS} s after its time; does the server answer?"
            ) from None
        finally:
            with suppress(ProcessLookupError):  # it is gone where everything went well
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def surroundings() -> dict[str, str]:
    """This process's environment; a tokenizer's folder is on disk, and nothing is looked up on the way."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false"}


def level(found: Mapping[str, Any], concurrency: int, where: str) -> LoadLevel:
    """A level in quantkit's words; QuantkitError for results of another shape, or without one answer."""
    try:
        benchmark = found["benchmarks"][0]
        metrics, counts = benchmark["metrics"], benchmark["metrics"]["request_totals"]
        if not counts["successful"]:
            raise QuantkitError(
                f"no request of {counts['total']} was answered at {concurrency} at once "
                f"({counts['errored']} errors); try one by hand, and see the server's messages"
            )
        return LoadLevel(
            concurrency=concurrency,
            seconds=benchmark["duration"],
            answered=counts["successful"],
            errored=counts["errored"],
            unfinished=counts["incomplete"],
            ttft_ms=spread(metrics, "time_to_first_token_ms"),
            inter_token_ms=spread(metrics, "inter_token_latency_ms"),
            latency_ms=spread(metrics, "request_latency", 1000.0),
            requests_per_second=counts["successful"] / benchmark["duration"],
            output_tokens_per_second=metrics["output_token_count"]["successful"]["total_sum"]
            / benchmark["duration"],
            prompt_tokens=metrics["prompt_token_count"]["successful"]["mean"],
            output_tokens=metrics["output_token_count"]["successful"]["mean"],
        )
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as fault:
        raise QuantkitError(
            f"{where}: expected results of GuideLLM 0.8, found others ({fault!r}); install guidellm 0.8"
        ) from None


def spread(metrics: Mapping[str, Any], name: str, factor: float = 1.0) -> Percentiles:
    """Mean and quantiles of the answered requests, times `factor`."""
    found = metrics[name]["successful"]
    quantiles = found["percentiles"]
    return Percentiles(
        mean=found["mean"] * factor,
        p50=quantiles["p50"] * factor,
        p90=quantiles["p90"] * factor,
        p99=quantiles["p99"] * factor,
    )
