"""The bodies that the gateway holds: a bounded read, and one budget of bytes for all of them.

A body is held from its first byte until its upstream has begun to answer. The budget counts bytes
that arrived, not those that a Content-Length promises: a promise takes no memory. It never waits: a
body that does not fit is rejected, and its client tries again. A quarter is left to small bodies,
so that a few large ones, which may be sent slowly on purpose, do not keep out the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from quantkit.serve.gateway.errors import BudgetExceeded, ClientDisconnected, RequestRejected

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
SMALL_BYTES = 65536
"""Largest small body: a chat of 10,000 words. The server reads as much at a time."""
READ_PAUSE = 0.005
"""Seconds between two reads of large bodies, over all of them: 256 KiB in each make 52 MB/s, which
leaves most of a core to the streams."""
_RESERVED_SHARE = 4  # of the budget, for small bodies


class ByteBudget:
    """Bytes that may be held at once, and the pace at which large bodies are read. Mutable."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self.pacer = Pacer(READ_PAUSE)

    def take(self, n_bytes: int, held: int) -> bool:
        """Take bytes for a holder that has `held` already; False if they do not fit."""
        is_small = held + n_bytes <= SMALL_BYTES
        if self.used + n_bytes > self.total - (0 if is_small else self.total // _RESERVED_SHARE):
            return False
        self.used += n_bytes
        return True


class Pacer:
    """Gives turns at intervals, in the order in which they are requested. Mutable."""

    def __init__(self, interval: float) -> None:
        self._interval, self._next = interval, 0.0

    async def wait_turn(self) -> None:
        """Wait until the next turn."""
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next)
        self._next = turn + self._interval
        if turn > now:
            await asyncio.sleep(turn - now)


class HeldBytes:
    """The part of a budget that one request holds. Mutable.

    content: the body, once it is complete.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self.n_bytes = budget, 0
        self.content = b""

    def take(self, n_bytes: int) -> None:
        """Take bytes from the budget; BudgetExceeded if they do not fit."""
        if not self._budget.take(n_bytes, self.n_bytes):
            raise BudgetExceeded
        self.n_bytes += n_bytes

    async def wait_turn(self) -> None:
        """Wait for the next read of a large body; a small one is read at once."""
        if self.n_bytes > SMALL_BYTES:
            await self._budget.pacer.wait_turn()

    def release(self) -> None:
        """Forget the content and return its bytes to the budget. Idempotent."""
        self._budget.used -= self.n_bytes
        self.n_bytes, self.content = 0, b""


async def read_body(
    receive: Receive,
    headers: Mapping[bytes, bytes],
    max_bytes: int,
    timeout: float,
    held: HeldBytes | None = None,
) -> bytes:
    """Read the whole body, counted in `held` if there is a budget.

    Raises RequestRejected if it is larger than `max_bytes` (before reading it if Content-Length
    says so) or not complete after `timeout` seconds, BudgetExceeded if it does not fit into the
    budget, ClientDisconnected if the client disconnects.
    """
    size = headers.get(b"content-length", b"")
    if size.isdigit() and int(size[:20]) > max_bytes:
        raise RequestRejected(
            413,
            "invalid_request_error",
            f"body: expected at most {max_bytes} bytes, found {int(size[:20])}",
        )
    content = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in iterate_body(receive):
                if len(content) + len(part) > max_bytes:
                    raise RequestRejected(
                        413,
                        "invalid_request_error",
                        f"body: expected at most {max_bytes} bytes, found more",
                    )
                content += part
                if held:
                    held.take(len(part))
                    await held.wait_turn()
    except TimeoutError:
        message = (
            f"body: expected its end within {timeout:g} s, found {len(content)} bytes; "
            "send it at once"
        )
        raise RequestRejected(408, "timeout_error", message) from None
    return bytes(content)


async def iterate_body(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the parts of a body; ClientDisconnected if the client disconnects."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        yield message.get("body", b"")
        more = message.get("more_body", False)
