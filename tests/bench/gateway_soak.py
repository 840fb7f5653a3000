"""`make bench-gateway-soak`: streams through a gateway that is attacked at the same time.

    PYTHONPATH=tests .venv/bin/python -m bench.gateway_soak [--seconds 60] [--streams 300]
        [--slow 200] [--large 50]

Five processes on loopback: a stub engine, the gateway, the readers of the streams, the attackers,
and this one, which opens a new connection for a health check ten times a second. Slow clients send
a byte of a head every half second and start again when they are disconnected. Large clients send
bodies of 7.8 MB: one in five is valid and forwarded, the others have a million values, equal keys
at their end, or stop before their last byte. The streams begin within ten seconds, and each has a
token per second: on loopback a core of the gateway sends about two thousand. Exits with 1 if a goal
is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

from support import stub_engine

from quantkit.serve.gateway.app import make_app
from quantkit.serve.gateway.connections import ConnectionTable
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream

MEMORY_GOAL = 300e6  # bytes, the peak of the gateway's resident memory
MEDIAN_GOAL, WORST_GOAL = 0.1, 1.0  # seconds of a health check
TOKEN_PAUSE = 1.0
BODY_BYTES = 7_800_000
RAMP_SECONDS = 10.0
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def open_connection(url: str) -> tuple[Reader, Writer]:
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port)


async def repeat(counts: Counter[str], name: str, action: Callable[[], Awaitable[str]]) -> None:
    """Repeat an action until cancelled, and count its outcomes."""
    while True:
        try:
            outcome = await action()
        except OSError:
            outcome = "disconnected"
        counts[f"{name}: {outcome}"] += 1


# ------------------------------------------------------------------------------------------ streams


async def read_stream(url: str, seconds: float, delay: float) -> str:
    """Read one stream; return "ok", or its fault."""
    await asyncio.sleep(delay)
    n_tokens = round(seconds / TOKEN_PAUSE)
    plan = {"tokens": n_tokens, "pause": TOKEN_PAUSE}
    body = json.dumps({"prompt": json.dumps(plan), "stream": True}).encode()
    reader, writer = await open_connection(url)
    writer.write(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    content = await reader.read(-1)
    writer.close()
    head, _, rest = content.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        return head.partition(b"\r\n")[0].decode("latin-1")
    if b"data: [DONE]\n\n" not in rest or b'"error"' in rest:
        return "cut"
    texts = [json.loads(line[6:]) for line in rest.split(b"\n") if line.startswith(b'data: {"id"')]
    said = "".join(text["choices"][0]["text"] for text in texts)
    return "ok" if said == "".join(f"{n} " for n in range(n_tokens)) else "tokens missing"


async def read_streams(url: str, n: int, seconds: float) -> Counter[str]:
    delays = (RAMP_SECONDS * index / n for index in range(n))
    outcomes = await asyncio.gather(
        *(read_stream(url, seconds, delay) for delay in delays), return_exceptions=True
    )
    return Counter(one if isinstance(one, str) else repr(one) for one in outcomes)


# ---------------------------------------------------------------------------------------- attackers


async def send_slow_head(url: str) -> str:
    """Send a byte of a head every half second until the gateway has enough of it."""
    reader, writer = await open_connection(url)
    try:
        writer.write(HEAD + b"x-slow: ")
        end = asyncio.create_task(reader.read(-1))
        while not end.done():
            writer.write(b"a")
            await asyncio.wait({end}, timeout=0.5)
        return (await end)[9:12].decode() or "disconnected"
    finally:
        writer.close()


def make_bodies() -> dict[str, bytes]:
    """Return a body of each kind."""
    start = b'{"prompt": "{}", "x": '
    filling = b'"' + b"word and " * (BODY_BYTES // 9) + b'"'
    return {
        "valid": start + filling + b"}",
        "a million values": start + b"[" + b"[]," * (BODY_BYTES // 3) + b"1]}",
        "a million keys": start + b"[" + b'{"a":1},' * (BODY_BYTES // 8) + b"1]}",
        "equal keys": start + filling + b', "x": 1}',
        "without its end": start + filling,
    }


async def send_large_body(url: str, kind: str, body: bytes) -> str:
    """Send a body; return the status."""
    reader, writer = await open_connection(url)
    try:
        size = len(body) + (kind == "without its end")
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % size)
        answer = asyncio.create_task(reader.readline())
        with suppress(ConnectionError):
            for at in range(0, len(body), 1 << 18):
                writer.write(body[at : at + (1 << 18)])
                await writer.drain()
        status = (await answer)[9:12].decode()
    finally:
        writer.close()
    await asyncio.sleep(1)
    return status


async def attack(url: str, n_slow: int, n_large: int, seconds: float) -> Counter[str]:
    """Attack for some seconds; return the outcomes."""
    counts, bodies = Counter[str](), make_bodies()
    jobs = [repeat(counts, "slow head", lambda: send_slow_head(url)) for _ in range(n_slow)]
    for n in range(n_large):
        kind = [*bodies][n % len(bodies)]
        jobs.append(repeat(
            counts, f"large, {kind}", lambda kind=kind: send_large_body(url, kind, bodies[kind])
        ))  # fmt: skip
    tasks = [asyncio.create_task(job) for job in jobs]
    await asyncio.wait(tasks, timeout=seconds)
    faults = [task.exception() for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not faults, faults[0]
    return counts


# ---------------------------------------------------------------------------------------- measuring


def time_health_check(url: str) -> float:
    """Return the seconds of a health check over a new connection."""
    place = urlsplit(url)
    began = time.perf_counter()
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()
    return time.perf_counter() - began


def read_peak_bytes(pid: int) -> int:
    """Return the peak of a process's resident memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10


