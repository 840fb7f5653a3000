"""The process of an engine, from its start to its end, and the server of a gateway."""

from __future__ import annotations

import ctypes
import logging
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
from quantkit.serve.gateway.settings import Limits

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 60
"""Seconds that an engine has to finish its responses before SIGKILL."""
LOG_LINES = 10
"""Lines of a server's log in a second."""
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


@contextmanager
def run_process(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an engine in a process group of its own, and stop the whole group at the end.

    Raises UsageError if the program is not installed.
    """
    try:
        process = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, preexec_fn=make_preexec()
        )
    except FileNotFoundError as fault:
        raise UsageError(
            f"{command[0]}: expected this engine in the environment, found none; install it"
        ) from fault
    try:
        yield process
    finally:
        stop_process(process)


def make_preexec() -> Callable[[], None] | None:
    """Return a function for the child that requests SIGTERM at this process's end, even by SIGKILL.

    None except on Linux.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # resolved before the fork: as little as possible after it
    return lambda: prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the whole group, and SIGKILL after STOP_SECONDS."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue
        return


def wait_ready(
    process: subprocess.Popen[bytes], port: int, seconds: float, log: Callable[[str], None]
) -> None:
    """Wait until the engine answers /health; QuantkitError if it ends or times out."""
    if wait_answer(process, (f"http://{LOOPBACK}:{port}/health",), seconds, log):
        return
    if process.poll() is not None:
        raise QuantkitError(
            f"the engine exited with {process.returncode} before it was ready; "
            "its messages are above"
        )
    raise QuantkitError(
        f"the engine did not answer on port {port} within {seconds:.0f} s; see --start-seconds"
    )


def wait_answer(
    process: subprocess.Popen[bytes],
    urls: Sequence[str],
    seconds: float,
    log: Callable[[str], None],
) -> bool:
    """Wait until the engine answers one of the URLs; False if it ends or the time is over."""
    started, minutes = time.monotonic(), 0
    while not any(map(is_responding, urls)):
        waited = time.monotonic() - started
        if process.poll() is not None or waited > seconds:
            return False
        if waited > 60 * (minutes + 1):
            minutes += 1
            log(f"waiting for the engine: {minutes} min")
        time.sleep(0.2)
    return True


def list_health_urls(command: Sequence[str], host: str, port: int) -> tuple[str, ...]:
    """Return the addresses at which an engine may answer that was started with this command.

    host, port: planned; arguments of the operator come later in the command and replace them.
    """
    host = read_last_flag(command, "--host", host)
    number = read_last_flag(command, "--port", "")
    local = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    base = format_api_url(local, int(number) if number.isdecimal() else port)
    address = base.removeprefix("http").removesuffix("/v1")
    return tuple(f"{scheme}{address}/health" for scheme in ("http", "https"))


def read_last_flag(command: Sequence[str], name: str, default: str) -> str:
    """Return the last value of a flag in a command, "--port 80" or "--port=80"."""
    value = default
    for word, following in zip(command, (*command[1:], ""), strict=True):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def is_responding(url: str) -> bool:
    """Return whether a GET request succeeds; the certificate of https is not checked."""
    import httpx2

    try:
        return httpx2.get(url, timeout=2, trust_env=False, verify=False).status_code == 200
    except (httpx2.TransportError, httpx2.InvalidURL):
        return False


def find_free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def choose_engine_port(port: int) -> int:
    """Return the port of a gateway's engine: the next after the gateway's, or a free one.

    A fixed port lets Prometheus scrape the engine.
    """
    try:
        check_port(LOOPBACK, port + 1)
    except (UsageError, OverflowError):
        return find_free_port()
    return port + 1


def format_api_url(host: str, port: int) -> str:
    """Return the base URL of the API; an IPv6 address gets brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_port(host: str, port: int) -> None:
    """Check that a port is free; an engine would fail only after minutes of loading."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[0]  # IPv4 or IPv6
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as fault:
        raise UsageError(
            f"--port {port}: expected a free port on {host}, found: {fault.strerror}; name another"
        ) from fault


def make_server(app: Any, host: str, port: int, limits: Limits) -> Any:
    """Make the server of an ASGI application, with the limits of connections and heads.

    Its `run` blocks until SIGINT, SIGTERM or `should_exit`, and completes the open responses.
    """
    import uvicorn

    from quantkit.serve.gateway.connections import ConnectionTable

    config = uvicorn.Config(
        app,
        http=ConnectionTable(limits).make_protocol,  # type: ignore[arg-type]
        # uvloop accepts one connection per turn of the loop: clients that reconnect all the time
        # made a health check wait for 15 s. asyncio accepts all that wait.
        loop="asyncio",
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        ws="none",
        backlog=4096,
        timeout_keep_alive=75,  # longer than the keep-alive of load balancers
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    logging.getLogger("uvicorn.error").addFilter(LogLimit())
    return uvicorn.Server(config)


class LogLimit:
    """A filter of a log: at most LOG_LINES lines in a second, so that clients cannot fill a disk.

    The server writes a line for each request that is no HTTP. Mutable.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second, self._n_lines = 0, 0

    def __call__(self, _: logging.LogRecord) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._n_lines = second, 0
        self._n_lines += 1
        return self._n_lines <= LOG_LINES


def watch_process(process: subprocess.Popen[bytes], on_exit: Callable[[int], None]) -> None:
    """Call `on_exit` with the exit status, in a thread of its own, when the engine ends."""
    threading.Thread(target=lambda: on_exit(process.wait()), daemon=True).start()


def make_own_command(command: Sequence[str]) -> list[str]:
    """Return a command of quantkit for this Python, independent of PATH."""
    return [sys.executable, "-m", "quantkit", *command[1:], "--no-verify"]
