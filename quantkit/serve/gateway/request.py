"""One request: read within bounds, checked once, and its body as each upstream should see it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from quantkit.serve.gateway.admission_policy import PRIORITY_LEVELS
from quantkit.serve.gateway.api_keys import ApiKey
from quantkit.serve.gateway.settings import Limits, Upstream

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
TOKEN_LIMITS: Mapping[str, tuple[str, ...]] = {
    "/completions": ("max_tokens",),
    "/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/responses": ("max_output_tokens",),
    "/embeddings": (),
}
"""Path -> the words that bound an answer there; where none is said, the first says the gateway's limit."""
_NUMBER = re.compile(r"-?[0-9]{1,6}")


class RequestRejected(Exception):
    """A request that is not served: HTTP status, OpenAI's word for the kind of fault, and a sentence."""

    def __init__(self, status: int, kind: str, told: str) -> None:
        self.status, self.kind = status, kind
        super().__init__(told)


class ClientDisconnected(Exception):
    """The client left before its request was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyRequest:
    """A request. path: below /v1, with its slash; priority: 0 is the most urgent; seconds: what it may take in all."""

    path: str
    body: bytes
    values: Mapping[str, Any]
    stream: bool
    priority: int
    seconds: float

    def body_for(self, upstream: Upstream) -> bytes:
        """The client's own bytes where nothing has to be changed."""
        told = self.values.get("priority")
        wanted = (self.priority or None) if upstream.priorities else None
        if (
            wanted == (told or None)
            and (told is None or upstream.priorities)
            and not upstream.model
        ):
            return self.body
        values = {name: value for name, value in self.values.items() if name != "priority"}
        values |= {"priority": wanted} if wanted else {}
        values |= {"model": upstream.model} if upstream.model else {}
        return encode_body(values)


def encode_body(values: Mapping[str, Any]) -> bytes:
    """A body. ASCII: half a surrogate stays the escape that it was."""
    return json.dumps(values).encode()


async def read_body(
    receive: Receive, headers: Mapping[bytes, bytes], most: int, seconds: float
) -> bytes:
    """The whole body; Refused when it does not come in time, or is larger than `most`, unread where it says so."""
    size = headers.get(b"content-length", b"")
    if size.isdigit() and int(size) > most:
        raise RequestRejected(
            413, "invalid_request_error", f"body: expected at most {most} bytes, found {int(size)}"
        )
    parts, total = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            async for part in iterate_body(receive):
                parts.append(part)
                total += len(part)
                if total > most:
                    raise RequestRejected(
                        413,
                        "invalid_request_error",
                        f"body: expected at most {most} bytes, found more",
                    )
    except TimeoutError:
        told = f"body: expected its end within {seconds:g} s, found {total} bytes; send it at once"
        raise RequestRejected(408, "timeout_error", told) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def iterate_body(receive: Receive) -> AsyncIterator[bytes]:
    """A body as it comes; Gone when its client leaves."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        yield message.get("body", b"")
        more = message.get("more_body", False)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; Refused for anything else."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as fault:
        raise RequestRejected(
            400, "invalid_request_error", f"body: expected JSON, found {fault}"
        ) from None
    if not isinstance(values, dict):
        raise RequestRejected(
            400, "invalid_request_error", f"body: expected an object, found {type(values).__name__}"
        )
    return values


def parse_request(
    path: str, body: bytes, headers: Mapping[bytes, bytes], key: ApiKey, limits: Limits
) -> ProxyRequest:
    """A checked request; Refused says what is wrong."""
    values = parse_object(body)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        check_limit(values, name, limits.max_tokens)
    for name in ("n", "best_of"):
        check_limit(values, name, limits.max_choices)
    if (
        limits.max_tokens
        and TOKEN_LIMITS[path]
        and all(values.get(name) is None for name in TOKEN_LIMITS[path])
    ):
        values[TOKEN_LIMITS[path][0]] = limits.max_tokens
        body = encode_body(values)
    wanted = parse_priority(values, headers)
    return ProxyRequest(
        path=path,
        body=body,
        values=values,
        stream=values.get("stream") is True,
        priority=max(key.priority, key.priority if wanted is None else wanted),
        seconds=parse_timeout(headers, limits.deadline),
    )


def check_limit(values: Mapping[str, Any], name: str, most: int) -> None:
    """Refuse a value above `most`, and what an engine might take for such a number; 0 is no bound."""
    value = values.get(name)
    if not most or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        found = repr(value)[:50]
        raise RequestRejected(
            400,
            "invalid_request_error",
            f"{name}: expected a whole number, at most {most}, found {found}; ask for less",
        )


def parse_priority(values: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> int | None:
    """What the client says, by header or in the body as vLLM has it; None when it says nothing."""
    told = headers.get(b"x-priority", b"").decode("latin-1").strip()
    value = values.get("priority") if not told else int(told) if _NUMBER.fullmatch(told) else told
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        found = repr(value)[:50]
        raise RequestRejected(
            400,
            "invalid_request_error",
            f"priority: expected 0 (first) to {PRIORITY_LEVELS - 1}, found {found}",
        )
    return min(max(value, 0), PRIORITY_LEVELS - 1)


def parse_timeout(headers: Mapping[bytes, bytes], most: float) -> float:
    """X-Request-Timeout, in seconds, where it asks for less than the gateway allows."""
    told = headers.get(b"x-request-timeout")
    if told is None:
        return most
    text = told.decode("latin-1")
    try:
        wanted = float(text)
    except ValueError:
        wanted = -1.0
    if not wanted > 0:
        raise RequestRejected(
            400, "invalid_request_error", f"X-Request-Timeout: expected seconds, found {text!r}"
        )
    return min(wanted, most)
