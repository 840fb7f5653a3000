"""Settings of the gateway. Durations are wall-clock seconds; 0 is allowed only where stated."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import UsageError


class Upstream(BaseModel):
    """A server with OpenAI's API.

    url: ends in /v1. model: replaces the client's model; "" keeps it. key: the API key that is sent
    to it; "" sends none. priorities: whether the request's `priority` is sent, which OpenAI's own
    API rejects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    url: str
    model: str = ""
    key: str = Field(default="", repr=False)
    priorities: bool = False


class Limits(BaseModel):
    """Limits of the gateway; `--limit NAME=VALUE` sets one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    running: int = Field(default=64, ge=1, description="concurrent turns at the engine")
    waiting: int = Field(
        default=1024, ge=0, description="requests in the queue; more are rejected with 429"
    )
    queue_seconds: float = Field(
        default=30, gt=0, description="longest wait in the queue; then 429"
    )
    aging_seconds: float = Field(
        default=5, gt=0, description="waiting time that counts as one priority level"
    )
    per_key: int = Field(
        default=0, ge=0, description="running and waiting turns of one key; 0: no limit"
    )
    deadline: float = Field(default=600, gt=0, description="longest duration of a request")
    silence: float = Field(
        default=120, gt=0, description="longest time without a byte from an engine"
    )
    connect: float = Field(default=5, gt=0, description="timeout for a connection to an upstream")
    heartbeat: float = Field(
        default=15, gt=0, description="idle time after which a stream gets a comment"
    )
    cool_down: float = Field(
        default=5, ge=0, description="time for which a failed upstream is tried last"
    )
    max_tokens: int = Field(
        default=0, ge=0, description="most tokens that a request may generate; 0: no limit"
    )
    max_choices: int = Field(
        default=16, ge=1, description="most choices (n, best_of) that a request may generate"
    )
    connections: int = Field(
        default=4096, ge=16, description="open connections; fewer if files are limited"
    )
    connections_per_address: int = Field(
        default=1024, ge=0, description="open connections of one address; 0: no limit"
    )
    header_bytes: int = Field(
        default=16_384, ge=1024, description="largest head of a request, and largest trailers"
    )
    header_seconds: float = Field(
        default=10, gt=0, description="longest time to receive a request's head"
    )
    max_prompts: int = Field(
        default=2048, ge=1, description="most prompts of a request; each counts as a turn"
    )
    body_seconds: float = Field(
        default=60, gt=0, description="longest time to receive a request's body"
    )
    body_bytes: int = Field(default=8_000_000, ge=1, description="largest request body")
    all_bodies_bytes: int = Field(
        default=100_000_000, ge=1, description="bytes of all request bodies held at once"
    )
    answer_bytes: int = Field(
        default=64_000_000, ge=1, description="largest response that is not a stream"
    )
    all_answers_bytes: int = Field(
        default=256_000_000, ge=1, description="bytes of all such responses held at once"
    )


class GatewaySettings(BaseModel):
    """Settings of a gateway.

    upstreams: the engine, then its fallbacks in order. host: the address it listens on.
    allowed_hosts: names that Host and Origin may have if there are no keys. has_open_metrics:
    /metrics and /ready need no key, wherever it listens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    upstreams: tuple[Upstream, ...]
    limits: Limits = Limits()
    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    has_open_metrics: bool = False


def parse_limits(values: Mapping[str, str]) -> Limits:
    """Return the defaults with `values` applied. UsageError names unknown or invalid ones."""
    try:
        return Limits.model_validate(dict(values))
    except ValidationError as error:
        faults = [
            f"--limit {fault['loc'][0]}: "
            + (
                "unknown"
                if fault["type"] == "extra_forbidden"
                else f"{fault['msg']}, found {fault['input']!r}"
            )
            for fault in error.errors()
        ]
        known = ", ".join(Limits.model_fields)
        raise UsageError("; ".join(faults) + f"; known limits: {known}") from None
