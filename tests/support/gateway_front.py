"""A gateway in front of a stub engine, in this process, with its table of connections."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from support.stub_engine import RunningApp, StubEngine

from quantkit.serve.gateway.api_keys import ApiKey
from quantkit.serve.gateway.app import Gateway, make_app
from quantkit.serve.gateway.connections import ConnectionTable
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream

POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


class Front:
    """A running gateway; `engine`, `gateway` and `table` are its parts."""

    def __init__(self, app: Any, table: ConnectionTable, port: int, engine: StubEngine) -> None:
        self.engine, self.table, self.port = engine, table, port
        self.root = f"http://127.0.0.1:{port}"
        self.gateway: Gateway = next(
            route.app for route in app.router.routes if route.path == "/v1/completions"
        )

    def post(self, body: Any, path: str = "completions", **headers: str) -> httpx2.Response:
        """Send a body, as JSON unless it is bytes; `x_priority` is the header x-priority."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(f"{self.root}/v1/{path}", content=content, headers=names, timeout=60)

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        """Open a connection from an address of the loopback network."""
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=20, source_address=(address, 0)
        )

    def is_healthy(self) -> bool:
        """Return whether a new client is served."""
        return httpx2.get(f"{self.root}/health", timeout=20).status_code == 200


@contextmanager
def run_front(
    engine: StubEngine | None = None,
    keys: tuple[ApiKey, ...] = (),
    settings: dict[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Front]:
    """Run a gateway with these limits and settings in front of an engine."""
    engine = engine or StubEngine()
    with RunningApp(engine) as upstream:
        bounds = Limits(**limits)
        made = GatewaySettings(
            upstreams=(Upstream(name="engine", url=upstream.url),),
            limits=bounds,
            **(settings or {}),
        )
        app, table = make_app(made, keys), ConnectionTable(bounds)
        with RunningApp(app, http=table.make_protocol) as running:
            yield Front(app, table, running.port, engine)


def wait_until(check: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a check holds; AssertionError after some seconds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
