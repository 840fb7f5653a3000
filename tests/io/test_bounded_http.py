"""Answers of servers are bounded in bytes, encoding, time and rate, as counted on the socket."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx2
import pytest
from support.places.raw_server import Serve, endless, make_head, repeat

from quantkit.io import bounded_http
from quantkit.io.bounded_http import (
    IDENTITY,
    LIMITS_KEY,
    BodyMeter,
    ResponseLimits,
    bound_response,
    call_with_deadline,
    make_async_hook,
)
from quantkit.io.retry import ResponseRefused, TransientError

LIMIT = 200_000
BUFFERS = 16_000_000
"""Bytes that the sockets of both sides may hold; an endless answer sends gigabytes."""
LIMITS = ResponseLimits(n_bytes=LIMIT, seconds=60.0)


def make_client(limits: ResponseLimits = LIMITS) -> httpx2.Client:
    """Return a client with bounded answers."""
    hook = partial(bound_response, default=limits)
    return httpx2.Client(headers=IDENTITY, follow_redirects=True, event_hooks={"response": [hook]})


def get_async(url: str) -> bytes:
    """Fetch with a bounded asynchronous client."""

    async def get() -> bytes:
        hooks = {"response": [make_async_hook(LIMITS)]}
        async with httpx2.AsyncClient(headers=IDENTITY, event_hooks=hooks) as client:
            return (await client.get(url)).content

    return asyncio.run(get())


def get(url: str) -> bytes:
    """Fetch with a bounded client."""
    with make_client() as client:
        return client.get(url).content


@pytest.mark.parametrize("fetch", [get, get_async])
def test_plain_answer_is_read(fetch: Callable[[str], bytes], serve: Serve) -> None:
    server = serve(lambda *_: [make_head(), b"x" * LIMIT])
    assert fetch(server.url) == b"x" * LIMIT
    assert b"accept-encoding: identity" in server.heads[0].lower()


@pytest.mark.parametrize("fetch", [get, get_async])
@pytest.mark.parametrize("status", [200, 302, 401, 500])
def test_endless_answer_is_refused_after_its_bytes(
    status: int, fetch: Callable[[str], bytes], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors and redirects, which a library reads on its own, too."""
    monkeypatch.setattr(bounded_http, "SMALL_ANSWER", LIMITS)
    counted: list[int] = []
    real = BodyMeter.count

    def count(meter: BodyMeter, piece: bytes) -> None:
        counted.append(len(piece))
        real(meter, piece)

    monkeypatch.setattr(BodyMeter, "count", count)
    server = serve(lambda *_: endless(status=status, Location="/x"))
    with pytest.raises(ResponseRefused, match="expected at most 200,000 bytes, found more"):
        fetch(server.url)
    assert LIMIT < sum(counted) < LIMIT + 200_000
    assert server.sent < BUFFERS


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
def test_compressed_answer_is_refused_before_it_is_read(encoding: str, serve: Serve) -> None:
    """A bomb of 1 MB would become 1 GB."""
    bomb = gzip.compress(bytes(10_000_000))
    server = serve(lambda *_: [make_head(Content_Encoding=encoding), bomb])
    for fetch in (get, get_async):
        with pytest.raises(ResponseRefused, match="expected an answer that is not compressed"):
            fetch(server.url)


def test_declared_length_is_refused_before_the_body_is_read(serve: Serve) -> None:
    server = serve(lambda *_: endless(Content_Length="9" * 19))
    with pytest.raises(ResponseRefused, match="expected at most 200,000 bytes, found '9999"):
        get(server.url)
    assert server.sent < BUFFERS


def test_limits_of_a_request_replace_those_of_the_client(serve: Serve) -> None:
    """But not for errors, which are held in memory."""
    server = serve(lambda _, path: [make_head(500 if path == "/bad" else 200), b"x" * LIMIT * 30])
    large = {LIMITS_KEY: ResponseLimits(n_bytes=LIMIT * 30)}
    with make_client() as client:
        request = client.build_request("GET", server.url, extensions=large)
        assert len(client.send(request).content) == LIMIT * 30
        request = client.build_request("GET", f"{server.url}/bad", extensions=large)
        with pytest.raises(ResponseRefused, match="at most 4,000,000 bytes"):
            client.send(request)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,"])
def test_values_of_an_answer_are_counted(piece: bytes, serve: Serve) -> None:
    """A megabyte of empty lists takes thirty in memory."""
    limits = ResponseLimits(n_bytes=10**8, n_values=10_000)
    server = serve(lambda *_: [make_head(), piece * 10_001])
    with (
        make_client(limits) as client,
        pytest.raises(ResponseRefused, match="expected at most 10,000 values, found more"),
    ):
        client.get(server.url)
    meter = BodyMeter(limits=ResponseLimits(n_bytes=10**8))
    meter.count(piece * 100_000)  # a file


def test_endless_head_is_refused(serve: Serve) -> None:
    def answer(*_: str) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n"
        yield from repeat(b"a: " + b"b" * 1000 + b"\r\n")

    server = serve(answer)
    with pytest.raises(httpx2.RemoteProtocolError):
        get(server.url)
    assert server.sent < BUFFERS


def count_at(meter: BodyMeter, times: list[float], n_bytes: int, clock: list[float]) -> None:
    """Count bytes at each of these times."""
    for moment in times:
        clock[0] = moment
        meter.count(bytes(n_bytes))


def test_one_byte_per_second_is_given_up() -> None:
    """After the window, whatever the bytes so far; the clock is the test's."""
    clock = [0.0]
    limits = ResponseLimits(n_bytes=10**12)
    meter = BodyMeter(limits=limits, clock=lambda: clock[0])
    meter.count(bytes(10**6))
    with pytest.raises(TransientError, match="less than 1,000 bytes per second"):
        count_at(meter, [float(second) for second in range(1, 100)], 1, clock)
    assert clock[0] == 60.0  # the first window had a megabyte


def test_slow_but_steady_answer_is_read() -> None:
    clock = [0.0]
    meter = BodyMeter(limits=ResponseLimits(n_bytes=10**12), clock=lambda: clock[0])
    count_at(meter, [10.0 * step for step in range(1, 1000)], 10_000, clock)
    assert meter.n_bytes == 9_990_000


def test_whole_body_has_a_deadline() -> None:
    """A model computes between two tokens: its answers have no least rate, but an end."""
    clock = [0.0]
    limits = ResponseLimits(n_bytes=10**6, seconds=100.0, bytes_per_second=0)
    meter = BodyMeter(limits=limits, clock=lambda: clock[0])
    with pytest.raises(TransientError, match="took more than 100 seconds"):
        count_at(meter, [40.0, 80.0, 101.0], 1, clock)


def test_head_that_never_ends_has_a_deadline(serve: Serve) -> None:
    """Byte after byte, or one interim answer after another: no read ever waits."""

    def answer(_: str, path: str) -> Iterator[bytes]:
        if path == "/interim":
            yield from repeat(b"HTTP/1.1 102 X\r\n\r\n")
        yield b"HTTP/1.1 200 OK\r\na: "
        while True:
            time.sleep(0.01)
            yield b"b"

    server = serve(answer)
    for path in ("/slow", "/interim"):
        with (
            make_client() as client,
            pytest.raises(TransientError, match="did not answer in 0 seconds"),
        ):
            call_with_deadline(partial(client.get, server.url + path), 0.3)


def test_call_with_deadline_returns_and_raises_as_the_call_does() -> None:
    assert call_with_deadline(lambda: 7) == 7
    with pytest.raises(KeyError):
        call_with_deadline(lambda: {}["x"])
