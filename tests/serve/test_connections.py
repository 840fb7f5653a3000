"""Bounds on heads, bodies and connections of clients without a key, over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from support.gateway_front import POST, run_front, wait_until

from quantkit.serve.engines.engine_process import LOG_LINES, LogLimit, make_server
from quantkit.serve.gateway import connections
from quantkit.serve.gateway.connections import ConnectionTable, group_address, reserve_files
from quantkit.serve.gateway.settings import Limits

HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


def read_end(raw: socket.socket) -> bytes:
    """Return the bytes that a connection receives until it is closed or reset."""
    content = b""
    try:
        while piece := raw.recv(65536):
            content += piece
    except ConnectionResetError:
        pass
    return content


def send_until_closed(raw: socket.socket, piece: bytes, n_bytes: int) -> int:
    """Send pieces; return the bytes sent when the server closed, at most `n_bytes`."""
    sent = 0
    try:
        while sent < n_bytes:
            raw.sendall(piece)
            sent += len(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


# ---------------------------------------------------------------------------------------- heads

UNENDING = {
    "header value": (HEAD + b"x: ", b"a" * 65536),
    "header name": (HEAD, b"a" * 65536),
    "target": (b"GET /", b"a" * 65536),
    "many headers": (HEAD, b"a: b\r\n" * 10000),
    "empty lines": (b"", b"\r\n" * 32768),
    "after a request": (HEAD + b"\r\n" + HEAD + b"x: ", b"a" * 65536),
    "chunk extension": (POST + b"transfer-encoding: chunked\r\n\r\n1;x=", b"a" * 65536),
    "trailer": (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ", b"a" * 65536),
    "tiny chunks": (POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 10000),
    "requests in advance": (POST + b"content-length: 2\r\n\r\n{}", (HEAD + b"\r\n") * 1000),
}


@pytest.mark.parametrize("case", UNENDING)
def test_unending_head_is_cut_off_within_a_few_megabytes(case: str) -> None:
    """The bytes in flight are the kernel's: both socket buffers."""
    start, piece = UNENDING[case]
    with run_front(body_bytes=1_000_000) as front, front.connect() as raw:
        raw.sendall(start)
        assert send_until_closed(raw, piece, 100_000_000) < 40_000_000
        assert front.is_healthy()


def test_largest_head_is_served_and_one_byte_more_returns_431() -> None:
    with run_front(header_bytes=4096) as front:
        padding = 4096 - len(HEAD) - len(b"x: \r\n\r\n")
        for size, expected in ((padding, b"200 OK"), (padding + 1, b"431 Header Fields Too Large")):
            for pause in (0.0, 0.05):  # in one piece, and in two
                with front.connect() as raw:
                    head = HEAD + b"connection: close\r\nx: "
                    head += b"a" * (size - len(b"connection: close\r\n")) + b"\r\n\r\n"
                    raw.sendall(head[:1000])
                    time.sleep(pause)
                    raw.sendall(head[1000:])
                    content = read_end(raw)
                assert content.startswith(b"HTTP/1.1 " + expected)
        assert b"headers: expected at most 4096 bytes, found more" in content


def test_too_many_header_fields_return_431() -> None:
    with run_front() as front:
        fields = {f"x-{n}": "1" for n in range(connections.MAX_HEADERS - 20)}
        assert httpx2.get(f"{front.root}/health", headers=fields).status_code == 200
        fields |= {f"y-{n}": "1" for n in range(40)}
        refused = httpx2.get(f"{front.root}/health", headers=fields)
        assert refused.status_code == 431
        assert "expected at most 128 fields" in refused.json()["error"]["message"]


@pytest.mark.parametrize("start", [HEAD + b"x: y", b"\r\n", HEAD + b"\r\n" + HEAD])
def test_slow_head_is_closed_however_often_a_byte_arrives(start: bytes) -> None:
    with run_front(header_seconds=0.5) as front, front.connect() as raw:
        raw.sendall(start)
        began = time.monotonic()
        byte = b"\r\n" if start == b"\r\n" else b"y"
        try:
            while time.monotonic() - began < 20:
                raw.sendall(byte)
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert time.monotonic() - began < 15
        wait_until(lambda: not front.table.guards)


def test_silent_connection_and_half_a_head_are_closed() -> None:
    with run_front(header_seconds=0.3) as front:
        with front.connect() as silent, front.connect() as half, front.connect() as later:
            half.sendall(HEAD)
            later.sendall(HEAD + b"\r\n" + HEAD)  # a request, and half a head in the same piece
            assert read_end(half).startswith(b"HTTP/1.1 408 ")
            assert read_end(silent) == b""
            assert read_end(later).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: not front.table.guards)


def test_slow_stream_outlives_the_time_of_a_head() -> None:
    """Half a head of the next request, sent within a stream, does not end the stream."""
    plan = json.dumps({"prompt": json.dumps({"tokens": 8, "pause": 0.2}), "stream": True}).encode()
    with run_front(header_seconds=0.3) as front, front.connect() as raw:
        raw.sendall(POST + b"content-length: %d\r\n\r\n" % len(plan) + plan)
        raw.recv(10)
        raw.sendall(HEAD)
        assert b"data: [DONE]" in read_end(raw)


