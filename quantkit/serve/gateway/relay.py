"""Forwarding of a request to an upstream, and of its bytes to the client as they arrive.

If an upstream fails before a byte of the content was sent, the next one is tried. If its connection
closes before any byte, the request is repeated once at the same upstream: the engine may have
closed an idle connection at that moment.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx2

from quantkit.serve.gateway.bodies import ByteBudget, HeldBytes
from quantkit.serve.gateway.metrics import Metrics
from quantkit.serve.gateway.request import ProxyRequest
from quantkit.serve.gateway.response import GatewayResponse, Headers
from quantkit.serve.gateway.settings import Limits
from quantkit.serve.gateway.upstreams import Upstreams, UpstreamState

RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses by which an engine reports that it cannot answer now; any other is the response."""
FORWARDED_HEADERS = (b"content-type", b"retry-after")


@dataclass
class UpstreamFailed(Exception):
    """A failed upstream: reason (a label of the metrics), message, and its response if any."""

    reason: str
    message: str
    status: int = 502
    content: bytes = b""
    headers: Headers = ()


@dataclass(frozen=True)
class Relay:
    """Forwards requests. answers: the budget of responses that are held until they are complete."""

    upstreams: Upstreams
    metrics: Metrics
    limits: Limits
    answers: ByteBudget

    async def forward(
        self, request: ProxyRequest, response: GatewayResponse, arrived: float, request_id: str
    ) -> str:
        """Answer a request by the first upstream that can.

        Returns the outcome for the metrics: "ok", "refused" (by the engine) or "failed". Raises
        BudgetExceeded if a whole response does not fit into the budget.
        """
        held = HeldBytes(self.answers)
        try:
            return await self._try_upstreams(request, response, arrived, request_id, held)
        finally:
            held.release()

    async def _try_upstreams(
        self,
        request: ProxyRequest,
        response: GatewayResponse,
        arrived: float,
        request_id: str,
        held: HeldBytes,
    ) -> str:
        faults = list[UpstreamFailed]()
        for index, state in enumerate(self.upstreams.list_by_health()):
            name = state.upstream.name
            try:
                outcome = await self._send_with_retry(
                    state, request, response, arrived, request_id, held
                )
            except UpstreamFailed as fault:
                self.metrics.failures.labels(name, fault.reason).inc()
                faults.append(fault)
                if not fault.content:
                    self.upstreams.mark_failed(state)
                if response.has_content:
                    break
                continue
            if index:
                self.metrics.failovers.labels(name).inc()
            return outcome
        last = faults[-1]
        if last.content and not response.has_content:
            await response.send_whole(last.status, last.content, last.headers)
        else:
            await response.send_error(last.status, "server_error", last.message, retry_after=1)
        return "failed"

    async def _send_with_retry(
        self,
        state: UpstreamState,
        request: ProxyRequest,
        response: GatewayResponse,
        arrived: float,
        request_id: str,
        held: HeldBytes,
    ) -> str:
        try:
            return await self._send(state, request, response, arrived, request_id, held)
        except UpstreamFailed as fault:
            if fault.reason != "closed" or response.has_content:
                raise
        return await self._send(state, request, response, arrived, request_id, held)

    async def _send(
        self,
        state: UpstreamState,
        request: ProxyRequest,
        response: GatewayResponse,
        arrived: float,
        request_id: str,
        held: HeldBytes,
    ) -> str:
        name = state.upstream.name
        upstream_request = self.upstreams.build_request(
            state,
            request.path,
            request.body_for(state.upstream),
            stream=request.stream,
            request_id=request_id,
        )
        try:
            async with self.upstreams.open_response(upstream_request) as upstream_response:
                content_type = upstream_response.headers.get("content-type", "")
                if (
                    request.stream
                    and upstream_response.status_code == 200
                    and content_type.startswith("text/event-stream")
                ):
                    await self._forward_stream(upstream_response, request, response, arrived, name)
                    return "ok"
                return await self._forward_whole(upstream_response, response, name, held)
        except httpx2.TransportError as fault:
            raise classify_error(fault, name) from None

    async def _forward_stream(
        self,
        upstream_response: httpx2.Response,
        request: ProxyRequest,
        response: GatewayResponse,
        arrived: float,
        name: str,
    ) -> None:
        """Forward pieces as they arrive. A stream without the event [DONE] was cut, even if closed
        properly."""
        metrics, previous, events = self.metrics, 0.0, response.events
        async for piece in upstream_response.aiter_raw():
            now, n_events = time.monotonic(), events.n_events
            if previous:
                metrics.inter_token.observe(now - previous)
            else:
                metrics.ttft.observe(now - arrived)
            previous = now
            await response.send_piece(piece)
            request.body.release()  # no other upstream will get it
            metrics.events.inc(events.n_events - n_events)
        if not events.may_end():
            raise UpstreamFailed("cut", f"{name}: the stream ended before its end mark; try again")
        count_tokens(metrics, response.tail)
        await response.finish()

    async def _forward_whole(
        self,
        upstream_response: httpx2.Response,
        response: GatewayResponse,
        name: str,
        held: HeldBytes,
    ) -> str:
        """Forward a response that is not a stream once it is complete: until then another upstream
        can answer."""
        parts, size = list[bytes](), 0
        async for part in upstream_response.aiter_raw():
            parts.append(part)
            size += len(part)
            if size > self.limits.answer_bytes:
                raise UpstreamFailed(
                    "large",
                    f"{name}: expected a response of at most {self.limits.answer_bytes} bytes, "
                    "found more; request less",
                )
            held.take(len(part))
        content, status = b"".join(parts), upstream_response.status_code
        parts.clear()  # the client may read slowly
        headers = [
            (key.lower(), value)
            for key, value in upstream_response.headers.raw
            if key.lower() in FORWARDED_HEADERS
        ]
        if status in RETRYABLE_STATUSES:
            raise UpstreamFailed(
                f"status {status}", f"{name}: status {status}", status, content or b"{}", headers
            )
        count_tokens(self.metrics, content)
        await response.send_whole(status, content, headers)
        return "ok" if status < 400 else "refused"


def classify_error(fault: httpx2.TransportError, name: str) -> UpstreamFailed:
    """Return the failure of a connection: reason, message and status."""
    if isinstance(fault, httpx2.ConnectError | httpx2.ConnectTimeout):
        return UpstreamFailed("unreachable", f"{name}: not reachable; try again later", 503)
    if isinstance(fault, httpx2.TimeoutException):
        return UpstreamFailed("silent", f"{name}: timed out; try again later", 504)
    return UpstreamFailed("closed", f"{name}: the connection was closed; try again")


def count_tokens(metrics: Metrics, text: bytes) -> None:
    """Count the tokens of a response's usage, searched near its end instead of parsed."""
    for kind, word in (("prompt", b'"prompt_tokens":'), ("completion", b'"completion_tokens":')):
        start = text.rfind(word)
        if start >= 0:
            digits = (
                text[start + len(word) : start + len(word) + 20]
                .lstrip()
                .partition(b",")[0]
                .partition(b"}")[0]
            )
            if digits.strip().isdigit():
                metrics.tokens.labels(kind).inc(int(digits))
