"""The engine and whoever stands in for it: one connection pool, and a memory of who failed lately."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2

from quantkit.serve.gateway.settings import Limits, Upstream

KEEP_CONNECTION = 2.0
"""Seconds an idle connection is kept: less than engines keep theirs (vLLM 5), so that none is used while it closes."""


@dataclass
class UpstreamState:
    """An upstream, and until when it is asked last."""

    upstream: Upstream
    down_until: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class Upstreams:
    """Upstreams in the order of the settings, those that failed lately behind the others."""

    def __init__(self, upstreams: Sequence[Upstream], limits: Limits) -> None:
        self._limits = limits
        self.states = [
            UpstreamState(upstream, headers=make_headers(upstream)) for upstream in upstreams
        ]
        self.client = httpx2.AsyncClient(
            limits=httpx2.Limits(keepalive_expiry=KEEP_CONNECTION),  # admission bounds the number
            timeout=httpx2.Timeout(limits.silence, connect=limits.connect, pool=None),
            trust_env=False,  # an engine is not asked through a proxy
        )
        self._patient = httpx2.Timeout(limits.deadline, connect=limits.connect, pool=None)

    def order(self) -> list[UpstreamState]:
        """Whom to ask, first to last."""
        if len(self.states) == 1:
            return self.states
        now = time.monotonic()
        return sorted(self.states, key=lambda state: state.down_until > now)

    def failed(self, state: UpstreamState) -> None:
        """Ask this one last for a while."""
        state.down_until = time.monotonic() + self._limits.cool_down

    def request(
        self, state: UpstreamState, path: str, body: bytes, *, stream: bool, identity: str
    ) -> httpx2.Request:
        """A POST; without a stream silence is how an engine works, and only the deadline bounds it."""
        return self.client.build_request(
            "POST",
            state.upstream.url + path,
            content=body,
            headers=state.headers | {"x-request-id": identity},
            timeout=httpx2.USE_CLIENT_DEFAULT if stream else self._patient,
        )

    async def models(self) -> bytes | None:
        """What the first upstream that answers says it serves; None when none answers."""
        for state in self.order():
            try:
                found = await self.client.get(
                    f"{state.upstream.url}/models", headers=state.headers, timeout=2.0
                )
            except httpx2.TransportError:
                continue
            if found.status_code == 200:
                return found.content
        return None


def make_headers(upstream: Upstream) -> dict[str, str]:
    """What every request to this server carries; the client's own key stays here."""
    told = {"content-type": "application/json", "accept-encoding": "identity"}
    return told | ({"authorization": f"Bearer {upstream.key}"} if upstream.key else {})
