"""A load test: one level of concurrency after another, with the engine's counters of each."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.artifact.loadtest_schema import Answer, Conversations, LoadLevel, LoadTest
from quantkit.errors import QuantkitError
from quantkit.serve.loadtest import engine, guidellm
from quantkit.serve.loadtest.conversations import (
    MAX_AT_ONCE,
    TURNS,
    hash_conversations,
    make_conversations,
)
from quantkit.serve.loadtest.gpu_metrics import GpuSampler
from quantkit.serve.loadtest.prompts import Prompts

WARMUP_REQUESTS = 4
REQUESTS_PER_CLIENT = 4
"""The fewest requests per concurrent client: with fewer, start and end of a level dominate."""


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Addresses of metrics: the engine's counters, and a DCGM exporter's ("" for none)."""

    engine: str
    gpu: str = ""

    def list_urls(self) -> tuple[str, ...]:
        """Return those that exist."""
        return tuple(filter(None, (self.engine, self.gpu)))


def run_load_test(
    setup: guidellm.LoadTestSetup,
    prompts: Prompts,
    concurrencies: Sequence[int],
    endpoints: Endpoints,
    n_conversations: int,
    log: Callable[[str], None],
) -> LoadTest:
    """Run every level, then the conversations."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    levels: list[LoadLevel] = []
    answers: tuple[Answer, ...] = ()
    body = guidellm.make_request_body(setup, prompts.texts[0])
    engine.check_endpoint(setup.url, setup.key, setup.path, body, setup.seconds)
    with tempfile.TemporaryDirectory(prefix="quantkit-loadtest-") as name:
        folder = Path(name)
        log("warming up")
        warmup = replace(setup, requests=WARMUP_REQUESTS)
        rows = guidellm.make_rows(setup, prompts.take(WARMUP_REQUESTS))
        guidellm.run_level(warmup, 1, rows, folder)
        for concurrency in concurrencies:
            requests = max(setup.requests, REQUESTS_PER_CLIENT * concurrency)
            # One request per row, and GuideLLM reads ahead: some more rows than requests.
            rows = guidellm.make_rows(setup, prompts.take(requests + 2 * concurrency))
            level_setup = replace(setup, requests=requests)
            texts = () if levels else prompts.texts
            result = measure_level(level_setup, concurrency, rows, folder, endpoints, texts)
            levels.append(result.level)
            answers = answers or result.answers
            log(
                f"concurrency {concurrency}: {result.level.output_tokens_per_second:,.1f} "
                f"tokens/s, {result.level.answered} completed"
            )
        at_once = min(MAX_AT_ONCE, n_conversations, max(concurrencies))
        conversations = (
            run_conversations(setup, n_conversations, at_once, folder, endpoints, log)
            if n_conversations
            else None
        )
    return LoadTest(
        tool=guidellm.read_version(setup.program),
        model=setup.model,
        api="chat" if setup.chat else "completions",
        data=prompts.name,
        data_sha256=prompts.sha256,
        prompts=len(prompts.texts),
        max_tokens=setup.max_tokens,
        ignore_eos=setup.ignore_eos,
        started=started,
        machine=describe_machine(),
        levels=tuple(levels),
        conversations=conversations,
        answers=answers,
    )


def measure_level(
    setup: guidellm.LoadTestSetup,
    concurrency: int,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    endpoints: Endpoints,
    texts: Sequence[str] = (),
) -> guidellm.LevelResult:
    """Run a level; read the engine's counters around it, and GPU figures while it generates."""
    before = engine.read_cache_counters(endpoints.engine)
    with GpuSampler(endpoints.list_urls()) as sampler:
        result = guidellm.run_level(setup, concurrency, rows, folder, texts)
    cache = engine.subtract_counters(before, engine.read_cache_counters(endpoints.engine))
    gpu = sampler.select_readings(*result.span) if result.span else None
    level = result.level.model_copy(update={"cache": cache, "gpu": gpu})
    return replace(result, level=level)


def run_conversations(
    setup: guidellm.LoadTestSetup,
    count: int,
    at_once: int,
    folder: Path,
    endpoints: Endpoints,
    log: Callable[[str], None],
) -> Conversations | None:
    """Run conversations; None if none of their requests is completed, which the log says.

    A model whose context is too short for them still gets the rest of its load test.
    """
    rows = make_conversations(count, setup.max_tokens, ignore_eos=setup.ignore_eos)
    turns_setup = replace(setup, requests=count * TURNS)
    try:
        level = measure_level(turns_setup, at_once, rows, folder, endpoints).level
    except QuantkitError as fault:
        log(f"conversations: not measured: {fault}")
        return None
    log(f"conversations: {count} of {TURNS} turns, {level.answered} requests completed")
    return Conversations(
        data_sha256=hash_conversations(rows), conversations=count, turns=TURNS, level=level
    )


def describe_machine() -> str:
    """Describe the client's machine: cores and kind of processor, without a host name."""
    return f"{os.cpu_count()} cores, {platform.machine()}"
