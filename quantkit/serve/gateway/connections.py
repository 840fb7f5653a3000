"""Bounds on connections, before a request exists: bytes and seconds of its head, connections.

uvicorn bounds none of them with httptools: a header of any size is joined piece by piece, which
takes quadratic time, and a connection may stay silent within a header for ever. `ConnectionGuard`
stands between the transport and uvicorn's protocol. It hands the bytes on in pieces and receives
the parser's events first, so that it knows where a head ends.

One rule bounds everything that a parser holds: at most `header_bytes` may pass without a sign of
progress, which is the end of a head, a byte of a body, or the end of a message. Heads, trailers,
chunk extensions and empty lines all fall under it.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter, deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from quantkit.serve.gateway.errors import format_error
from quantkit.serve.gateway.settings import Limits

MAX_HEADERS = 128
"""Header fields of a request. Apache allows 100; each field takes about 200 bytes as objects."""
MAX_PIPELINED = 16
"""Requests that wait on one connection; clients of this API send one at a time."""
WIRE_FACTOR = 2
"""Bytes on the wire per byte of a body: chunks of one byte cost six bytes and a callback each."""
LINGER_SECONDS = 30.0
"""Time in which a client may read an early response while its body is discarded, and in which it
must take the last bytes of a closed connection; nginx allows the same."""
DRAIN_PAUSE = 0.01
"""Seconds between two reads of bodies that are discarded, over all connections: 256 KiB in each
make 26 MB/s, which takes less than a tenth of a core from the streams."""
RESERVED_FILES = 64
"""Descriptors for listeners, logs, libraries and the models request."""
MIN_CONNECTIONS = 16
_SWEEP_SECONDS = 1.0
_IPV6_NETWORK_BITS = 64  # one customer has a whole /64
_REASONS = {408: b"Request Timeout", 413: b"Content Too Large", 431: b"Header Fields Too Large",
            503: b"Service Unavailable"}  # fmt: skip


class ConnectionTable:
    """The open connections of one server. Mutable, and used by its event loop only.

    A connection is idle if no request of it is in progress. At a bound, a new connection replaces
    the oldest idle one: clients repeat a request whose idle connection was closed, so that
    half-sent requests keep no client out.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits, clock
        self.max_connections = reserve_files(limits.connections, limits.running)
        # One address never takes all of them.
        self.max_per_address = min(
            limits.connections_per_address or self.max_connections, self.max_connections
        )
        self.guards = set[ConnectionGuard]()
        self._counts = Counter[str]()
        self._idle: dict[str, dict[ConnectionGuard, None]] = {}  # by address, the oldest first
        self._is_sweeping = False
        self._draining = deque[ConnectionGuard]()  # paused, in the order of their next read

    def make_protocol(
        self, config: Any, server_state: Any, app_state: Any, _loop: Any = None
    ) -> ConnectionGuard:
        """Make the protocol of a new connection; uvicorn calls this as its protocol class."""
        inner = HttpToolsProtocol(config, server_state, app_state, _loop)
        return ConnectionGuard(inner, self)

    def add(self, guard: ConnectionGuard) -> bool:
        """Admit a connection; False if a bound is reached and no connection is idle."""
        address = guard.address
        if self._counts[address] >= self.max_per_address and not self._evict(address):
            return False
        if len(self.guards) >= self.max_connections and not self._evict(self._find_crowd()):
            return False
        self.guards.add(guard)
        self._counts[address] += 1
        self.mark_idle(guard)
        if not self._is_sweeping:
            self._is_sweeping = True
            self._schedule_sweep()
        return True

    def remove(self, guard: ConnectionGuard) -> None:
        """Forget a connection. Idempotent."""
        if guard not in self.guards:
            return
        self.guards.discard(guard)
        self.mark_busy(guard)
        self._counts[guard.address] -= 1
        if not self._counts[guard.address]:
            del self._counts[guard.address]

    def mark_idle(self, guard: ConnectionGuard) -> None:
        """Record that no request of a connection is in progress."""
        self._idle.setdefault(guard.address, {}).setdefault(guard)

    def mark_busy(self, guard: ConnectionGuard) -> None:
        """Record that a request of a connection is in progress."""
        idle = self._idle.get(guard.address, {})
        idle.pop(guard, None)
        if not idle:
            self._idle.pop(guard.address, None)

    def sweep(self) -> None:
        """Close the connections whose time is over."""
        now = self.clock()
        for guard in [*self.guards]:
            if not guard.is_busy():
                self.mark_idle(guard)
            guard.expire(now)

    def pause_drain(self, guard: ConnectionGuard) -> None:
        """Pause a connection whose body is discarded until it is its turn to be read again."""
        guard.transport.pause_reading()
        self._draining.append(guard)
        if len(self._draining) == 1:
            asyncio.get_running_loop().call_later(DRAIN_PAUSE, self._resume_drain)

    def _resume_drain(self) -> None:
        is_closed = True
        while is_closed and self._draining:
            guard = self._draining.popleft()
            is_closed = guard.transport.is_closing()
            if not is_closed:
                guard.transport.resume_reading()
        if self._draining:
            asyncio.get_running_loop().call_later(DRAIN_PAUSE, self._resume_drain)

    def _schedule_sweep(self) -> None:
        def sweep_again() -> None:
            self.sweep()
            if self.guards:
                self._schedule_sweep()
            else:
                self._is_sweeping = False

        interval = min(_SWEEP_SECONDS, self.limits.header_seconds / 4)
        asyncio.get_running_loop().call_later(interval, sweep_again)

    def _find_crowd(self) -> str:
        """Return the address with the most idle connections; "" if there is none."""
        return max(self._idle, key=lambda address: len(self._idle[address]), default="")

    def _evict(self, address: str) -> bool:
        """Close the oldest idle connection of an address; False if there is none."""
        for guard in [*self._idle.get(address, {})]:
            self.mark_busy(guard)
            if not guard.is_busy():
                self.remove(guard)
                guard.transport.abort()
                return True
        return False


