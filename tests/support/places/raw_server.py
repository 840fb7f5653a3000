"""A server that sends raw bytes, as a hostile one could, and counts them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

Answer = Callable[[str, str], Iterable[bytes]]
"""(method, path) -> the pieces of a response."""


class RawServer:
    """Answers each request with the pieces of `answer(method, path)` until the client leaves.

    `requests`: lines of request heads; `sent`: bytes that the client's side has taken, with what
    lies in socket buffers.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer, self.sent = answer, 0
        self.requests: list[str] = []
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(65536)
                if not piece:
                    return
                head += piece
            line = head.split(b"\r\n", 1)[0].decode()
            self.requests.append(line)
            self.heads.append(head)
            method, path, _ = line.split(" ", 2)
            for piece in self.answer(method, path):
                connection.sendall(piece)
                self.sent += len(piece)


def make_head(status: int = 200, **headers: str) -> bytes:
    """Return the head of an answer that ends with its connection."""
    lines = [f"HTTP/1.1 {status} X", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def repeat(piece: bytes = b" " * 65536) -> Iterator[bytes]:
    """Yield a piece for ever."""
    while True:
        yield piece


def endless(**headers: str) -> Iterator[bytes]:
    """Yield a head and a body that does not end."""
    yield make_head(**headers)
    yield from repeat()


Serve = Callable[[Answer], RawServer]
"""The fixture `serve`."""
