"""The engine and its fallbacks: their connections, and the upstreams that failed recently."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2

from quantkit.io.bounded_http import ResponseLimits, make_meter
from quantkit.io.retry import ResponseRefused, TransientError
from quantkit.serve.gateway.request import iterate_pieces
from quantkit.serve.gateway.settings import Limits, Upstream

KEEP_CONNECTION = 2.0
"""Seconds that an idle connection is kept: fewer than engines keep theirs (vLLM: 5), so that no
request is sent on a connection that the engine closes."""

CLIENTS, CLIENT_CONNECTIONS = 16, 16
"""Connection pools, and connections of one before the next is used. A request costs its pool a few
passes over all connections: 1.5 ms of a core at 300 connections, .1 ms at 16."""
MODELS_SECONDS = 2.0
"""Longest time without a byte from an upstream whose models are requested."""
MODELS_TOTAL_SECONDS = 10.0
"""Longest time of such an answer, its head included."""
MODELS_ANSWER = ResponseLimits(n_bytes=1_000_000, n_values=100_000)
"""A list of models: an engine has its model and some adapters, of 500 bytes each."""


@dataclass
class UpstreamState:
    """An upstream, and the time until which it is tried last. Mutable."""

    upstream: Upstream
    down_until: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class Upstreams:
    """Upstreams in the order of the settings; those that failed recently come last."""

    def __init__(self, upstreams: Sequence[Upstream], limits: Limits) -> None:
        self._limits = limits
        self.states = [
            UpstreamState(upstream, headers=make_headers(upstream)) for upstream in upstreams
        ]
        context = httpx2.create_ssl_context(trust_env=False)
        self._clients = [
            httpx2.AsyncClient(
                limits=httpx2.Limits(keepalive_expiry=KEEP_CONNECTION),  # admission limits them
                timeout=httpx2.Timeout(limits.silence, connect=limits.connect, pool=None),
                trust_env=False,  # no proxy between gateway and engine
                verify=context,
            )
            for _ in range(CLIENTS)
        ]
        self._n_open = [0] * CLIENTS  # responses per client
        self._models: asyncio.Task[bytes | None] | None = None
        self._whole_timeout = httpx2.Timeout(limits.deadline, connect=limits.connect, pool=None)

    def list_by_health(self) -> list[UpstreamState]:
        """Return the upstreams in the order in which they are tried."""
        if len(self.states) == 1:
            return self.states
        now = time.monotonic()
        return sorted(self.states, key=lambda state: state.down_until > now)

    def mark_failed(self, state: UpstreamState) -> None:
        """Try this upstream last for the next `cool_down` seconds."""
        state.down_until = time.monotonic() + self._limits.cool_down

    def build_request(
        self,
        state: UpstreamState,
        path: str,
        body: Sequence[memoryview],
        *,
        stream: bool,
        request_id: str,
    ) -> httpx2.Request:
        """Build a POST request with a body in pieces.

        An engine is silent until a response without a stream is complete: only the deadline limits
        it then.
        """
        size = str(sum(map(len, body)))
        return self._clients[0].build_request(
            "POST",
            state.upstream.url + path,
            content=iterate_pieces(body),
            headers=state.headers | {"x-request-id": request_id, "content-length": size},
            timeout=httpx2.USE_CLIENT_DEFAULT if stream else self._whole_timeout,
        )

    @asynccontextmanager
    async def open_response(self, request: httpx2.Request) -> AsyncIterator[httpx2.Response]:
        """Send a request; yield its response, whose body is not read yet, and close it.

        The first client with room sends it, so that few requests share few connections.
        """
        client = next(
            (n for n, n_open in enumerate(self._n_open) if n_open < CLIENT_CONNECTIONS),
            self._n_open.index(min(self._n_open)),
        )
        self._n_open[client] += 1
        try:
            response = await self._clients[client].send(request, stream=True)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self._n_open[client] -= 1

    async def close(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.aclose()

    async def fetch_models(self) -> bytes | None:
        """Return /models of the first upstream that responds; None if none does.

        Callers at the same time share one request: it needs no slot, and each would open a
        connection.
        """
        if self._models is None:
            self._models = asyncio.create_task(self._fetch_models())
            self._models.add_done_callback(self._forget_models)
        return await asyncio.shield(self._models)

    def _forget_models(self, _: asyncio.Task[bytes | None]) -> None:
        self._models = None

    async def _fetch_models(self) -> bytes | None:
        for state in self.list_by_health():
            try:
                async with asyncio.timeout(MODELS_TOTAL_SECONDS):
                    content = await self._read_models(state)
            except (httpx2.TransportError, ResponseRefused, TransientError, TimeoutError):
                continue
            if content is not None:
                return content
        return None

    async def _read_models(self, state: UpstreamState) -> bytes | None:
        """Return the body of an answer with status 200, within MODELS_ANSWER."""
        url, content = f"{state.upstream.url}/models", bytearray()
        async with self._clients[0].stream(
            "GET", url, headers=state.headers, timeout=MODELS_SECONDS
        ) as response:
            if response.status_code != 200:
                return None
            meter = make_meter(response, MODELS_ANSWER)
            async for piece in response.aiter_raw():
                meter.count(piece)
                content += piece
        return bytes(content)


def make_headers(upstream: Upstream) -> dict[str, str]:
    """Return the headers of every request to this server. The client's key is not forwarded."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    return headers | ({"authorization": f"Bearer {upstream.key}"} if upstream.key else {})