class ConnectionGuard:
    """The protocol of one connection: counts, then hands on to uvicorn's. Mutable.

    It has the methods of asyncio's protocols and those that httptools calls on its listener.
    """

    transport: Any

    def __init__(self, inner: HttpToolsProtocol, table: ConnectionTable) -> None:
        self._inner: Any = inner
        self._table, self._limits = table, table.limits
        self.address = ""
        inner.parser = httptools.HttpRequestParser(self)
        # As uvicorn's own: bytes after the last request of a connection are not an error.
        inner.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._fault: tuple[int, str] | None = None
        self._n_silent = 0  # bytes since the parser last made progress
        self._n_wire = 0  # bytes since the end of the head
        self._n_headers = 0
        self._is_in_body = False
        self._head_since: float | None = None
        self._drain_since: float | None = None
        self._closing_since: float | None = None

    # ----------------------------------------------------------------------- the transport's events

    def connection_made(self, transport: Any) -> None:
        """Register the connection, or refuse it."""
        self.transport, self._head_since = transport, self._table.clock()
        self.address = group_address(transport.get_extra_info("peername"))
        self._inner.connection_made(transport)
        if not self._table.add(self):
            self._refuse(503, "connections: expected fewer from this address or in total")

    def connection_lost(self, fault: Exception | None) -> None:
        """Forget the connection."""
        self._table.remove(self)
        self._inner.connection_lost(fault)

    def data_received(self, data: bytes) -> None:
        """Hand data on in pieces of at most `header_bytes`; refuse what exceeds a bound."""
        view, limit = memoryview(data), self._limits.header_bytes
        while view and not self.transport.is_closing():
            if self._head_since is None and not self._is_in_body:
                self._head_since = self._table.clock()
            size = limit - self._n_silent
            piece, view = view[:size], view[size:]
            self._n_silent += len(piece)
            self._n_wire += len(piece)
            self._inner.data_received(piece)
            if self._n_silent >= limit:
                self._fault = (431, f"headers: expected at most {limit} bytes, found more")
            elif self._n_wire > WIRE_FACTOR * self._limits.body_bytes + limit:
                self._fault = (413, f"body: expected at most {self._limits.body_bytes} bytes")
            if self._fault:
                self._refuse(*self._fault)
        if self._is_in_body and not self.is_busy() and not self.transport.is_closing():
            self._table.pause_drain(self)

    def eof_received(self) -> None:
        """Hand on the end of the client's bytes."""
        self._inner.eof_received()

    def pause_writing(self) -> None:
        """Hand on that the client does not read."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Hand on that the client reads again."""
        self._inner.resume_writing()

    # -------------------------------------------------------------------------- the parser's events

    def on_message_begin(self) -> None:
        """Start a request."""
        self._n_headers = 0
        if self._head_since is None:  # within a piece that began with another request
            self._head_since = self._table.clock()
        self._inner.on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Hand on a part of the target."""
        self._inner.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header field. Trailers are dropped: uvicorn would add them to the headers."""
        self._n_headers += 1
        if self._n_headers > MAX_HEADERS:
            self._fault = (431, f"headers: expected at most {MAX_HEADERS} fields, found more")
        elif not self._is_in_body:
            self._inner.on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to process a request."""
        self._n_silent = self._n_wire = 0
        self._is_in_body, self._head_since = True, None
        if len(self._inner.pipeline) >= MAX_PIPELINED:
            self._fault = (503, "requests: expected one at a time on this connection")
        if not self._fault:
            self._table.mark_busy(self)
            self._inner.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a part of the body."""
        self._n_silent = 0
        if not self._fault:
            self._inner.on_body(body)

    def on_message_complete(self) -> None:
        """Hand on the end of the body."""
        self._n_silent = self._n_wire = 0
        self._is_in_body, self._drain_since = False, None
        if not self._fault:
            self._inner.on_message_complete()

    # ------------------------------------------------------------------------------------- its time

    def is_busy(self) -> bool:
        """Return whether a request of this connection is in progress."""
        cycle = self._inner.cycle
        return cycle is not None and not cycle.response_complete

    def expire(self, now: float) -> None:
        """Close the connection if its head, its refused body or its closing takes too long."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since >= LINGER_SECONDS:
                self.transport.abort()  # the client does not take the last bytes
        elif self.is_busy():
            if self._head_since is not None:
                self._head_since = now  # of a request that follows; it is not read meanwhile
        elif self._is_in_body:
            self._drain_since = self._drain_since or now
            if now - self._drain_since >= LINGER_SECONDS:
                self.transport.close()
        elif self._head_since is not None:
            seconds = self._limits.header_seconds
            if now - self._head_since >= seconds:
                self._refuse(408, f"headers: expected their end within {seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Send an error and close.

        Only close within another response, after the response of a body, or if nothing was sent.
        """
        if self.is_busy() or self._is_in_body or (status == 408 and not self._n_silent):
            self.transport.abort()
            return
        content = format_error(status, "invalid_request_error", message)
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n" % (status, _REASONS[status], len(content)) + content
        )
        self.transport.close()


def group_address(peer: Any) -> str:
    """Return the address that a client is counted by: IPv4, or the /64 network of IPv6.

    peer: the socket's peer name, (host, port, ...); "" for a socket without one.
    """
    if not peer:
        return ""
    try:
        address = ip_address(peer[0].partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return f"{int(address) >> _IPV6_NETWORK_BITS:x}::/{_IPV6_NETWORK_BITS}"
    return str(address)


def reserve_files(connections: int, running: int) -> int:
    """Raise this process's soft limit of open files as far as needed and allowed.

    Returns the connections that fit: each takes a descriptor, and so does every request at an
    engine. At least MIN_CONNECTIONS.
    """
    needed = connections + running + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft < allowed:
        soft = allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(MIN_CONNECTIONS, min(connections, soft - running - RESERVED_FILES))
