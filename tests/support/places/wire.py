"""TCP proxy that cuts connections or changes bytes, by a seed."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable

Corruptor = Callable[[bytes, int], bytes | None]
"""Returns the changed piece of a stream at an offset; None cuts the connection before it."""


class Proxy:
    """Forwards one loopback port to another and counts connections and bytes."""

    def __init__(
        self, port: int, *, up: Corruptor | None = None, down: Corruptor | None = None
    ) -> None:
        self._target, self._up, self._down = port, up, down
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.carried = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        offsets = {client: 0, server: 0}
        ways = {client: (server, self._up), server: (client, self._down)}
        waiting = selectors.DefaultSelector()  # select() ends at 1,024 open files
        for each in ways:
            waiting.register(each, selectors.EVENT_READ)
        try:
            while True:
                for source in [key.fileobj for key, _ in waiting.select(30)]:
                    assert isinstance(source, socket.socket)
                    piece = source.recv(1 << 16)
                    sink, spoil = ways[source]
                    if not piece:
                        return
                    kept = spoil(piece, offsets[source]) if spoil else piece
                    if kept is None:
                        reset_connection(client)
                        return
                    offsets[source] += len(piece)
                    self.carried += len(kept)
                    sink.sendall(kept)
        except OSError:
            return
        finally:
            waiting.close()
            client.close()
            server.close()


def reset_connection(connection: socket.socket) -> None:
    """Reset a connection, as a broken network does."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Cuts:
    """Cuts a connection after a random number of bytes since the last cut, at most `most` times."""

    def __init__(self, seed: int, most: int, mean_bytes: int) -> None:
        self._draw, self.left, self.made, self._mean = random.Random(seed), most, 0, mean_bytes
        self._lock = threading.Lock()
        self._next = self._drawn()

    def _drawn(self) -> int:
        return self._draw.randrange(1, 2 * self._mean)

    def __call__(self, piece: bytes, _: int) -> bytes | None:
        with self._lock:
            if not self.left:
                return piece
            self._next -= len(piece)
            if self._next > 0:
                return piece
            self.left, self.made, self._next = self.left - 1, self.made + 1, self._drawn()
            return None


class Flips:
    """Changes a bit in the middle of long pieces (bodies, not headers), at most `most` times."""

    def __init__(self, most: int) -> None:
        self.left, self.made = most, 0
        self._lock = threading.Lock()

    def __call__(self, piece: bytes, _: int) -> bytes:
        with self._lock:
            if not self.left or len(piece) < 1 << 15:
                return piece
            self.left, self.made = self.left - 1, self.made + 1
        at = len(piece) // 2
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]


class Slow:
    """Limits the rate over all connections."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._lock = bytes_per_second, threading.Lock()

    def __call__(self, piece: bytes, _: int) -> bytes:
        with self._lock:
            time.sleep(len(piece) / self._rate)
        return piece
