"""A whole load test: level after level, the engine's counters read around each, one result."""

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

WARM_REQUESTS = 4
PER_LEVEL = 4
"""At least so many requests per place: fewer would measure the start and the end of a level."""


def run_load_test(
    setup: guidellm.LoadTestSetup,
    prompts: Prompts,
    concurrencies: Sequence[int],
    metrics: str,
    tell: Callable[[str], None],
) -> LoadTest:
    """Ask at each level. `metrics`: where the engine tells its counters."""
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    levels: list[LoadLevel] = []
    engine.check_answers(
        setup.url, setup.key, setup.path, guidellm.request(setup, prompts.texts[0]), setup.seconds
    )
    with tempfile.TemporaryDirectory(prefix="quantkit-loadtest-") as made:
        folder = Path(made)
        tell("warming up")
        guidellm.run(replace(setup, requests=WARM_REQUESTS), 1, prompts.rows(WARM_REQUESTS), folder)
        for concurrency in concurrencies:
            requests = max(setup.requests, PER_LEVEL * concurrency)
            before = engine.read_cache_counters(metrics)
            # what guidellm has no rows for it does not ask; some more, because it reads ahead
            found = guidellm.run(
                replace(setup, requests=requests),
                concurrency,
                prompts.rows(requests + 2 * concurrency),
                folder,
            )
            cache = engine.during(before, engine.read_cache_counters(metrics))
            levels.append(found.model_copy(update={"cache": cache}))
            tell(
                f"{concurrency} at once: {found.output_tokens_per_second:,.1f} tokens/s, {found.answered} answered"
            )
    return LoadTest(
        tool=guidellm.version(setup.program),
        model=setup.model,
        api="chat" if setup.chat else "completions",
        data=prompts.name,
        data_sha256=prompts.sha256,
        prompts=len(prompts.texts),
        max_tokens=setup.max_tokens,
        ignore_eos=setup.ignore_eos,
        started=started,
        machine=machine(),
        levels=tuple(levels),
    )


def machine() -> str:
    """The side that asked, in words: cores and kind of processor; no name of a host."""
    return f"{os.cpu_count()} cores, {platform.machine()}"
