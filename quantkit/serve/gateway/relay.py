"""From an upstream to a client: bytes as they come. Who fails before a byte of the answer was sent is replaced.

A request is repeated once at the same upstream when its connection ended without a byte: it may have been an idle one
that the engine was just closing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2

from quantkit.serve.gateway.metrics import Metrics
from quantkit.serve.gateway.request import ProxyRequest
from quantkit.serve.gateway.response import GatewayResponse, Headers
from quantkit.serve.gateway.settings import Limits
from quantkit.serve.gateway.upstreams import Upstreams, UpstreamState

END_MARK = b"[DONE]"
RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses of an engine that says of itself that it cannot answer now; any other is the answer."""
FORWARDED_HEADERS = (b"content-type", b"retry-after")


@dataclass
class UpstreamFailed(Exception):
    """An upstream did not answer: why, and what it said when it said something."""

    reason: str
    told: str
    status: int = 502
    content: bytes = b""
    headers: Headers = ()


@dataclass(frozen=True)
class Relay:
    """What it needs to relay; holds no state of a request."""

    upstreams: Upstreams
    metrics: Metrics
    limits: Limits

    async def run(
        self, asked: ProxyRequest, reply: GatewayResponse, arrived: float, identity: str
    ) -> str:
        """Answer a request, by whoever can. The word for the metrics: "ok", "refused" (by the engine) or "failed"."""
        faults = list[UpstreamFailed]()
        for place, state in enumerate(self.upstreams.order()):
            name = state.upstream.name
            try:
                outcome = await self._patiently(state, asked, reply, arrived, identity)
            except UpstreamFailed as fault:
                self.metrics.failures.labels(name, fault.reason).inc()
                faults.append(fault)
                if not fault.content:
                    self.upstreams.failed(state)
                if reply.answered:
                    break
                continue
            if place:
                self.metrics.failovers.labels(name).inc()
            return outcome
        last = faults[-1]
        if last.content and not reply.answered:
            await reply.whole(last.status, last.content, last.headers)
        else:
            await reply.fail(last.status, "server_error", last.told, retry_after=1)
        return "failed"

    async def _patiently(
        self,
        state: UpstreamState,
        asked: ProxyRequest,
        reply: GatewayResponse,
        arrived: float,
        identity: str,
    ) -> str:
        try:
            return await self._once(state, asked, reply, arrived, identity)
        except UpstreamFailed as fault:
            if fault.reason != "closed" or reply.answered:
                raise
        return await self._once(state, asked, reply, arrived, identity)

    async def _once(
        self,
        state: UpstreamState,
        asked: ProxyRequest,
        reply: GatewayResponse,
        arrived: float,
        identity: str,
    ) -> str:
        body, stream, name = asked.body_for(state.upstream), asked.stream, state.upstream.name
        request = self.upstreams.request(state, asked.path, body, stream=stream, identity=identity)
        try:
            response = await self.upstreams.client.send(request, stream=True)
            try:
                kind = response.headers.get("content-type", "")
                if stream and response.status_code == 200 and kind.startswith("text/event-stream"):
                    await self._stream(response.aiter_raw(), reply, arrived, name)
                    return "ok"
                return await self._whole(response, reply, name)
            finally:
                await response.aclose()
        except httpx2.TransportError as fault:
            raise classify_error(fault, name) from None

    async def _stream(
        self, pieces: AsyncIterator[bytes], reply: GatewayResponse, arrived: float, name: str
    ) -> None:
        """Pieces as they come. One that ends without its end mark was cut, however politely."""
        metrics, before = self.metrics, 0.0
        async for piece in pieces:
            now = time.monotonic()
            if before:
                metrics.gap.observe(now - before)
            else:
                metrics.ttft.observe(now - arrived)
            before = now
            metrics.events.inc(piece.count(b"\n\n"))
            await reply.part(piece)
        if END_MARK not in reply.tail:
            raise UpstreamFailed(
                "cut", f"{name}: the stream ended before its answer did; ask again"
            )
        count_tokens(metrics, reply.tail)
        await reply.end()

    async def _whole(self, response: httpx2.Response, reply: GatewayResponse, name: str) -> str:
        """An answer that is no stream, held back until it is complete: half of one can still be replaced."""
        parts, size = list[bytes](), 0
        async for part in response.aiter_raw():
            parts.append(part)
            size += len(part)
            if size > self.limits.answer_bytes:
                raise UpstreamFailed(
                    "large",
                    f"{name}: an answer of more than {self.limits.answer_bytes} bytes; ask for less",
                )
        content, status = b"".join(parts), response.status_code
        headers = [
            (key.lower(), value)
            for key, value in response.headers.raw
            if key.lower() in FORWARDED_HEADERS
        ]
        if status in RETRYABLE_STATUSES:
            raise UpstreamFailed(
                f"status {status}", f"{name}: status {status}", status, content or b"{}", headers
            )
        count_tokens(self.metrics, content)
        await reply.whole(status, content, headers)
        return "ok" if status < 400 else "refused"


def classify_error(fault: httpx2.TransportError, name: str) -> UpstreamFailed:
    """What became of a connection, in a word and in a sentence."""
    if isinstance(fault, httpx2.ConnectError | httpx2.ConnectTimeout):
        return UpstreamFailed("unreachable", f"{name}: not reachable; try again later", 503)
    if isinstance(fault, httpx2.TimeoutException):
        return UpstreamFailed("silent", f"{name}: said nothing for too long; try again later", 504)
    return UpstreamFailed("closed", f"{name}: the connection broke; ask again")


def count_tokens(metrics: Metrics, text: bytes) -> None:
    """Tokens by the usage an answer tells, looked up near its end instead of parsing it."""
    for kind, word in (("prompt", b'"prompt_tokens":'), ("completion", b'"completion_tokens":')):
        place = text.rfind(word)
        if place >= 0:
            digits = (
                text[place + len(word) : place + len(word) + 20]
                .lstrip()
                .partition(b",")[0]
                .partition(b"}")[0]
            )
            if digits.strip().isdigit():
                metrics.tokens.labels(kind).inc(int(digits))
