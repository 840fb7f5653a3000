"""The gateway as an ASGI application: FastAPI for what is asked seldom, one plain endpoint for what is relayed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from itertools import count
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Response
from starlette.routing import Route

from quantkit.serve.gateway.admission_policy import AdmissionPolicy
from quantkit.serve.gateway.admission_queue import AdmissionQueue, QueueFull
from quantkit.serve.gateway.api_keys import NOBODY, Key, authenticate
from quantkit.serve.gateway.errors import tell_unknown_paths
from quantkit.serve.gateway.metrics import Metrics
from quantkit.serve.gateway.relay import Relay
from quantkit.serve.gateway.request import (
    TOKENS,
    ClientDisconnected,
    ProxyRequest,
    Receive,
    RequestRejected,
    asked,
    read_body,
)
from quantkit.serve.gateway.response import Reply, Send
from quantkit.serve.gateway.settings import GatewaySettings
from quantkit.serve.gateway.upstreams import Upstreams

Scope = MutableMapping[str, Any]
FAREWELL = 5.0
"""Seconds a client has to take the word that its request failed."""


def make_app(settings: GatewaySettings, keys: tuple[Key, ...] = ()) -> FastAPI:
    """The application; without keys whoever can reach it may ask."""
    gateway = Gateway(settings, keys)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        heart = asyncio.create_task(gateway.beat())
        try:
            yield
        finally:
            heart.cancel()
            await gateway.upstreams.client.aclose()

    app = FastAPI(
        title="quantkit gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    tell_unknown_paths(app)
    app.router.routes.extend(Route(f"/v1{path}", gateway, methods=["POST"]) for path in TOKENS)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(response: Response) -> dict[str, str]:
        if await gateway.upstreams.models() is not None:
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "no upstream answers"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.scraped(), headers={"content-type": Metrics.content_type})

    app.router.routes.append(Route("/v1/models", Models(gateway), methods=["GET"]))
    return app


class Gateway:
    """POST: who is it, what is asked, wait for a turn, relay, say how it ended."""

    def __init__(self, settings: GatewaySettings, keys: tuple[Key, ...]) -> None:
        self.limits, self.keys = settings.limits, keys
        self.metrics = Metrics()
        self.upstreams = Upstreams(settings.upstreams, settings.limits)
        self.relay = Relay(self.upstreams, self.metrics, settings.limits)
        limits = settings.limits
        self.turns = AdmissionQueue(
            AdmissionPolicy(
                running=limits.running, waiting=limits.waiting, aging=limits.aging_seconds
            )
        )
        self._streams = set[Reply]()
        self._start, self._numbers = token_hex(6), count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, headers = time.monotonic(), dict(scope["headers"])
        identity = headers.get(b"x-request-id", b"")[:128].decode("latin-1")
        if not identity.isprintable() or not identity.isascii() or not identity:
            identity = f"{self._start}-{next(self._numbers)}"
        reply = Reply(send, time.monotonic, ((b"x-request-id", identity.encode()),))
        name, outcome = NOBODY.name, "fault"
        try:
            key = self.who(headers)
            name = key.name
            patience = min(self.limits.body_seconds, self.limits.deadline)
            body = await read_body(receive, headers, self.limits.body_bytes, patience)
            wanted = asked(scope["path"].removeprefix("/v1"), body, headers, key, self.limits)
            outcome = await self.attended(wanted, key, reply, receive, arrived, identity)
        except RequestRejected as fault:
            outcome = "refused"
            await reply.fail(fault.status, fault.kind, str(fault))
        except ClientDisconnected:
            outcome = "left"
        except Exception:
            await reply.fail(500, "server_error", "the gateway failed; ask again")
            raise  # the server tells the operator
        finally:
            self.metrics.requests.labels(name, outcome).inc()
            self.metrics.total.labels(outcome).observe(time.monotonic() - arrived)

    def who(self, headers: dict[bytes, bytes]) -> Key:
        """Whose request it is; Refused when keys are needed and none of ours came."""
        if not self.keys:
            return NOBODY
        found = authenticate(self.keys, headers.get(b"authorization", b"").decode("latin-1"))
        if found is None:
            raise RequestRejected(
                401,
                "authentication_error",
                "Authorization: expected Bearer and a key of this gateway",
            )
        return found

    async def attended(
        self,
        wanted: ProxyRequest,
        key: Key,
        reply: Reply,
        receive: Receive,
        arrived: float,
        identity: str,
    ) -> str:
        """Serve while the client is there and time is left; who leaves takes the engine's work with it."""
        task = asyncio.current_task()
        assert task is not None
        left = False

        async def watch() -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            if not reply.finished:
                left = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(arrived + wanted.seconds - time.monotonic()):
                return await self.serve(wanted, key, reply, arrived, identity)
        except TimeoutError:
            await self.late(wanted, reply)
            return "late"
        except QueueFull as busy:
            await reply.fail(429, "rate_limit_error", str(busy), retry_after=busy.retry_after)
            return f"busy: {busy.reason}"
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
            return "left"
        finally:
            watcher.cancel()

    async def serve(
        self, wanted: ProxyRequest, key: Key, reply: Reply, arrived: float, identity: str
    ) -> str:
        """Wait for a turn, then relay."""
        most = key.most or self.limits.per_key
        turn = await self.turns.enter(
            wanted.priority, key.name, patience=self.limits.queue_seconds, most=most
        )
        try:
            self.metrics.queued.observe(time.monotonic() - arrived)
            if wanted.stream:
                reply.last = time.monotonic()
                self._streams.add(reply)
            return await self.relay.run(wanted, reply, arrived, identity)
        finally:
            self._streams.discard(reply)
            self.turns.leave(turn)

    async def late(self, wanted: ProxyRequest, reply: Reply) -> None:
        """The deadline passed: the turn is given back, and a client that reads learns why."""
        try:
            async with asyncio.timeout(FAREWELL):
                await reply.fail(
                    504, "timeout_error", f"not answered within {wanted.seconds:g} s; ask for less"
                )
        except TimeoutError:
            reply.finished = True  # it does not read; the server closes the connection of an answer without an end

    async def beat(self) -> None:
        """Comments on quiet streams, for as long as the application runs: one task for all of them."""
        beats = set[asyncio.Task[None]]()
        while True:
            await asyncio.sleep(self.limits.heartbeat / 4)
            now = time.monotonic()
            for reply in [*self._streams]:
                if now - reply.last >= self.limits.heartbeat and not reply.finished:
                    task = asyncio.create_task(self._one_beat(reply))
                    beats.add(task)
                    task.add_done_callback(beats.discard)

    async def _one_beat(self, reply: Reply) -> None:
        if await reply.beat():
            self.metrics.heartbeats.inc()

    def scraped(self) -> bytes:
        """Prometheus' text, with who runs and waits now."""
        admission = self.turns.admission
        self.metrics.running.set(len(admission.running))
        self.metrics.waiting.set(len(admission.order))
        return self.metrics.text()


class Models:
    """GET /v1/models: what the first upstream that answers serves. Needs a key, takes no turn."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, time.monotonic, ())
        try:
            self._gateway.who(dict(scope["headers"]))
        except RequestRejected as fault:
            await reply.fail(fault.status, fault.kind, str(fault))
            return
        content = await self._gateway.upstreams.models()
        if content is None:
            await reply.fail(
                503, "server_error", "no upstream answers; try again later", retry_after=1
            )
        else:
            await reply.whole(200, content, [(b"content-type", b"application/json")])
