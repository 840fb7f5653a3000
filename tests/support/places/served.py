"""Threaded HTTP/1.1 server around a function of the request, for fake services."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class HttpResponse:
    """An HTTP response."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def make_json_response(
    status: int, value: object, headers: Mapping[str, str] | None = None
) -> HttpResponse:
    """Make a JSON response."""
    return HttpResponse(
        status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
    )


@dataclass
class HttpRequest:
    """An HTTP request; `read` returns the body in pieces and ends early if the client does."""

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    read: Callable[[], bytes]

    def body(self) -> bytes:
        """Return the whole body."""
        return b"".join(iter(self.read, b""))


class HttpServer:
    """A server on a free port."""

    def __init__(self, answer: Callable[[HttpRequest], HttpResponse]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = (
                1 << 16
            )  # head and body in one packet: without, each answer waits 40 ms for the client's ACK

            def do(self) -> None:
                parts = urlsplit(self.path)
                query = {
                    key: values[0]
                    for key, values in parse_qs(parts.query, keep_blank_values=True).items()
                }
                request = HttpRequest(
                    self.command, unquote(parts.path), query, self.headers, make_body_reader(self)
                )
                response = select_range(answer(request), self.headers.get("Range"))
                while request.read():  # read the rest, so the connection stays usable
                    pass
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in response.headers:
                    self.send_header("Content-Length", str(len(response.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(response.body)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do

            def log_message(self, format: str, *values: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a broken connection

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()


def make_body_reader(handler: BaseHTTPRequestHandler) -> Callable[[], bytes]:
    """Return a reader of the body by length or chunks; it returns b"" at the end or on
    disconnect.
    """
    left = int(handler.headers.get("Content-Length") or 0)
    chunked = "chunked" in handler.headers.get("Transfer-Encoding", "")

    def read() -> bytes:
        nonlocal left, chunked
        if chunked:
            n_bytes = int(handler.rfile.readline().strip() or b"0", 16)
            piece = handler.rfile.read(n_bytes)
            handler.rfile.readline()
            chunked = bool(n_bytes)
            return piece
        piece = handler.rfile.read1(min(left, 1 << 16)) if left else b""
        left = left - len(piece) if piece else 0
        return piece

    return read


def select_range(answer: HttpResponse, range_header: str | None) -> HttpResponse:
    """Return the part that a Range header selects."""
    if answer.status != 200 or not range_header:
        return answer
    first, _, last = range_header.removeprefix("bytes=").partition("-")
    total = len(answer.body)
    if int(first) >= total:
        return HttpResponse(416, b"", {"Content-Range": f"bytes */{total}"})
    part = answer.body[int(first) : int(last or total) + 1]
    content_range = f"bytes {first}-{int(first) + len(part) - 1}/{total}"
    return HttpResponse(206, part, {**answer.headers, "Content-Range": content_range})
