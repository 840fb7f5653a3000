"""Bounded answers of servers: bytes, encoding, time and rate, for every client of httpx2.

A server is a stranger: an answer may be a compressed bomb, endless, or one byte per second. Event
hooks wrap the body of each answer, redirects and errors included, before a library reads it. Bytes
are counted as they come from the socket; compressed bodies are refused, and identity is requested,
so the bytes in memory are those on the wire.

httpx2 bounds the silence between two reads and the bytes of the head (100 kB); `call_with_deadline`
bounds the time until the head is complete.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import httpx2

from quantkit.io.files import shorten_repr
from quantkit.io.retry import ResponseRefused, TransientError

LIMITS_KEY = "quantkit_limits"
"""Key of a request's extensions with the limits of its answer."""
MIN_BYTES_PER_SECOND = 1_000
"""Least mean rate of a file: a tenth of the slowest mobile links. 1 GB then takes 12 days at most;
slower servers look alive for ever.
"""
RATE_WINDOW_SECONDS = 30.0
"""Time over which the rate is measured: links stall for seconds."""
HEAD_SECONDS = 120.0
"""Time until the head of an answer is complete; registries answer in seconds, cold ones in tens."""
IDENTITY = {"Accept-Encoding": "identity"}
"""Header that requests plain bytes; a client of httpx2 requests compressed ones by default."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseLimits:
    """Limits of one answer.

    n_bytes: of the body; n_values: of its JSON, counted as bytes that begin one, None for a file;
    seconds: for the whole body, None where the rate bounds it; bytes_per_second: least mean rate
    over RATE_WINDOW_SECONDS, 0 for a server that computes.
    """

    n_bytes: int
    n_values: int | None = None
    seconds: float | None = None
    bytes_per_second: int = MIN_BYTES_PER_SECOND


MAX_VALUES = 1_000_000
"""Values of an answer in JSON; each takes 60 to 100 bytes of memory, and 3 on the wire. A stream of
64,000 tokens has 800,000.
"""
SMALL_ANSWER = ResponseLimits(n_bytes=4_000_000, n_values=MAX_VALUES, seconds=60.0)
"""JSON and errors: registries bound their manifests by 4 MiB."""


@dataclass(kw_only=True, slots=True)
class BodyMeter:
    """Bytes and time of one body; mutable."""

    limits: ResponseLimits
    clock: Callable[[], float] = time.monotonic
    n_bytes: int = 0
    n_values: int = 0
    _began: float = field(init=False)
    _window: float = field(init=False)
    _before: int = 0  # bytes at the start of the window

    def __post_init__(self) -> None:
        self._began = self._window = self.clock()

    def count(self, piece: bytes) -> None:
        """Count received bytes.

        Raises ResponseRefused for too many, TransientError if they come too slowly.
        """
        self.n_bytes += len(piece)
        limits, now = self.limits, self.clock()
        if limits.n_values is not None:
            self.n_values += sum(map(piece.count, (b",", b"[", b"{")))
            if self.n_values > limits.n_values:
                raise ResponseRefused(f"expected at most {limits.n_values:,} values, found more")
        if self.n_bytes > limits.n_bytes:
            raise ResponseRefused(f"expected at most {limits.n_bytes:,} bytes, found more")
        if limits.seconds is not None and now - self._began > limits.seconds:
            raise TransientError(f"the answer took more than {limits.seconds:.0f} seconds")
        elapsed = now - self._window
        if elapsed >= RATE_WINDOW_SECONDS:
            if self.n_bytes - self._before < limits.bytes_per_second * elapsed:
                raise TransientError(
                    f"the server sent less than {limits.bytes_per_second:,} bytes per second"
                )
            self._window, self._before = now, self.n_bytes


class BoundedStream(httpx2.SyncByteStream):
    """The body of an answer, counted."""

    def __init__(self, stream: httpx2.SyncByteStream, meter: BodyMeter) -> None:
        self._stream, self._meter = stream, meter

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._meter.count(piece)
            yield piece

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


class BoundedAsyncStream(httpx2.AsyncByteStream):
    """The body of an answer, counted."""

    def __init__(self, stream: httpx2.AsyncByteStream, meter: BodyMeter) -> None:
        self._stream, self._meter = stream, meter

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._meter.count(piece)
            yield piece

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()


def bound_response(response: httpx2.Response, default: ResponseLimits = SMALL_ANSWER) -> None:
    """Bound the body of an answer, as an event hook of a client.

    The limits are those of the request's extensions, else `default`. Raises ResponseRefused for a
    compressed body and for one that declares more bytes.
    """
    meter = make_meter(response, default)
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = BoundedStream(response.stream, meter)


def make_async_hook(limits: ResponseLimits) -> Callable[[httpx2.Response], object]:
    """Return the event hook of an asynchronous client, which bounds each answer."""

    async def bound(response: httpx2.Response) -> None:
        meter = make_meter(response, limits)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = BoundedAsyncStream(response.stream, meter)

    return bound


def make_meter(response: httpx2.Response, default: ResponseLimits) -> BodyMeter:
    """Check the head of an answer and return the meter of its body; raises ResponseRefused."""
    limits = response.request.extensions.get(LIMITS_KEY, default)
    assert isinstance(limits, ResponseLimits)
    if response.status_code >= 300:  # a redirect or an error, whose body is held in memory
        limits = SMALL_ANSWER
    if response.request.method != "HEAD":  # whose head describes a body that does not follow
        encoding = response.headers.get("Content-Encoding", "")
        if encoding.strip().lower() not in {"", "identity"}:
            raise ResponseRefused(
                f"expected an answer that is not compressed, found {shorten_repr(encoding)}"
            )
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) > limits.n_bytes:
            raise ResponseRefused(
                f"expected at most {limits.n_bytes:,} bytes, found {shorten_repr(length)}"
            )
    return BodyMeter(limits=limits)


def call_with_deadline(work: Callable[[], Result], seconds: float = HEAD_SECONDS) -> Result:
    """Return what `work` returns; raises TransientError if that takes longer.

    The thread that still waits for the server is a daemon and ends with its connection.
    """
    done = queue.SimpleQueue[tuple[bool, Result | BaseException]]()

    def run() -> None:
        try:
            done.put((True, work()))
        except BaseException as fault:  # noqa: BLE001  # raised in the waiting thread
            done.put((False, fault))

    threading.Thread(target=run, daemon=True).start()
    try:
        is_result, value = done.get(timeout=seconds)
    except queue.Empty:
        raise TransientError(f"the server did not answer in {seconds:.0f} seconds") from None
    if not is_result:
        assert isinstance(value, BaseException)
        raise value
    return value  # type: ignore[return-value]  # the queue holds a result with True
