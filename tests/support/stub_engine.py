"""A stub of an inference engine over real sockets. The prompt has its behaviour as JSON:

    {"name": "a", "tokens": 5, "hold": true, "first": 0.0, "pause": 0.0, "die": 3, "status": 503,
     "polite_end": 2, "flood": 1000, "size": 10, "stepwise": true}

`hold` waits until `StubEngine.released` is set. `first` and `pause` are seconds before the first
and before each token. `die` closes the connection after that many tokens (0: before the head).
`polite_end` ends the stream without its end mark. `flood` sends that many events of `size` bytes as
fast as the client reads. `stepwise` sends a token after the test has counted those before it in
`StubEngine.received`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

TESTS = str(Path(__file__).parents[1])
"""The folder that programs import `support` from."""


class StubEngine:
    """An ASGI application that records its requests and what clients received."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.order: list[str] = []
        self.left: list[str] = []
        self.sent = self.received = 0
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["method"] == "GET":
            await send_json(
                send, 200, {"object": "list", "data": [{"id": "stub", "object": "model"}]}
            )
            return
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        values = json.loads(body)
        self.asked.append(values)
        self.headers.append({key.decode(): value.decode() for key, value in scope["headers"]})
        plan = parse_plan(values.get("prompt"))
        name = plan.get("name", "")
        self.order.append(name)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        ended = False

        async def send_and_count(message: Any) -> None:
            nonlocal ended
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended = True
                self.at_once -= 1  # before the client can see the end
            await send(message)

        work = asyncio.create_task(self.work(values, plan, send_and_count, receive))
        gone = asyncio.create_task(wait_for_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.left.append(name)
        finally:
            self.at_once -= 0 if ended else 1
            work.cancel()
            gone.cancel()

    async def work(
        self, values: dict[str, Any], plan: dict[str, Any], send: Any, receive: Any
    ) -> None:
        while plan.get("hold") and not self.released.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(plan.get("first", 0))
        if "status" in plan:
            await send_json(
                send, plan["status"], {"error": {"message": "stub says no"}}, retry_after=7
            )
            return
        if plan.get("die") == 0:
            await abort_connection(receive)
            return
        n, pause = plan.get("tokens", 3), plan.get("pause", 0.0)
        usage = {"prompt_tokens": 11, "completion_tokens": n, "total_tokens": 11 + n}
        if not values.get("stream"):
            await asyncio.sleep(n * pause)
            choice = {"index": 0, "text": "t " * n, "finish_reason": "stop"}
            await send_json(
                send,
                200,
                {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage},
            )
            return
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for _ in range(plan.get("flood", 0)):
            await send_event(
                send, {"choices": [{"index": 0, "text": "x" * plan["size"], "finish_reason": None}]}
            )
            self.sent += plan["size"]
        for token in range(n):
            if plan.get("die") == token:
                await abort_connection(receive)
                return
            if plan.get("polite_end") == token:
                await send({"type": "http.response.body", "body": b""})
                return
            await asyncio.sleep(pause)
            while plan.get("stepwise") and self.received < token:
                await asyncio.sleep(0.01)
            text = {"index": 0, "text": f"{token} ", "finish_reason": None, "at": time.monotonic()}
            await send_event(
                send,
                {
                    "id": "x",
                    "object": "text_completion",
                    "created": 0,
                    "model": "stub",
                    "choices": [text],
                },
            )
        await send_event(
            send,
            {
                "id": "x",
                "choices": [{"index": 0, "text": "", "finish_reason": "stop"}],
                "usage": usage,
            },
        )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def parse_plan(prompt: Any) -> dict[str, Any]:
    """Return the behaviour in a prompt, or in the first of several.

    A text that is not JSON is a name.
    """
    if isinstance(prompt, list) and prompt:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        return {}
    try:
        return dict(json.loads(prompt))
    except ValueError:
        return {"name": prompt}


async def wait_for_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_event(send: Any, values: dict[str, Any]) -> None:
    await send({
        "type": "http.response.body",
        "body": b"data: " + json.dumps(values).encode() + b"\n\n",
        "more_body": True,
    })


async def send_json(
    send: Any, status: int, values: dict[str, Any], retry_after: int | None = None
) -> None:
    headers = [(b"content-type", b"application/json")]
    headers += [(b"retry-after", str(retry_after).encode())] if retry_after else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(values).encode()})


async def abort_connection(receive: Any) -> None:
    """Close the connection as a dying process does: uvicorn's cycle has its transport."""
    receive.__self__.transport.abort()
    await asyncio.sleep(0)


class RunningApp:
    """An ASGI application on its own port, in a thread of this process."""

    def __init__(self, app: Any, keep_alive: float = 5, http: Any = "auto") -> None:
        """http: uvicorn's protocol, as `ConnectionTable.make_protocol`."""
        config = uvicorn.Config(
            app,
            port=0,
            log_level="critical",
            timeout_keep_alive=keep_alive,
            lifespan="auto",
            http=http,
            loop="asyncio",  # as the product
        )
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True
        )

    def __enter__(self) -> RunningApp:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True  # within a tenth of a second


def send_half_request(url: str) -> bytes:
    """Send a request with an incomplete body; return the response until the connection closes."""
    with socket.create_connection(
        ("127.0.0.1", int(url.split(":")[2].partition("/")[0])), timeout=10
    ) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{   "
        )
        return b"".join(iter(lambda: raw.recv(65536), b""))


@contextmanager
def run_process(*arguments: str) -> Iterator[tuple[str, int]]:
    """Run a program that prints its port; yield its address and its process id."""
    search_path = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    started = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
    )
    assert started.stdout
    try:
        yield f"http://127.0.0.1:{int(started.stdout.readline())}/v1", started.pid
    finally:
        os.kill(started.pid, signal.SIGTERM)
        started.wait(20)


def run_forever(app: Any, http: Any = "auto") -> None:
    """Print the port, then serve in this process. http: uvicorn's protocol."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_level="critical", backlog=2048, http=http, loop="asyncio")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    run_forever(StubEngine())
