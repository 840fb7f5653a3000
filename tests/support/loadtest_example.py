"""An example load test."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.artifact.loadtest_schema import CacheCounters, LoadTest
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