def test_body_after_an_early_answer_is_discarded_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)
    with run_front(body_bytes=1_000_000) as front:
        with front.connect() as raw:
            raw.sendall(POST + b"content-length: 999999999\r\n\r\n")
            content = raw.recv(65536)
            assert content.startswith(b"HTTP/1.1 413")
            assert send_until_closed(raw, b"a" * 65536, 100_000_000) < 40_000_000
            assert (content + read_end(raw)).count(b"HTTP/1.1") == 1
        with front.connect() as raw:  # not a byte of it
            raw.sendall(POST + b"content-length: 999999999\r\n\r\n")
            assert read_end(raw).startswith(b"HTTP/1.1 413")
        wait_until(lambda: not front.table.guards)


# -------------------------------------------------------------------------------------- connections


def test_new_client_replaces_the_oldest_half_sent_head() -> None:
    with run_front(connections=40, connections_per_address=0) as front, ExitStack() as stack:
        held = [stack.enter_context(front.connect()) for _ in range(100)]
        for raw in held[:40]:
            raw.sendall(HEAD)
        assert front.is_healthy()
        wait_until(lambda: len(front.table.guards) <= 40)
        assert read_end(held[0]) == b""


def test_one_address_has_its_own_bound() -> None:
    with run_front(connections=60, connections_per_address=20) as front, ExitStack() as stack:
        other = stack.enter_context(front.connect("127.0.0.9"))
        other.sendall(HEAD)
        for _ in range(100):
            stack.enter_context(front.connect("127.0.0.2")).sendall(HEAD)
        wait_until(lambda: len(front.table.guards) == 21)
        other.sendall(b"\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"


def test_crowd_of_one_address_gives_way_first() -> None:
    with run_front(connections=40, connections_per_address=0) as front, ExitStack() as stack:
        other = stack.enter_context(front.connect("127.0.0.9"))
        other.sendall(HEAD)
        for _ in range(100):
            stack.enter_context(front.connect("127.0.0.2")).sendall(HEAD)
        assert front.is_healthy()
        other.sendall(b"\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"


def test_streams_are_never_replaced_and_a_full_table_returns_503() -> None:
    body = json.dumps({"prompt": json.dumps({"hold": True}), "stream": True}).encode()
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    with run_front(connections=16, connections_per_address=0) as front, ExitStack() as stack:
        held = [stack.enter_context(front.connect()) for _ in range(16)]
        for raw in held:
            raw.sendall(request)
        wait_until(lambda: len(front.engine.asked) == 16)
        with front.connect() as late:
            late.sendall(HEAD + b"\r\n")
            assert read_end(late).startswith(b"HTTP/1.1 503 ")
        front.engine.released.set()
        for raw in held:
            content = b""
            while b"data: [DONE]" not in content:
                content += raw.recv(65536)
        wait_until(front.is_healthy)


@pytest.mark.parametrize(
    ("peer", "group"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3::4", 1, 0, 0), "20010db800010002::/64"),
        (("2001:db8:1:2:9::9", 1, 0, 0), "20010db800010002::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80000000000000::/64"),
        (None, ""),
        (("not an address", 1), ""),
    ],
)
def test_addresses_are_counted_by_network(peer: Any, group: str) -> None:
    assert group_address(peer) == group


def test_connections_fit_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: applied.append(pair))
    for allowed, connections_kept, raised in (
        ((1024, 1_048_576), 4096, [(4096 + 10 + 64, 1_048_576)]),
        ((256, 1024), 1024 - 10 - 64, [(1024, 1024)]),
        ((20_000, 20_000), 4096, []),
        ((64, 64), connections.MIN_CONNECTIONS, []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, []),
    ):
        applied.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, pair=allowed: pair)
        assert reserve_files(4096, 10) == connections_kept
        assert applied == raised


class IdleGuard:
    """A connection without sockets."""

    address = "a"

    def is_busy(self) -> bool:
        return False

    def expire(self, now: float) -> None:
        assert now


def test_sweep_ends_with_the_last_connection() -> None:
    """No timer stays, and the next connection starts one again."""

    async def scenario() -> None:
        table = ConnectionTable(Limits(header_seconds=0.04))
        for _ in range(2):
            guard: Any = IdleGuard()
            assert table.add(guard) and table._is_sweeping
            await asyncio.sleep(0.05)
            table.remove(guard)
            table.remove(guard)
            await asyncio.sleep(0.05)
            assert not table._is_sweeping and not table._idle and not table._counts

    asyncio.run(scenario())


def test_requests_that_are_no_http_fill_no_log() -> None:
    seconds = iter([0.0] * 100 + [1.0] * 100)
    limit = LogLimit(lambda: next(seconds))
    record = logging.makeLogRecord({"msg": "Invalid HTTP request received."})
    assert sum(limit(record) for _ in range(200)) == 2 * LOG_LINES
    make_server(lambda: None, "127.0.0.1", 0, Limits())
    filters = logging.getLogger("uvicorn.error").filters
    assert isinstance(filters.pop(), LogLimit)
