"""A load test: one level of concurrency after another, with the engine's counters of each."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.serve.loadtest import engine, guidellm
from quantkit.serve.loadtest.prompts import Prompts

WARMUP_REQUESTS = 4
REQUESTS_PER_CLIENT = 4
"""The fewest requests per concurrent client: with fewer, start and end of a level dominate."""


def run_load_test(
    setup: guidellm.LoadTestSetup,
    prompts: Prompts,
    concurrencies: Sequence[int],
    metrics: str,
    log: Callable[[str], None],
) -> LoadTest:
    """Run every level. metrics: the address of the engine's counters."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    levels: list[LoadLevel] = []
    body = guidellm.make_request_body(setup, prompts.texts[0])
    engine.check_endpoint(setup.url, setup.key, setup.path, body, setup.seconds)
    with tempfile.TemporaryDirectory(prefix="quantkit-loadtest-") as name:
        folder = Path(name)
        log("warming up")
        warmup = replace(setup, requests=WARMUP_REQUESTS)
        guidellm.run_level(warmup, 1, prompts.take(WARMUP_REQUESTS), folder)
        for concurrency in concurrencies:
            requests = max(setup.requests, REQUESTS_PER_CLIENT * concurrency)
            before = engine.read_cache_counters(metrics)
            # One request per row, and GuideLLM reads ahead: some more rows than requests.
            level = guidellm.run_level(
                replace(setup, requests=requests),
                concurrency,
                prompts.take(requests + 2 * concurrency),
                folder,
            )
            cache = engine.subtract_counters(before, engine.read_cache_counters(metrics))
            levels.append(level.model_copy(update={"cache": cache}))
            log(
                f"concurrency {concurrency}: {level.output_tokens_per_second:,.1f} tokens/s, "
                f"{level.answered} completed"
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
    )


def describe_machine() -> str:
    """Describe the client's machine: cores and kind of processor, without a host name."""
    return f"{os.cpu_count()} cores, {platform.machine()}"
