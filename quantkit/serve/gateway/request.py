"""A request: a bounded read of its body, validation, and its body for each upstream."""

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
"""Path -> the parameters that limit the generated tokens. If a request has none of them, the
gateway sets the first to its own limit."""
_NUMBER = re.compile(r"-?[0-9]{1,6}")


class RequestRejected(Exception):
    """A rejected request: HTTP status, error type of OpenAI's API, and message."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.status, self.kind = status, kind
        super().__init__(message)


class ClientDisconnected(Exception):
    """The client disconnected before its request was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyRequest:
    """A validated request.

    path: after /v1, with its slash. priority: 0 is the most urgent. timeout: seconds from its
    arrival to its end.
    """

    path: str
    body: bytes
    values: Mapping[str, Any]
    stream: bool
    priority: int
    timeout: float

    def body_for(self, upstream: Upstream) -> bytes:
        """Return the body for an upstream: the client's own bytes if nothing changes."""
        sent = self.values.get("priority")
        priority = (self.priority or None) if upstream.priorities else None
        if (
            priority == (sent or None)
            and (sent is None or upstream.priorities)
            and not upstream.model
        ):
            return self.body
        values = {name: value for name, value in self.values.items() if name != "priority"}
        values |= {"priority": priority} if priority else {}
        values |= {"model": upstream.model} if upstream.model else {}
        return encode_body(values)


def encode_body(values: Mapping[str, Any]) -> bytes:
    """Encode a body. ASCII: half of a surrogate pair stays an escape."""
    return json.dumps(values).encode()


async def read_body(
    receive: Receive, headers: Mapping[bytes, bytes], max_bytes: int, timeout: float
) -> bytes:
    """Read the whole body.

    Raises RequestRejected if it is larger than `max_bytes` (before reading it if Content-Length
    says so) or not complete after `timeout` seconds.
    """
    size = headers.get(b"content-length", b"")
    if size.isdigit() and int(size) > max_bytes:
        raise RequestRejected(
            413,
            "invalid_request_error",
            f"body: expected at most {max_bytes} bytes, found {int(size)}",
        )
    parts, total = list[bytes](), 0
    try:
        async with asyncio.timeout(timeout):
            async for part in iterate_body(receive):
                parts.append(part)
                total += len(part)
                if total > max_bytes:
                    raise RequestRejected(
                        413,
                        "invalid_request_error",
                        f"body: expected at most {max_bytes} bytes, found more",
                    )
    except TimeoutError:
        message = (
            f"body: expected its end within {timeout:g} s, found {total} bytes; send it at once"
        )
        raise RequestRejected(408, "timeout_error", message) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def iterate_body(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the parts of a body; ClientDisconnected if the client disconnects."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        yield message.get("body", b"")
        more = message.get("more_body", False)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse the JSON object of a body; RequestRejected for anything else."""
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
    """Validate a request; RequestRejected names the first invalid parameter."""
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
    priority = parse_priority(values, headers)
    return ProxyRequest(
        path=path,
        body=body,
        values=values,
        stream=values.get("stream") is True,
        priority=max(key.priority, key.priority if priority is None else priority),
        timeout=parse_timeout(headers, limits.deadline),
    )


def check_limit(values: Mapping[str, Any], name: str, maximum: int) -> None:
    """Raise RequestRejected if a parameter is above `maximum` (0: no limit) or not an integer.

    An engine might accept a float or a string as the number.
    """
    value = values.get(name)
    if not maximum or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
        raise RequestRejected(
            400,
            "invalid_request_error",
            f"{name}: expected an integer from 0 to {maximum}, found {repr(value)[:50]}; lower it",
        )


def parse_priority(values: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> int | None:
    """Return the priority of the X-Priority header or of the body (as in vLLM); None without."""
    text = headers.get(b"x-priority", b"").decode("latin-1").strip()
    value = values.get("priority") if not text else int(text) if _NUMBER.fullmatch(text) else text
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestRejected(
            400,
            "invalid_request_error",
            f"priority: expected 0 (first) to {PRIORITY_LEVELS - 1}, found {repr(value)[:50]}",
        )
    return min(max(value, 0), PRIORITY_LEVELS - 1)


def parse_timeout(headers: Mapping[bytes, bytes], deadline: float) -> float:
    """Return the seconds of the X-Request-Timeout header, at most `deadline`."""
    header = headers.get(b"x-request-timeout")
    if header is None:
        return deadline
    text = header.decode("latin-1")
    try:
        timeout = float(text)
    except ValueError:
        timeout = -1.0
    if not timeout > 0:
        raise RequestRejected(
            400, "invalid_request_error", f"X-Request-Timeout: expected seconds, found {text!r}"
        )
    return min(timeout, deadline)
