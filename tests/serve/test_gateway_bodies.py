"""Bodies that fill the memory or the event loop, rewriting of bodies, and the end of streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gateway_front import POST, run_front, wait_until
from support.stub_engine import StubEngine

from quantkit.serve.gateway import upstreams
from quantkit.serve.gateway.api_keys import create_key
from quantkit.serve.gateway.bodies import SMALL_BYTES, ByteBudget, HeldBytes, read_body
from quantkit.serve.gateway.errors import BudgetExceeded
from quantkit.serve.gateway.event_stream import EventStream
from quantkit.serve.gateway.json_scan import (
    STEP_BYTES,
    STEP_TOKENS,
    scan_between_others,
    scan_in_steps,
    scan_object,
)
from quantkit.serve.gateway.request import splice_body

# ------------------------------------------------------------------------------------------- bodies


def test_full_queue_rejects_before_the_body_is_read() -> None:
    with run_front(running=1, waiting=0) as front, ThreadPoolExecutor(1) as pool:
        held = pool.submit(front.post, {"prompt": json.dumps({"hold": True})})
        wait_until(lambda: front.engine.asked)
        with front.connect() as raw:  # promises a body and sends none of it
            raw.sendall(POST + b"content-length: 7800000\r\n\r\n")
            assert raw.recv(12) == b"HTTP/1.1 429"
        front.engine.released.set()
        assert held.result().status_code == 200


def test_key_over_its_limit_is_rejected_before_the_body_is_read() -> None:
    text, key = create_key("a", most=1)
    head = POST + b"authorization: Bearer " + text.encode() + b"\r\ncontent-length: 9\r\n\r\n"
    with run_front(keys=(key,)) as front, front.connect() as first, front.connect() as second:
        first.sendall(head)
        wait_until(lambda: front.gateway.queue.policy._turns_by_client)
        second.sendall(head)
        assert second.recv(12) == b"HTTP/1.1 429"
        first.close()
        wait_until(lambda: not front.gateway.queue.policy._turns_by_client)


def test_urgent_request_enters_a_full_queue() -> None:
    with run_front(running=1, waiting=1) as front, ThreadPoolExecutor(3) as pool:
        running = pool.submit(front.post, {"prompt": json.dumps({"hold": True})})
        wait_until(lambda: front.engine.asked)
        idle = pool.submit(front.post, {"prompt": "{}", "priority": 9})
        wait_until(lambda: front.gateway.queue.policy.waiting)
        urgent = pool.submit(front.post, {"prompt": "{}"}, x_priority="0")
        assert idle.result().status_code == 429
        front.engine.released.set()
        assert running.result().status_code == urgent.result().status_code == 200


def test_bodies_beyond_the_budget_get_429_and_small_ones_pass() -> None:
    """Four bodies of 1 MB, each sent but for its last byte, into a budget of 3 MB."""
    body = json.dumps({"prompt": "{}", "x": "y" * 1_000_000}).encode()
    head = POST + b"content-length: %d\r\n\r\n" % len(body)
    with run_front(all_bodies_bytes=4_000_000) as front, ExitStack() as stack:
        held = [stack.enter_context(front.connect()) for _ in range(2)]
        budget = front.gateway.bodies
        for n, raw in enumerate(held):
            raw.sendall(head + body[:-1])
            wait_until(lambda n=n: budget.used == (n + 1) * (len(body) - 1))
        refused = front.post(body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "holds as many bytes of requests as it may" in refused.text
        assert front.post({"prompt": "{}"}).status_code == 200
        # the small body is released after its answer has left
        wait_until(lambda: budget.used == 2 * (len(body) - 1))
        for raw in held:
            raw.sendall(body[-1:])
            assert raw.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: budget.used == 0)
        assert front.post(body).status_code == 200


def test_budget_leaves_a_quarter_to_small_bodies() -> None:
    budget = ByteBudget(1_000_000)
    large, other, small = HeldBytes(budget), HeldBytes(budget), HeldBytes(budget)
    large.take(SMALL_BYTES)
    large.take(750_000 - SMALL_BYTES)
    small.take(SMALL_BYTES)
    with pytest.raises(BudgetExceeded):
        large.take(1)
    with pytest.raises(BudgetExceeded):
        small.take(1)  # large now
    while budget.used <= 1_000_000 - SMALL_BYTES:
        HeldBytes(budget).take(SMALL_BYTES)
    with pytest.raises(BudgetExceeded):
        other.take(SMALL_BYTES)
    used = budget.used
    for held in (large, large, other):
        held.release()
    assert budget.used == used - 750_000


def test_large_bodies_are_read_in_turns_and_small_ones_at_once() -> None:
    async def scenario() -> None:
        budget, order = ByteBudget(10_000_000), list[str]()

        async def read(name: str, size: int) -> None:
            parts = iter([size] * 3)

            async def receive() -> Any:
                return {"type": "http.request", "body": bytes(next(parts)), "more_body": True}

            with pytest.raises(RuntimeError):  # no more parts
                await read_body(receive, {}, 8_000_000, 60, HeldBytes(budget))
            order.append(name)

        pacer = budget.pacer
        async with asyncio.timeout(60):
            pacer._next = asyncio.get_running_loop().time() + 0.1
            await asyncio.gather(*(read(*one) for one in (("large", 100_000), ("small", 1_000))))
        assert order == ["small", "large"]

    asyncio.run(scenario())


def test_body_is_forgotten_when_its_stream_begins() -> None:
    plan = {"tokens": 100_000, "pause": 0.1}  # until the client leaves
    body = {"prompt": json.dumps(plan), "stream": True, "x": "y" * 100_000}
    with run_front() as front:
        with httpx2.stream("POST", f"{front.root}/v1/completions", json=body) as answer:
            pieces = answer.iter_raw()  # its end closes the connection
            next(pieces)
            wait_until(lambda: front.gateway.bodies.used == 0)
            assert front.gateway.queue.policy.n_running == 1
            assert next(pieces)
        wait_until(lambda: front.engine.left)


@pytest.mark.parametrize(
    "filling",
    [
        b'"' + b"word and " * 200_000 + b'"',
        b'"' + b"\\n" * 200_000 + b'"',
        b"[" + b"[]," * 100_000 + b"1]",
        b"[" + b'{"a":"b"},' * 50_000 + b"1]",
        b"[" + b"12345, " * 200_000 + b"1]",
        b"[" + b'"a b",' * 200_000 + b"1]",
    ],
)
def test_event_loop_serves_others_while_a_large_body_is_scanned(filling: bytes) -> None:
    """A step is at most STEP_BYTES and one match, or STEP_TOKENS."""
    text = b'{"prompt": ' + filling + b"}"
    steps = scan_in_steps(text, frozenset())
    n_steps = sum(1 for _ in steps)
    n_tokens = filling.count(b"[]") + 3 * filling.count(b'"a":')
    assert n_steps >= max(len(text) / (3 * STEP_BYTES), n_tokens / STEP_TOKENS - 1)

    async def scan() -> None:
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(count_turns())
        await scan_between_others(text, frozenset())
        others.cancel()
        assert turns >= n_steps

    asyncio.run(scan())


def test_large_body_is_checked_like_a_small_one() -> None:
    with run_front() as front:
        long = b'{"prompt": "{}", "x": "' + b"y" * SMALL_BYTES + b'"'
        assert front.post(long + b"}").status_code == 200
        refused = front.post(long + b', "x": 1}')
        assert refused.status_code == 400 and "found 'x' twice" in refused.text


def test_answers_beyond_their_budget_get_429() -> None:
    with run_front(all_answers_bytes=100_000) as front:
        assert front.post({"prompt": json.dumps({"tokens": 1000})}).status_code == 200
        refused = front.post({"prompt": json.dumps({"tokens": 60_000})})
        assert refused.status_code == 429
        assert front.gateway.relay.answers.used == 0
        assert front.post({"prompt": json.dumps({"tokens": 1000})}).status_code == 200


def test_models_are_requested_once_for_many_clients() -> None:
    class Slow(StubEngine):
        n_models = 0

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["method"] == "GET":
                self.n_models += 1
                while not self.released.is_set():
                    await asyncio.sleep(0.01)
            await super().__call__(scope, receive, send)

    engine = Slow()
    with run_front(engine) as front, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(httpx2.get, f"{front.root}/ready") for _ in range(20)]
        wait_until(lambda: engine.n_models)
        time.sleep(0.2)
        assert engine.n_models == 1
        engine.released.set()
        assert {one.result().status_code for one in asked} == {200}


class ModelsEngine(StubEngine):
    """Answers GET with `head` and then 32 MB of `body`, with a pause after each."""

    def __init__(
        self, body: bytes, pause: float, head: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__()
        self.body, self.pause, self.head, self.n_sent = body, pause, head, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            return await super().__call__(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": [*self.head]})
        while self.n_sent < 1 << 25:
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            self.n_sent += len(self.body)
            await asyncio.sleep(self.pause)


@pytest.mark.parametrize(
    "engine",
    [
        lambda: ModelsEngine(bytes(1 << 16), 0),
        lambda: ModelsEngine(b"[" * (1 << 16), 0),
        lambda: ModelsEngine(b" ", 0.05),
        lambda: ModelsEngine(b"x", 0.05, ((b"content-encoding", b"gzip"),)),
    ],
    ids=["endless", "values", "slow", "compressed"],
)
def test_models_of_an_upstream_are_bounded(
    engine: Callable[[], ModelsEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "MODELS_TOTAL_SECONDS", 1.0)
    with run_front(engine()) as front:
        start = time.monotonic()
        answer = httpx2.get(f"{front.root}/v1/models", timeout=60.0)
        assert answer.status_code == 503
        assert time.monotonic() - start < 20


MEMBERS = st.dictionaries(
    st.sampled_from(["model", "priority", "max_tokens", "a", "b"]),
    st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(
    MEMBERS,
    st.dictionaries(
        st.sampled_from(["model", "priority", "max_tokens"]), st.none() | st.integers()
    ),
    st.sampled_from([None, 1]),
)
def test_spliced_body_has_the_changes_and_nothing_else(
    values: Any, changes: dict[str, int | None], indent: int | None
) -> None:
    text = json.dumps(values, indent=indent).encode()
    scanned = scan_object(text, frozenset(name.encode() for name in changes))
    encoded = {
        name.encode(): None if value is None else str(value).encode()
        for name, value in changes.items()
    }
    content = b"".join(splice_body(text, scanned, encoded))
    expected = {name: value for name, value in (values | changes).items() if value is not None}
    expected |= {name: value for name, value in values.items() if name not in changes}
    assert json.loads(content) == expected
    scan_object(content, frozenset())
    assert changes or content == text


# ------------------------------------------------------------------------------------------ streams


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([
            'data: {"text": "[DONE]"}',
            'data: {"text": "data: [DONE]"}',
            "data: [DONE]",
            "data:[DONE]",
            "data: [DONE] ",
            "data: x\ndata: [DONE]",
            ": data: [DONE]",
            "event: x\ndata: [DONE]",
            "data: [DONE",
            "",
            ": comment",
            "x" * 50,
        ])  # fmt: skip
    ),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_stream_ends_by_its_event_however_it_is_cut(
    events: list[str], end: str, sizes: list[int]
) -> None:
    text = "".join(event.replace("\n", end) + end + end for event in events).encode()
    done = [event in ("data: [DONE]", "data:[DONE]", "event: x\ndata: [DONE]") for event in events]
    whole, cut = EventStream(), EventStream()
    whole.feed(text)
    at = 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        cut.feed(text[at : at + size])
        at += size
    for stream in (whole, cut):
        assert stream.is_ended == stream.may_end() == any(done)
        assert stream.is_between_events()
        assert stream.n_events == sum("data:" in event and event[0] != ":" for event in events)


@pytest.mark.parametrize(
    ("text", "may_end", "is_between"),
    [
        (b"", False, True),
        (b"data: [DONE]\n\n", True, True),
        (b"data: [DONE]\n", True, False),
        (b"data: [DONE]", True, False),
        (b"data: [DONE", False, False),
        (b'data: {"text": "\\ndata: [DONE]', False, False),
        (b'data: {"text": "data: [DONE]"}\n\n', False, True),
        (b"data: a\ndata: [DONE]", False, False),
        (b": [DONE]\n\n", False, True),
        (b"data: [DONE]\n\n: comment\n\n", True, True),
    ],
)
def test_stream_may_lack_the_empty_line_after_its_last_event(
    text: bytes, may_end: bool, is_between: bool
) -> None:
    stream = EventStream()
    stream.feed(text)
    assert (stream.may_end(), stream.is_between_events()) == (may_end, is_between)


def test_cut_stream_whose_text_has_the_end_mark_is_reported() -> None:
    class Quoting(StubEngine):
        async def work(self, values: Any, plan: Any, send: Any, receive: Any) -> None:
            head = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            event = b'data: {"choices": [{"text": "data: [DONE]"}]}\n\n'
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    with run_front(Quoting()) as front:
        answer = front.post({"prompt": "{}", "stream": True})
        assert "the stream ended before its end mark" in answer.text
