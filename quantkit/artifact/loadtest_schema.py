"""What is kept of a load test, as JSON, and whether a file is one.

Times in milliseconds, throughput per second of the level's own time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.artifact.layout import LOADTEST_VERSION
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FrozenModel(BaseModel):
    """Every part of it: frozen, and nothing unknown in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Percentiles(FrozenModel):
    """Of the requests that were answered."""

    mean: Amount
    p50: Amount
    p90: Amount
    p99: Amount


class CacheCounters(FrozenModel):
    """The engine's prefix cache during a level, in tokens, as its own counters tell."""

    asked: Amount
    hits: Amount

    @property
    def rate(self) -> float | None:
        """Share of the prompts' tokens that did not have to be computed; None when nothing was asked."""
        return self.hits / self.asked if self.asked else None


class LoadLevel(FrozenModel):
    """So many requests at once. inter_token: of each answer the mean gap between its tokens."""

    concurrency: Annotated[int, Field(ge=1)]
    seconds: Amount
    answered: Count
    errored: Count
    unfinished: Count
    ttft_ms: Percentiles
    inter_token_ms: Percentiles
    latency_ms: Percentiles
    requests_per_second: Amount
    output_tokens_per_second: Amount
    prompt_tokens: Amount  # mean
    output_tokens: Amount  # mean
    cache: CacheCounters | None = None


class LoadTest(FrozenModel):
    """One run against one server."""

    version: Literal[1] = LOADTEST_VERSION
    tool: str
    model: str
    api: Literal["completions", "chat"]
    data: str
    data_sha256: str
    prompts: Count
    max_tokens: Count
    ignore_eos: bool
    started: str  # UTC
    machine: str  # of the side that asked
    note: str = Field(default="", max_length=500)  # what served, in the operator's words
    levels: Annotated[tuple[LoadLevel, ...], Field(min_length=1)]

    def comparable(self, other: LoadTest) -> str | None:
        """Why two runs cannot be laid side by side; None when they asked the same in the same way."""
        for name in ("api", "data_sha256", "max_tokens", "ignore_eos"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine} and {theirs}"
        return None


def read_load_test(path: Path) -> LoadTest:
    """The run in a file; ArtifactError when that is none."""
    return parse_load_test(read_json(path, ArtifactError), str(path))


def find_load_test_faults(path: Path) -> Iterator[str]:
    """Why a file is no load test's."""
    try:
        read_load_test(path)
    except ArtifactError as fault:
        yield str(fault)


def parse_load_test(values: Mapping[str, object], where: str) -> LoadTest:
    """A stored run; ArtifactError names the key that is wrong."""
    try:
        return LoadTest.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ArtifactError(f"{where}: {place}: {fault['msg']}; run the load test again") from None
