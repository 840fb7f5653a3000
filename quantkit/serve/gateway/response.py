"""One answer to one client. It is begun once, and can be told to have failed in every state.

Before anything is sent a failure is a status and JSON; inside a stream it is an event. Comments (": heartbeat") are no
part of the answer: after them another upstream may still take over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from quantkit.serve.gateway.errors import format_error, get_close_headers
from quantkit.serve.gateway.request import Message

Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
HEARTBEAT = b": heartbeat\n\n"
_STREAM: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
)
_TAIL = 1024  # enough for the event with the usage and the end mark


class GatewayResponse:
    """What one client has been sent."""

    def __init__(self, send: Send, clock: Callable[[], float], identity: Headers) -> None:
        self._send, self._clock, self._identity = send, clock, tuple(identity)
        self._lock = asyncio.Lock()  # a heartbeat may not fall between the head and the first piece
        self.begun = False  # a head was sent
        self.answered = False  # a byte of the answer was sent
        self.finished = False
        self.last = clock()
        self.tail = b""

    async def whole(self, status: int, content: bytes, headers: Headers) -> None:
        """A complete answer; behind heartbeats it is an event, its status lost."""
        if self.begun:
            await self.part(b"data: " + content.strip().replace(b"\n", b"\ndata: ") + b"\n\n")
            await self.end()
            return
        self.begun = self.answered = self.finished = True
        length = (b"content-length", str(len(content)).encode())
        await self._send({
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, length, *self._identity],
        })
        await self._send({"type": "http.response.body", "body": content})

    async def part(self, content: bytes) -> None:
        """A piece of the stream; it waits while the client does not read."""
        async with self._lock:
            if not self.begun:
                await self._begin()
            self.answered = True
            self.tail = (self.tail + content)[-_TAIL:]
            await self._send({"type": "http.response.body", "body": content, "more_body": True})
            self.last = self._clock()

    async def beat(self) -> bool:
        """A comment, where one may stand: between two events, and not behind a piece that waits for the client."""
        if self._lock.locked() or self.finished or not self._between_events():
            return False
        async with self._lock:
            if not self.begun:
                await self._begin()
            await self._send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
            self.last = self._clock()
        return True

    async def end(self) -> None:
        """The end of a stream."""
        async with self._lock:
            self.finished = True
            await self._send({"type": "http.response.body", "body": b""})

    async def fail(
        self, status: int, kind: str, told: str, *, retry_after: int | None = None
    ) -> None:
        """Say that it failed: by status when nothing was sent, else as an event, and the end."""
        content = format_error(status, kind, told)
        if self.finished:
            return
        if not self.begun:
            later = [(b"retry-after", str(retry_after).encode())] if retry_after is not None else []
            closed = [
                (name.encode(), value.encode()) for name, value in get_close_headers(status).items()
            ]
            await self.whole(
                status, content, [(b"content-type", b"application/json"), *later, *closed]
            )
            return
        before = b"" if self._between_events() else b"\n\n"
        await self.part(before + b"data: " + content + b"\n\n")
        await self.end()

    def _between_events(self) -> bool:
        return not self.tail or self.tail.endswith((b"\n\n", b"\n\r\n"))

    async def _begin(self) -> None:
        self.begun = True
        await self._send({
            "type": "http.response.start",
            "status": 200,
            "headers": [*_STREAM, *self._identity],
        })
