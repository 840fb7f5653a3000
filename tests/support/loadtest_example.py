"""An example load test."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.artifact.loadtest_schema import (
    CacheCounters,
    Conversations,
    GpuReadings,
    LoadLevel,
    LoadTest,
    Requests,
)
from quantkit.serve.loadtest import guidellm

GOLDEN_RESULTS = Path(__file__).parents[1] / "golden/guidellm.json"
"""Results of GuideLLM 0.8.1 with a stub that sends a token every 10 ms, shortened."""


def make_load_test() -> LoadTest:
    """Return a load test with two levels of the golden results."""
    level = guidellm.parse_level(json.loads(GOLDEN_RESULTS.read_text()), 1, "golden")
    second = level.model_copy(
        update={"concurrency": 4, "errored": 1, "cache": CacheCounters(asked=100, hits=25)}
    )
    return LoadTest(
        tool="t", model="<m>", api="completions", data="d", data_sha256="0" * 64, prompts=3,
        max_tokens=8, ignore_eos=True, started="2026-01-01 00:00 UTC", machine="2 cores",
        levels=(level, second),
    )  # fmt: skip


def make_requests(
    latencies: list[float],
    prompt_tokens: list[int | None],
    *,
    cached: list[int | None] | None = None,
    conversations: list[int] | None = None,
    output_tokens: int = 8,
) -> Requests:
    """Return requests that run one after another; latencies in seconds, of which the first token
    takes a tenth.
    """
    n, starts, now = len(latencies), list[float](), 0.0
    for latency in latencies:
        starts.append(now)
        now += latency
    return Requests(
        start_s=tuple(starts), latency_ms=tuple(1000 * x for x in latencies),
        ttft_ms=tuple(100 * x for x in latencies),
        inter_token_ms=tuple(900 * x / 7 for x in latencies),
        prompt_tokens=tuple(prompt_tokens), output_tokens=(output_tokens,) * n,
        cached_tokens=tuple(cached or [None] * n),
        conversation=tuple(conversations or range(n)),
    )  # fmt: skip


def make_level(requests: Requests, gpu: GpuReadings | None = None, errored: int = 0) -> LoadLevel:
    """Return a level of these requests at concurrency 1."""
    n, seconds = len(requests.latency_ms), sum(requests.latency_ms) / 1000
    golden = make_load_test().levels[0]
    tokens = sum(x or 0 for x in requests.output_tokens)
    return golden.model_copy(
        update={
            "answered": n, "errored": errored, "seconds": seconds, "requests": requests,
            "gpu": gpu, "output_tokens_per_second": tokens / seconds,
        }
    )  # fmt: skip


def make_conversations(level: LoadLevel) -> Conversations:
    """Return conversations whose requests are a level's."""
    return Conversations(data_sha256="0" * 64, conversations=2, turns=4, level=level)
