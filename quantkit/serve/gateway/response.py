"""A response to one client. Its head is sent once, and an error can be reported in every state.

Before anything is sent, an error is a status and JSON; within a stream it is an event. Comments
(": heartbeat") are not part of the content: after them another upstream can still answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from quantkit.serve.gateway.bodies import Message
from quantkit.serve.gateway.errors import format_error, get_close_headers
from quantkit.serve.gateway.event_stream import EventStream

Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
HEARTBEAT = b": heartbeat\n\n"
_STREAM_HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer events
)
_TAIL_BYTES = 1024  # enough for the event with the usage and the end mark
_PIECE_BYTES = 1 << 16  # handed to the server at a time: it waits while the client does not read


class GatewayResponse:
    """A response and its state. Mutable."""

    def __init__(self, send: Send, clock: Callable[[], float], id_headers: Headers) -> None:
        self._send, self._clock, self._id_headers = send, clock, tuple(id_headers)
        self._lock = asyncio.Lock()  # no heartbeat between the head and the first piece
        self.is_started = False  # the head was sent
        self.has_content = False  # a byte of the content was sent
        self.is_finished = False
        self.last_sent = clock()
        self.tail = b""
        self.events = EventStream()

    async def send_whole(self, status: int, content: bytes, headers: Headers) -> None:
        """Send a complete response. After heartbeats it is an event, and its status is lost."""
        if self.is_started:
            await self.send_piece(b"data: " + content.strip().replace(b"\n", b"\ndata: ") + b"\n\n")
            await self.finish()
            return
        self.is_started = self.has_content = self.is_finished = True
        length = (b"content-length", str(len(content)).encode())
        await self._send({
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, length, *self._id_headers],
        })
        for start in range(0, max(len(content), 1), _PIECE_BYTES):
            end = start + _PIECE_BYTES
            await self._send({
                "type": "http.response.body",
                "body": content[start:end],
                "more_body": end < len(content),
            })

    async def send_piece(self, content: bytes) -> None:
        """Send a piece of the stream; wait while the client does not read."""
        async with self._lock:
            if not self.is_started:
                await self._start_stream()
            self.has_content = True
            self.tail = (self.tail + content)[-_TAIL_BYTES:]
            self.events.feed(content)
            await self._send({"type": "http.response.body", "body": content, "more_body": True})
            self.last_sent = self._clock()

    async def send_heartbeat(self) -> bool:
        """Send a comment. Return False if none can be sent: within an event, after the end, or
        while a piece waits for the client."""
        if self._lock.locked() or self.is_finished or not self.events.is_between_events():
            return False
        async with self._lock:
            if not self.is_started:
                await self._start_stream()
            await self._send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
            self.last_sent = self._clock()
        return True

    async def finish(self) -> None:
        """End the stream."""
        async with self._lock:
            self.is_finished = True
            await self._send({"type": "http.response.body", "body": b""})

    async def send_error(
        self, status: int, kind: str, message: str, *, retry_after: int | None = None
    ) -> None:
        """Report an error: as a status if nothing was sent, else as the last event."""
        content = format_error(status, kind, message)
        if self.is_finished:
            return
        if not self.is_started:
            headers = [(b"content-type", b"application/json")]
            if retry_after is not None:
                headers.append((b"retry-after", str(retry_after).encode()))
            headers += [
                (name.encode(), value.encode()) for name, value in get_close_headers(status).items()
            ]
            await self.send_whole(status, content, headers)
            return
        separator = b"" if self.events.is_between_events() else b"\n\n"
        await self.send_piece(separator + b"data: " + content + b"\n\n")
        await self.finish()

    async def _start_stream(self) -> None:
        self.is_started = True
        await self._send({
            "type": "http.response.start",
            "status": 200,
            "headers": [*_STREAM_HEADERS, *self._id_headers],
        })
