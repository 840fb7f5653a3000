"""The engine's process, from its start to its end, and the gateway before it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from quantkit.errors import QuantkitError, UsageError

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 60
"""What an engine gets to finish its answers before it is killed."""
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


@contextmanager
def process(
    words: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """An engine's process in a group of its own, ended with everything it started; UsageError when it is not there."""
    try:
        started = subprocess.Popen(
            words, env=dict(environment), start_new_session=True, preexec_fn=ending_with_us()
        )
    except FileNotFoundError as fault:
        raise UsageError(
            f"{words[0]}: expected this engine in the environment, found none; install it"
        ) from fault
    try:
        yield started
    finally:
        end(started)


def ending_with_us() -> Callable[[], None] | None:
    """What a child does first: ask for SIGTERM when we are gone, even by SIGKILL; None where only Linux can."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible
    return lambda: prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def end(started: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what is still there after a while, to the whole group."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
        try:
            os.killpg(started.pid, number)
            started.wait(seconds)
        except ProcessLookupError:
            started.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
        return


def wait_ready(
    started: subprocess.Popen[bytes], port: int, seconds: float, tell: Callable[[str], None]
) -> None:
    """Until the engine answers /health; QuantkitError when it ends or stays silent."""
    began, told = time.monotonic(), 0
    while not is_responding(f"http://{LOOPBACK}:{port}/health"):
        if started.poll() is not None:
            raise QuantkitError(
                f"the engine ended with {started.returncode} before it answered; its messages are above"
            )
        waited = time.monotonic() - began
        if waited > seconds:
            raise QuantkitError(
                f"the engine did not answer on port {port} within {seconds:.0f} s; see --start-seconds"
            )
        if waited > 60 * (told + 1):
            told += 1
            tell(f"waiting for the engine: {told} min")
        time.sleep(0.2)


def is_responding(url: str) -> bool:
    """Whether a GET succeeds."""
    import httpx2

    try:
        return httpx2.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


def find_free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """The base of the API there; an IPv6 address stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_port(host: str, port: int) -> None:
    """UsageError when somebody listens there already: an engine would find out after minutes of loading."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]  # IPv4 or IPv6
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as fault:
        raise UsageError(
            f"--port {port}: expected a free port on {host}, found: {fault.strerror}; name another"
        ) from fault


def server_of(app: Any, host: str, port: int) -> Any:
    """A server for an ASGI application; `run` stays until SIGINT, SIGTERM or `should_exit`, and ends its answers."""
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws="none",
        backlog=4096,
        timeout_keep_alive=75,  # longer than load balancers keep theirs
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return uvicorn.Server(config)


def watch(started: subprocess.Popen[bytes], ended: Callable[[int], None]) -> None:
    """Call `ended` in a thread of its own when the engine ends."""
    threading.Thread(target=lambda: ended(started.wait()), daemon=True).start()


def own_command(words: Sequence[str]) -> list[str]:
    """A command of this program, for a process of its own: by this Python, whatever PATH says."""
    return [sys.executable, "-m", "quantkit", *words[1:], "--no-verify"]
