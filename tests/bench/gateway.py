"""`make bench-gateway`: latency that the gateway adds to requests to a stub engine.

    PYTHONPATH=tests .venv/bin/python -m bench.gateway [REQUESTS]

Three processes on loopback: engine, gateway, and this client. Requests alternate between the engine
and the gateway. Per request: the time until a short response is complete. Per token: from the time
that the engine writes an event (the event contains it) to the time that the client reads it, one
event every few milliseconds, as engines send them. Per protocol: the CPU time of a health check and
of a body with uvicorn's protocols as they are, and with the guard before httptools. Exits with 1 if
a goal is missed.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from support import stub_engine

from quantkit.serve.gateway.app import make_app
from quantkit.serve.gateway.connections import ConnectionTable
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream, parse_limits

REQUEST_GOAL, TOKEN_GOAL = 2e-3, 0.2e-3  # seconds, p50
WAYS = ("bare", "gateway")
PROTOCOLS = ("httptools", "guard", "h11")


def open_connection(url: str) -> http.client.HTTPConnection:
    place = urlsplit(url)
    made = http.client.HTTPConnection(place.hostname, place.port)
    made.connect()
    return made


def post_completion(
    to: http.client.HTTPConnection, plan: dict, stream: bool
) -> http.client.HTTPResponse:
    body = json.dumps({"model": "stub", "prompt": json.dumps(plan), "stream": stream})
    to.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    return to.getresponse()


def time_request(to: http.client.HTTPConnection, stream: bool) -> float:
    began = time.perf_counter()
    answer = post_completion(to, {"tokens": 1}, stream)
    content = answer.read()
    assert answer.status == 200 and content
    return time.perf_counter() - began


def time_tokens(to: http.client.HTTPConnection, tokens: int, pause: float) -> Iterator[float]:
    """Yield the delay of each event of a stream, from engine to client."""
    answer = post_completion(to, {"tokens": tokens, "pause": pause}, True)
    while line := answer.readline():
        now = time.monotonic()
        if b'"at": ' in line:
            yield now - float(line.rpartition(b'"at": ')[2].partition(b"}")[0])


def time_flood(to: http.client.HTTPConnection, events: int) -> float:
    """Return seconds per event of a stream without pauses."""
    began = time.perf_counter()
    answer = post_completion(to, {"flood": events, "size": 5, "tokens": 1}, True)
    assert answer.read().count(b"data: ") == events + 3
    return (time.perf_counter() - began) / events


def time_streams(to: str, streams: int, tokens: int, pause: float) -> list[float]:
    """Return the delays of the events of concurrent streams."""
    delays: list[list[float]] = [[] for _ in range(streams)]

    def run(n: int) -> None:
        delays[n].extend(time_tokens(open_connection(to), tokens, pause))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [seconds for stream in delays for seconds in stream]


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, which other programs do not influence."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def print_comparison(name: str, ways: dict[str, list[float]], goal: float | None) -> bool:
    """Print one row and return whether the goal is met."""
    p50 = {way: statistics.median(taken) for way, taken in ways.items()}
    p99 = {way: statistics.quantiles(taken, n=100)[98] for way, taken in ways.items()}
    added = p50["gateway"] - p50["bare"]
    verdict = (
        "" if goal is None else f"goal <= {goal * 1e3:g} ms: {'met' if added <= goal else 'MISSED'}"
    )
    shown = "  ".join(f"{way} {p50[way] * 1e3:7.3f} / {p99[way] * 1e3:7.3f}" for way in WAYS)
    print(f"{name:34}  {shown}  added p50 {added * 1e3:7.3f} ms  {verdict}")
    return goal is None or added <= goal


def compare_protocols(requests: int) -> None:
    """Print the CPU time of a health check with each protocol of uvicorn, and with the guard."""
    body = b'{"x": "' + b"y" * 1_000_000 + b'"}'
    with ExitStack() as stack:
        ways = {
            name: stack.enter_context(stub_engine.run_process(__file__, "--protocol", name))
            for name in PROTOCOLS
        }
        to = {name: open_connection(url) for name, (url, _) in ways.items()}
        used = dict.fromkeys(PROTOCOLS, 0.0)
        sent = dict.fromkeys(PROTOCOLS, 0.0)
        for _ in range(20):
            for name, (_, pid) in ways.items():
                start = read_cpu_seconds(pid)
                for _ in range(requests // 4):
                    to[name].request("GET", "/health")
                    to[name].getresponse().read()
                middle = read_cpu_seconds(pid)
                for _ in range(5):
                    to[name].request("POST", "/v1/completions", body)
                    assert to[name].getresponse().read()
                used[name] += middle - start
                sent[name] += read_cpu_seconds(pid) - middle
    for name in PROTOCOLS:
        check, body_share = used[name] / used["httptools"], sent[name] / sent["httptools"]
        print(f"protocol {name:25}  CPU {used[name] / (5 * requests) * 1e3:.3f} ms per health "
              f"check, {check:.2f} of httptools; {sent[name] * 10:.1f} ms per body of 1 MB, "
              f"{body_share:.2f}")  # fmt: skip


def main(requests: int) -> int:
    models = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{os.cpu_count()} x {models[0].partition(': ')[2] if models else platform.machine()}, "
          f"load {load}, "
          f"Python {platform.python_version()}; p50 / p99 in ms, n = {requests}")  # fmt: skip
    kept = []
    with ExitStack() as stack:
        engine, _ = stack.enter_context(stub_engine.run_process(stub_engine.__file__))
        gateway, pid = stack.enter_context(stub_engine.run_process(__file__, "--gateway", engine))
        urls = dict(zip(WAYS, (engine, gateway), strict=True))
        to = {way: open_connection(url) for way, url in urls.items()}
        for stream in (False, True):
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            used = read_cpu_seconds(pid)
            for n in range(requests + 20):
                for way in WAYS if n % 2 else reversed(WAYS):
                    seconds = time_request(to[way], stream)
                    if n >= 20:
                        taken[way].append(seconds)
            kept.append(
                print_comparison(f"request, {'stream' if stream else 'whole'}", taken, REQUEST_GOAL)
            )
            print(
                f"{'':34}  the gateway's CPU "
                f"{(read_cpu_seconds(pid) - used) / (requests + 20) * 1e3:.3f} ms per request"
            )
        one = {way: [] for way in WAYS}
        many = {way: [] for way in WAYS}
        flood = {way: [] for way in WAYS}
        for _ in range(max(2, requests // 100)):
            for way in WAYS:
                one[way] += time_tokens(to[way], 100, 0.005)
                many[way] += time_streams(urls[way], 16, 25, 0.02)
                flood[way].append(time_flood(to[way], 2000))
        kept.append(print_comparison("token, one stream, 5 ms apart", one, TOKEN_GOAL))
        kept.append(print_comparison("token, 16 streams, 20 ms apart", many, None))
        kept.append(print_comparison("token, no pauses", flood, TOKEN_GOAL))
    compare_protocols(requests)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--protocol"]:
        app = make_app(GatewaySettings(upstreams=(Upstream(name="none", url="http://127.0.0.1"),)))
        guard = ConnectionTable(Limits()).make_protocol
        stub_engine.run_forever(app, guard if sys.argv[2] == "guard" else sys.argv[2])
    elif sys.argv[1:2] == ["--gateway"]:  # --gateway URL [LIMIT=VALUE ...]
        settings = GatewaySettings(
            upstreams=(Upstream(name="engine", url=sys.argv[2]),),
            limits=parse_limits(dict(one.split("=") for one in sys.argv[3:])),
        )
        stub_engine.run_forever(make_app(settings), ConnectionTable(settings.limits).make_protocol)
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 500))
