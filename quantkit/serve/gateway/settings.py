"""What an operator may set. Seconds are wall-clock; 0 is allowed only where it says so."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import UsageError


class Upstream(BaseModel):
    """A server that speaks OpenAI's API. `url` ends in /v1; model "" passes the client's word on; key "" sends none.

    With `priorities` the server is told how urgent a request is: OpenAI's own API refuses the word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    url: str
    model: str = ""
    key: str = Field(default="", repr=False)
    priorities: bool = False


class Limits(BaseModel):
    """Bounds of the gateway; `--limit NAME=VALUE` sets one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    running: int = Field(default=64, ge=1, description="requests at the engine at once")
    waiting: int = Field(
        default=1024, ge=0, description="requests in the queue; more are answered 429"
    )
    queue_seconds: float = Field(
        default=30, gt=0, description="longest wait in the queue; then 429"
    )
    aging_seconds: float = Field(
        default=5, gt=0, description="waiting this long counts as one level of priority"
    )
    per_key: int = Field(
        default=0, ge=0, description="requests of one key, running and waiting; 0: no bound"
    )
    deadline: float = Field(default=600, gt=0, description="seconds a request may take in all")
    silence: float = Field(default=120, gt=0, description="seconds an engine may say nothing")
    connect: float = Field(default=5, gt=0, description="seconds until a connection must stand")
    heartbeat: float = Field(
        default=15, gt=0, description="seconds of quiet after which a stream gets a comment"
    )
    cool_down: float = Field(default=5, ge=0, description="seconds a failed upstream is asked last")
    max_tokens: int = Field(
        default=0, ge=0, description="most tokens a request may ask for; 0: no bound"
    )
    max_choices: int = Field(
        default=16, ge=1, description="most answers (n, best_of) a request may ask for"
    )
    body_seconds: float = Field(
        default=60, gt=0, description="seconds a request's body may take to come"
    )
    body_bytes: int = Field(default=8_000_000, ge=1, description="largest request")
    answer_bytes: int = Field(
        default=64_000_000, ge=1, description="largest answer that is no stream"
    )


class GatewaySettings(BaseModel):
    """A gateway: the engine first, then who stands in for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upstreams: tuple[Upstream, ...]
    limits: Limits = Limits()


def limits_from(values: Mapping[str, str]) -> Limits:
    """The defaults with these changed; UsageError names what is unknown or out of range."""
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
