"""The gateway as an ASGI application: FastAPI, and a plain endpoint for forwarded requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.routing import Route

from quantkit.errors import QuantkitError
from quantkit.serve.gateway.access import HostPolicy, RawHeaders, is_loopback
from quantkit.serve.gateway.admission_policy import AdmissionPolicy
from quantkit.serve.gateway.admission_queue import AdmissionQueue, QueueFull
from quantkit.serve.gateway.api_keys import ANONYMOUS, ApiKey, authenticate
from quantkit.serve.gateway.bodies import SMALL_BYTES, ByteBudget, HeldBytes, Receive, read_body
from quantkit.serve.gateway.errors import (
    BudgetExceeded,
    ClientDisconnected,
    RequestRejected,
    make_error_response,
    register_error_handler,
)
from quantkit.serve.gateway.host_check import HostCheck
from quantkit.serve.gateway.metrics import Metrics
from quantkit.serve.gateway.relay import Relay
from quantkit.serve.gateway.request import (
    TOKEN_LIMITS,
    ProxyRequest,
    parse_priority,
    parse_request,
    scan_body,
)
from quantkit.serve.gateway.response import GatewayResponse, Send
from quantkit.serve.gateway.settings import GatewaySettings
from quantkit.serve.gateway.upstreams import Upstreams

LOG = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
TIMEOUT_GRACE = 5.0
"""Seconds that a client has to read the error after its deadline."""


ReadCanary = Callable[[], float]
"""Asks the engine; returns the difference in nats, or raises QuantkitError."""


@dataclass(frozen=True, kw_only=True)
class CanarySchedule:
    """A canary that is read every `seconds`, in a thread; its bound in nats."""

    read: ReadCanary
    bound: float
    seconds: float


def make_app(
    settings: GatewaySettings, keys: tuple[ApiKey, ...] = (), canary: CanarySchedule | None = None
) -> FastAPI:
    """Make the application. Without keys every client is served."""
    gateway = Gateway(settings, keys)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(gateway.send_heartbeats())]
        tasks += [asyncio.create_task(gateway.watch_canary(canary))] if canary else []
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await gateway.upstreams.close()

    app = FastAPI(
        title="quantkit gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    register_error_handler(app)
    app.router.routes.extend(
        Route(f"/v1{path}", gateway, methods=["POST"]) for path in TOKEN_LIMITS
    )

    @app.get("/health")
    async def get_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(RequestRejected)
    async def report_rejection(_: Request, fault: RequestRejected) -> Response:
        return make_error_response(fault.status, fault.kind, str(fault))

    @app.get("/ready")
    async def get_readiness(request: Request, response: Response) -> dict[str, str]:
        gateway.check_operator(request.headers.raw)
        if await gateway.upstreams.fetch_models() is not None:
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "no upstream responds"}

    @app.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        gateway.check_operator(request.headers.raw)
        return Response(gateway.format_metrics(), headers={"content-type": Metrics.content_type})

    app.router.routes.append(Route("/v1/models", ModelsEndpoint(gateway), methods=["GET"]))
    if not keys:
        app.add_middleware(HostCheck, policy=gateway.hosts)
    return app


class Gateway:
    """The endpoint of POST requests: authenticate, validate, wait for a slot, forward, count."""

    def __init__(self, settings: GatewaySettings, keys: tuple[ApiKey, ...]) -> None:
        limits = settings.limits
        self.settings, self.limits, self.keys = settings, limits, keys
        self.hosts = HostPolicy(settings.host, settings.allowed_hosts)
        self.metrics = Metrics()
        self.upstreams = Upstreams(settings.upstreams, limits)
        self.bodies = ByteBudget(limits.all_bodies_bytes)
        answers = ByteBudget(limits.all_answers_bytes)
        self.relay = Relay(self.upstreams, self.metrics, limits, answers)
        self.queue = AdmissionQueue(
            AdmissionPolicy(
                max_running=limits.running,
                max_waiting=limits.waiting,
                aging=limits.aging_seconds,
            )
        )
        self._scans = asyncio.Lock()  # one large body at a time: one step per turn of the loop
        self._streams = set[GatewayResponse]()
        self._id_prefix, self._numbers = token_hex(6), count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived, headers = time.monotonic(), dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:128].decode("latin-1")
        if not request_id.isprintable() or not request_id.isascii() or not request_id:
            request_id = f"{self._id_prefix}-{next(self._numbers)}"
        response = GatewayResponse(send, time.monotonic, ((b"x-request-id", request_id.encode()),))
        name, outcome, slot, held = ANONYMOUS.name, "fault", None, HeldBytes(self.bodies)
        try:
            key = self.authenticate(headers)
            name = key.name
            slot = self.queue.enter(
                find_priority(headers, key), key.name, max_turns=key.most or self.limits.per_key
            )
            path = scope["path"].removeprefix("/v1")
            request = await self.read_request(path, headers, receive, key, held)
            outcome = await self.serve_until_deadline(
                request, slot, key, response, receive, arrived, request_id
            )
        except RequestRejected as fault:
            outcome = "refused"
            await response.send_error(fault.status, fault.kind, str(fault))
        except (QueueFull, BudgetExceeded) as fault:
            outcome = await self.report_overload(fault, response)
        except ClientDisconnected:
            outcome = "left"
        except Exception:
            await response.send_error(500, "server_error", "the gateway failed; try again")
            raise  # the server logs it
        finally:
            held.release()
            if slot is not None:
                self.queue.release(slot)
            self.metrics.requests.labels(name, outcome).inc()
            self.metrics.duration.labels(outcome).observe(time.monotonic() - arrived)

    async def read_request(
        self,
        path: str,
        headers: dict[bytes, bytes],
        receive: Receive,
        key: ApiKey,
        held: HeldBytes,
    ) -> ProxyRequest:
        """Read and validate a request that has entered the queue."""
        limits = self.limits
        timeout = min(limits.body_seconds, limits.deadline)
        held.content = await read_body(receive, headers, limits.body_bytes, timeout, held)
        async with self._scans if len(held.content) > SMALL_BYTES else nullcontext():
            scanned = await scan_body(held)
        return parse_request(path, held, scanned, headers, key, limits)

    async def report_overload(
        self, fault: QueueFull | BudgetExceeded, response: GatewayResponse
    ) -> str:
        """Send 429 with Retry-After; return the outcome for the metrics."""
        if isinstance(fault, BudgetExceeded):
            fault = QueueFull("bytes", self.queue.policy.retry_after())
        await response.send_error(
            429, "rate_limit_error", str(fault), retry_after=fault.retry_after
        )
        return f"busy: {fault.reason}"

    def check_operator(self, headers: RawHeaders) -> None:
        """Raise RequestRejected unless a client may read /metrics and /ready.

        With a key it may. Without, it may on this machine, or where the operator opened them.
        """
        if self.keys and authenticate(self.keys, read_authorization(dict(headers))):
            return
        if is_loopback(self.settings.host):
            self.hosts.check(headers)
        elif not self.settings.has_open_metrics:
            raise RequestRejected(
                401,
                "authentication_error",
                "Authorization: expected Bearer and a key of this gateway; --open-metrics opens "
                "/metrics and /ready",
            )

    def authenticate(self, headers: dict[bytes, bytes]) -> ApiKey:
        """Return the key of a request; RequestRejected if keys are required and it has none."""
        if not self.keys:
            return ANONYMOUS
        key = authenticate(self.keys, read_authorization(headers))
        if key is None:
            raise RequestRejected(
                401,
                "authentication_error",
                "Authorization: expected Bearer and a key of this gateway",
            )
        return key

    async def serve_until_deadline(
        self,
        request: ProxyRequest,
        slot: int,
        key: ApiKey,
        response: GatewayResponse,
        receive: Receive,
        arrived: float,
        request_id: str,
    ) -> str:
        """Serve a request until its deadline, or until the client disconnects.

        In both cases the upstream's connection is closed, so that the engine stops. Returns the
        outcome for the metrics.
        """
        task = asyncio.current_task()
        assert task is not None
        has_disconnected = False

        async def watch_client() -> None:
            nonlocal has_disconnected
            while (await receive())["type"] != "http.disconnect":
                pass
            if not response.is_finished:
                has_disconnected = True
                task.cancel()

        watcher = asyncio.create_task(watch_client())
        try:
            async with asyncio.timeout(arrived + request.timeout - time.monotonic()):
                return await self.serve(request, slot, key, response, arrived, request_id)
        except TimeoutError:
            await self.report_timeout(request, response)
            return "late"
        except asyncio.CancelledError:
            if not has_disconnected:
                raise
            task.uncancel()
            return "left"
        finally:
            watcher.cancel()

    async def serve(
        self,
        request: ProxyRequest,
        slot: int,
        key: ApiKey,
        response: GatewayResponse,
        arrived: float,
        request_id: str,
    ) -> str:
        """Wait until the request may run, then forward it."""
        await self.queue.acquire(
            slot,
            request.priority,
            key.name,
            timeout=self.limits.queue_seconds,
            turns=request.turns,
            max_turns=key.most or self.limits.per_key,
        )
        try:
            self.metrics.queued.observe(time.monotonic() - arrived)
            if request.stream:
                response.last_sent = time.monotonic()
                self._streams.add(response)
            return await self.relay.forward(request, response, arrived, request_id)
        finally:
            self._streams.discard(response)
            self.queue.release(slot)

    async def report_timeout(self, request: ProxyRequest, response: GatewayResponse) -> None:
        """Send the error of a passed deadline; the slot is released already."""
        try:
            async with asyncio.timeout(TIMEOUT_GRACE):
                await response.send_error(
                    504,
                    "timeout_error",
                    f"not complete within {request.timeout:g} s; request fewer tokens",
                )
        except TimeoutError:
            # The client does not read. The server closes the connection of an unfinished response.
            response.is_finished = True

    async def send_heartbeats(self) -> None:
        """Send comments on idle streams until cancelled: one task for all of them."""
        tasks = set[asyncio.Task[None]]()
        while True:
            await asyncio.sleep(self.limits.heartbeat / 4)
            now = time.monotonic()
            for response in [*self._streams]:
                idle = now - response.last_sent >= self.limits.heartbeat
                if idle and not response.is_finished:
                    task = asyncio.create_task(self._send_heartbeat(response))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

    async def _send_heartbeat(self, response: GatewayResponse) -> None:
        if await response.send_heartbeat():
            self.metrics.heartbeats.inc()

    async def watch_canary(self, canary: CanarySchedule) -> None:
        """Read the canary on its schedule until cancelled."""
        while True:
            difference: float | None = None
            try:
                difference = await asyncio.to_thread(canary.read)
            except QuantkitError as fault:
                LOG.warning("canary: %s", fault)
            self.metrics.record_canary(difference, canary.bound, time.time())
            if difference is not None and difference > canary.bound:
                LOG.error(
                    "canary: the log-probabilities differ by %.3f nats from the report's, more "
                    "than %.3f; check the engine's files, version and flags",
                    difference,
                    canary.bound,
                )
            await asyncio.sleep(canary.seconds)

    def format_metrics(self) -> bytes:
        """Return the metrics in Prometheus' format, with the current queue."""
        policy = self.queue.policy
        self.metrics.running.set(policy.n_running)
        self.metrics.waiting.set(len(policy.waiting))
        return self.metrics.format_text()


def read_authorization(headers: dict[bytes, bytes]) -> str:
    """Return the Authorization header; "" without."""
    return headers.get(b"authorization", b"").decode("latin-1")


def find_priority(headers: dict[bytes, bytes], key: ApiKey) -> int:
    """Return the most urgent priority that a request may have, before its body is read."""
    return max(key.priority, parse_priority(headers, None) or 0)


class ModelsEndpoint:
    """GET /v1/models: the models of the first upstream that responds. Needs a key, but no slot."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = GatewayResponse(send, time.monotonic, ())
        try:
            self._gateway.authenticate(dict(scope["headers"]))
        except RequestRejected as fault:
            await response.send_error(fault.status, fault.kind, str(fault))
            return
        content = await self._gateway.upstreams.fetch_models()
        if content is None:
            await response.send_error(
                503, "server_error", "no upstream responds; try again later", retry_after=1
            )
        else:
            await response.send_whole(200, content, [(b"content-type", b"application/json")])
