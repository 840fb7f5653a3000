"""Schema of loadtest.json, and its validation.

Times are in milliseconds unless a name says otherwise, throughput is per second of the level's own
time. Version 1 has no requests, no GPU figures, no conversations and no answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantkit.artifact.layout import LOADTEST_VERSION
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
MAX_REQUESTS, MAX_ANSWERS, MAX_ANSWER_CHARACTERS = 1_000_000, 1_000, 4_000


class FrozenModel(BaseModel):
    """Base of the schema's classes: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Percentiles(FrozenModel):
    """Mean and percentiles over the answered requests."""

    mean: NonNegativeFloat
    p50: NonNegativeFloat
    p90: NonNegativeFloat
    p99: NonNegativeFloat


class CacheCounters(FrozenModel):
    """Token counters of the engine's prefix cache during a level."""

    asked: NonNegativeFloat
    hits: NonNegativeFloat

    @property
    def rate(self) -> float | None:
        """Share of the prompts' tokens that were served from the cache; None without requests."""
        return self.hits / self.asked if self.asked else None


class Requests(FrozenModel):
    """The completed requests of a level in the order of their starts, one column per figure.

    start_s: from the start of the level's first request. ttft_ms: None without a streamed token.
    cached_tokens: prompt tokens that the server's usage reports as cached, None if it reports none.
    conversation: requests of one conversation have the same number.
    """

    start_s: Annotated[tuple[NonNegativeFloat, ...], Field(max_length=MAX_REQUESTS)]
    latency_ms: tuple[NonNegativeFloat, ...]
    ttft_ms: tuple[NonNegativeFloat | None, ...]
    inter_token_ms: tuple[NonNegativeFloat | None, ...]
    prompt_tokens: tuple[NonNegativeInt | None, ...]
    output_tokens: tuple[NonNegativeInt | None, ...]
    cached_tokens: tuple[NonNegativeInt | None, ...]
    conversation: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def check_lengths(self) -> Requests:
        """Check that every column has a value per request."""
        lengths = {len(getattr(self, name)) for name in type(self).model_fields}
        if len(lengths) > 1:
            raise ValueError(f"expected columns of one length, found {sorted(lengths)}")
        return self


class GpuReadings(FrozenModel):
    """Readings of a metrics endpoint while requests were generating, in the order of time.

    utilization: share of time that a GPU was busy, mean over the GPUs; memory_gb, watts: sums over
    them; cache: share of the KV cache in use. A figure that the endpoint lacks has no readings.
    """

    source: str  # "DCGM exporter", "vLLM", "SGLang"
    gpus: NonNegativeInt
    utilization: Annotated[tuple[Share, ...], Field(max_length=MAX_REQUESTS)] = ()
    memory_gb: tuple[NonNegativeFloat, ...] = ()
    watts: tuple[NonNegativeFloat, ...] = ()
    cache: tuple[Share, ...] = ()


class Answer(FrozenModel):
    """The answer to a prompt; prompt: its number in the data set."""

    prompt: NonNegativeInt
    text: Annotated[str, Field(max_length=MAX_ANSWER_CHARACTERS)]


class LoadLevel(FrozenModel):
    """Results at one concurrency. inter_token: the mean gap between tokens, per answer."""

    concurrency: Annotated[int, Field(ge=1)]
    seconds: NonNegativeFloat
    answered: NonNegativeInt
    errored: NonNegativeInt
    unfinished: NonNegativeInt
    ttft_ms: Percentiles
    inter_token_ms: Percentiles
    latency_ms: Percentiles
    requests_per_second: NonNegativeFloat
    output_tokens_per_second: NonNegativeFloat
    prompt_tokens: NonNegativeFloat  # mean
    output_tokens: NonNegativeFloat  # mean
    cache: CacheCounters | None = None
    requests: Requests | None = None
    gpu: GpuReadings | None = None  # None: not measured


class Conversations(FrozenModel):
    """Conversations of several turns with a common system prompt, at one concurrency."""

    data_sha256: str
    conversations: NonNegativeInt
    turns: NonNegativeInt
    level: LoadLevel


class LoadTest(FrozenModel):
    """One run against one server."""

    version: Literal[1, 2] = LOADTEST_VERSION
    tool: str
    model: str
    api: Literal["completions", "chat"]
    data: str
    data_sha256: str
    prompts: NonNegativeInt
    max_tokens: NonNegativeInt
    ignore_eos: bool
    started: str  # UTC
    machine: str  # the load generator's
    note: str = Field(default="", max_length=500)  # what served, in the operator's words
    levels: Annotated[tuple[LoadLevel, ...], Field(min_length=1)]
    conversations: Conversations | None = None
    answers: Annotated[tuple[Answer, ...], Field(max_length=MAX_ANSWERS)] = ()  # of the first level

    def comparable(self, other: LoadTest) -> str | None:
        """Return why two runs cannot be compared; None if they sent the same requests."""
        for name in ("api", "data_sha256", "max_tokens", "ignore_eos"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine} and {theirs}"
        return None


def read_load_test(path: Path) -> LoadTest:
    """Read a load test from a file; raises ArtifactError."""
    return parse_load_test(read_json(path, ArtifactError), str(path))


def find_load_test_faults(path: Path) -> Iterator[str]:
    """Yield why a file is not a load test."""
    try:
        read_load_test(path)
    except ArtifactError as fault:
        yield str(fault)


def parse_load_test(values: Mapping[str, object], where: str) -> LoadTest:
    """Validate a stored load test; raises ArtifactError with the wrong key."""
    try:
        return LoadTest.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        location = ".".join(map(str, fault["loc"]))
        raise ArtifactError(
            f"{where}: {location}: {fault['msg']}; run the load test again"
        ) from None