def start_part(*arguments: str) -> subprocess.Popen[str]:
    """Start another part of this module, which prints its counts as JSON."""
    command = [sys.executable, "-m", "bench.gateway_soak", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_counts(process: subprocess.Popen[str]) -> Counter[str]:
    """Wait for a part and return its counts."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return Counter(json.loads(output))


def print_goal(name: str, value: float, goal: float, unit: str) -> bool:
    """Print a figure with its goal; return whether it is met."""
    is_met = value < goal
    print(f"{name:32} {value:10.1f} {unit}   goal < {goal:g}: {'met' if is_met else 'MISSED'}")
    return is_met


def measure(options: argparse.Namespace) -> int:
    """Run everything, print the figures; return the exit code."""
    models = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    print(f"{os.cpu_count()} x {models[0] if models else platform.machine()}, load "
          f"{', '.join(f'{one:.1f}' for one in os.getloadavg())}, Python "
          f"{platform.python_version()}; {options.streams} streams for {options.seconds:g} s, "
          f"{options.slow} slow heads, {options.large} large bodies")  # fmt: skip
    checks = list[float]()
    with ExitStack() as stack:
        engine, _ = stack.enter_context(stub_engine.run_process(stub_engine.__file__))
        gateway, pid = stack.enter_context(
            stub_engine.run_process(__file__, "--gateway", engine, str(options.streams + 100))
        )
        idle = read_peak_bytes(pid)
        seconds = str(options.seconds)
        readers = start_part("--read", gateway, str(options.streams), seconds)
        attackers = start_part("--attack", gateway, str(options.slow), str(options.large), seconds)
        while readers.poll() is None:
            checks.append(time_health_check(gateway))
            time.sleep(0.1)
        outcomes, attacks = read_counts(readers), read_counts(attackers)
        peak = read_peak_bytes(pid)
    for name, n in sorted(attacks.items()):
        print(f"  {name:40} {n:6}")
    print(
        f"streams: {dict(outcomes)}; {len(checks)} health checks; idle memory {idle / 1e6:.0f} MB"
    )
    broken = sum(n for outcome, n in outcomes.items() if outcome != "ok")
    kept = [
        print_goal("broken streams", broken, 1, ""),
        print_goal("peak memory of the gateway", peak / 1e6, MEMORY_GOAL / 1e6, "MB"),
        print_goal(
            "health check, median", statistics.median(checks) * 1e3, MEDIAN_GOAL * 1e3, "ms"
        ),
        print_goal("health check, worst", max(checks) * 1e3, WORST_GOAL * 1e3, "ms"),
    ]
    return 0 if all(kept) else 1


def run_gateway(engine: str, running: str) -> None:
    """Run the gateway with its default limits, but for the running turns."""
    limits = Limits(running=int(running))
    settings = GatewaySettings(upstreams=(Upstream(name="engine", url=engine),), limits=limits)
    stub_engine.run_forever(make_app(settings), ConnectionTable(limits).make_protocol)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--large", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--gateway", engine_url, running]:
            run_gateway(engine_url, running)
        case ["--read", url, n, seconds]:
            print(json.dumps(asyncio.run(read_streams(url, int(n), float(seconds)))))
        case ["--attack", url, n_slow, n_large, seconds]:
            print(json.dumps(
                asyncio.run(attack(url, int(n_slow), int(n_large), float(seconds)))
            ))  # fmt: skip
        case _:
            sys.exit(measure(parse_options()))
