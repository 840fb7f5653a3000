"""The check of Host and Origin before an ASGI application, for servers without keys."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp

from quantkit.serve.gateway.access import HostPolicy
from quantkit.serve.gateway.bodies import Receive
from quantkit.serve.gateway.errors import RequestRejected
from quantkit.serve.gateway.response import GatewayResponse, Send

Scope = MutableMapping[str, Any]


class HostCheck:
    """Rejects requests that a browser of another site may have sent; a middleware."""

    def __init__(self, app: ASGIApp, policy: HostPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._policy.check(scope["headers"])
            except RequestRejected as fault:
                response = GatewayResponse(send, time.monotonic, ())
                await response.send_error(fault.status, fault.kind, str(fault))
                return
        await self._app(scope, receive, send)
