"""The gateway over real sockets, with engines that are slow, that die, and that flood."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support import stub_engine
from support.stub_engine import RunningApp, StubEngine, send_half_request

from quantkit.errors import UsageError
from quantkit.serve.gateway.api_keys import ApiKey, authenticate, create_key, parse_keys
from quantkit.serve.gateway.app import make_app
from quantkit.serve.gateway.connections import ConnectionTable
from quantkit.serve.gateway.settings import GatewaySettings, Limits, Upstream, parse_limits

HERE = Path(__file__).parents[1]
WAITING = "quantkit_gateway_waiting "


class Setup:
    """An engine, perhaps a second one, and a gateway before them."""

    def __init__(self, engines: list[StubEngine], urls: list[str], gateway: str) -> None:
        self.engine, self.second = engines[0], engines[-1]
        self.urls, self.url = urls, gateway

    def ask(
        self, plan: dict[str, Any], *, stream: bool = False, key: str = "", **extra: Any
    ) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": "stub", "prompt": json.dumps(plan), "stream": stream, **extra}
        return httpx2.post(f"{self.url}/completions", json=body, headers=headers, timeout=120)

    def metric(self, name: str) -> float:
        """Return a sample of /metrics, 0 if it is absent."""
        text = httpx2.get(self.url.removesuffix("/v1") + "/metrics").text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(f"quantkit_gateway_{name}")
        )

    def wait_for_metric(self, name: str, value: float) -> None:
        """Wait until a sample of /metrics has a value: the gateway counts a request and releases
        its slot after the answer has left."""
        until(lambda: self.metric(name) == value)


@contextmanager
def gateway(
    *, engines: int = 1, keys: tuple[ApiKey, ...] = (), keep_alive: float = 5,
    upstreams: tuple[Upstream, ...] = (), **limits: Any,
) -> Iterator[Setup]:  # fmt: skip
    with ExitStack() as stack:
        stubs = [StubEngine() for _ in range(engines)]
        serving = [stack.enter_context(RunningApp(stub, keep_alive)) for stub in stubs]
        local = [Upstream(name="engine", url=serving[0].url, priorities=True)]
        local += [
            Upstream(name=f"other-{n}", url=one.url, model="big", key="secret")
            for n, one in enumerate(serving[1:])
        ]
        settings = GatewaySettings(upstreams=(*upstreams, *local), limits=Limits(**limits))
        http = ConnectionTable(settings.limits).make_protocol
        front = stack.enter_context(RunningApp(make_app(settings, keys), http=http))
        yield Setup(stubs, [one.url for one in serving], front.url)


def events(text: str) -> list[Any]:
    """Return the data of a stream's events."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def until(check: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def open_client(setup: Setup, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=setup.url, api_key=key, max_retries=0, timeout=20)


# ------------------------------------------------------------------------------------ service


def test_openai_client_gets_the_engines_response() -> None:
    with gateway() as setup:
        api = open_client(setup)
        assert [model.id for model in api.models.list()] == ["stub"]
        whole = api.completions.create(model="stub", prompt=json.dumps({"tokens": 4}), max_tokens=4)
        assert (
            whole.choices[0].text == "t t t t "
            and whole.usage
            and whole.usage.completion_tokens == 4
        )
        stream = api.completions.create(model="stub", prompt=json.dumps({"tokens": 4}), stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == "0 1 2 3 "
        with pytest.raises(openai.NotFoundError, match="stub says no"):
            api.completions.create(model="stub", prompt=json.dumps({"status": 404}))
        setup.wait_for_metric('requests_total{key="anonymous",outcome="ok"}', 2)
        setup.wait_for_metric('requests_total{key="anonymous",outcome="refused"}', 1)
        # how long answers take, refusals apart
        setup.wait_for_metric('request_seconds_count{outcome="ok"}', 2)
        assert setup.metric('tokens_total{kind="completion"}') == 8
        assert setup.metric("time_to_first_token_seconds_count") == 1
        assert setup.metric("inter_token_seconds_count") >= 1


def test_stream_is_forwarded_unchanged_and_immediately() -> None:
    """Each token arrives before the engine sends the next one."""
    with gateway() as setup:
        body = {"prompt": json.dumps({"tokens": 4, "stepwise": True}), "stream": True}
        url = f"{setup.url}/completions"
        with httpx2.stream("POST", url, json=body, timeout=60) as answer:
            pieces = answer.iter_raw()
            for token in range(4):
                assert f'"text": "{token} "'.encode() in next(pieces)
                setup.engine.received += 1  # the engine waits for it
            assert b"data: [DONE]" in b"".join(pieces)
        urls, body["prompt"] = (setup.urls[0], setup.url), '{"tokens": 3}'
        texts = [httpx2.post(f"{url}/completions", json=body).text for url in urls]
        straight, through = (re.sub(r'"at": [\d.]+', "", text) for text in texts)
        assert straight == through
        assert through.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"{", 400, "expected JSON"),
        (b'{"a": ' + b"[" * 100_000, 400, "expected JSON"),
        (b"[]", 400, "body: expected a JSON object, found '[]'"),
        (b'{"n": 1, "n": 16}', 400, "body: expected every key once, found 'n' twice"),
        (b'{"stream": false, "str\\u0065am": true}', 400, "found 'stream' twice"),
        (b'{"prompt": "{}", "temperature": NaN}', 400, "expected JSON, a value at byte 32"),
        (b'{"prompt": "{}", "temperature": 1e999}', 400, "expected JSON, a finite number"),
        (b'{"prompt": "{}", "stream": 1}', 400, "stream: expected true or false, found 1"),
        (b'{"prompt": "{}", "stream": "true"}', 400, "expected true or false, found 'true'"),
        (b'{"prompt": "{}", "stream": [true]}', 400, "expected true or false, found [True]"),
        (b'{"prompt": "{}", "background": true}', 400, "background: expected false, found true"),
        (
            b'{"prompt": [' + b'"{}",' * 20 + b'"{}"]}',
            400,
            "prompts: expected at most 20, found 21",
        ),
        (
            b'{"prompt": "{}", "max_tokens": 101}',
            400,
            "max_tokens: expected an integer from 0 to 100, found 101",
        ),
        (
            b'{"prompt": "{}", "max_tokens": 6.0}',
            400,
            "max_tokens: expected an integer from 0 to 100, found 6.0",
        ),
        (
            b'{"prompt": "{}", "max_completion_tokens": "600"}',
            400,
            "expected an integer from 0 to 100, found '600'",
        ),
        (
            b'{"prompt": "{}", "max_tokens": -1}',
            400,
            "max_tokens: expected an integer from 0 to 100, found -1",
        ),
        (b'{"prompt": "{}", "n": 17}', 400, "n: expected an integer from 0 to 16, found 17"),
        (
            b'{"prompt": "{}", "priority": "high"}',
            400,
            "priority: expected 0 (first) to 9, found 'high'",
        ),
        (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413, "expected at most 150000 bytes"),
    ],
)
def test_invalid_request_is_rejected_before_the_engine(
    body: bytes, status: int, expected: str
) -> None:
    with gateway(max_tokens=100, body_bytes=150_000, max_prompts=20) as setup:
        answer = httpx2.post(f"{setup.url}/completions", content=body)
        assert answer.status_code == status and expected in answer.json()["error"]["message"]
        assert not setup.engine.asked


@pytest.mark.parametrize(
    ("path", "said", "heard"),
    [
        ("/completions", {}, {"max_tokens": 5}),
        ("/completions", {"max_tokens": None}, {"max_tokens": 5}),
        (
            "/completions",
            {"max_completion_tokens": 3},
            {"max_completion_tokens": 3, "max_tokens": 5},
        ),
        ("/completions", {"max_tokens": 3}, {"max_tokens": 3}),
        ("/chat/completions", {}, {"max_completion_tokens": 5}),
        ("/chat/completions", {"max_completion_tokens": None, "max_tokens": 3}, {"max_tokens": 3}),
        ("/responses", {}, {"max_output_tokens": 5}),
        ("/embeddings", {}, {}),
    ],
)
def test_request_without_token_limit_gets_the_gateways(path: str, said: Any, heard: Any) -> None:
    with gateway(max_tokens=5) as setup:
        assert httpx2.post(setup.url + path, json={"prompt": "{}", **said}).status_code == 200
        expected = {
            name: value for name, value in setup.engine.asked[0].items() if value is not None
        }
        assert expected == {"prompt": "{}", **heard}
    with gateway() as setup:
        httpx2.post(setup.url + path, json={"prompt": "{}", **said})
        assert setup.engine.asked[0] == {"prompt": "{}", **said}


@pytest.mark.parametrize("expected", ["x", "--5", "²", "9" * 5000, "1_0", "1.5"])
def test_invalid_priority_is_rejected(expected: str) -> None:
    with gateway() as setup:
        headers = {"x-priority": expected.encode("latin-1")}
        answer = httpx2.post(f"{setup.url}/completions", json={"prompt": "{}"}, headers=headers)
        assert (
            answer.status_code == 400
            and "priority: expected 0 (first) to 9" in answer.json()["error"]["message"]
        )
        setup.wait_for_metric('requests_total{key="anonymous",outcome="refused"}', 1)
        assert not setup.engine.asked


def test_internal_error_is_reported_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("quantkit.serve.gateway.app.parse_request", fail)
    with gateway() as setup:
        answer = httpx2.post(
            f"{setup.url}/completions", json={"prompt": "{}"}, headers={"x-request-id": "mine"}
        )
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
        assert answer.json()["error"]["message"] == "the gateway failed; try again"
        setup.wait_for_metric('requests_total{key="anonymous",outcome="fault"}', 1)


def test_only_api_paths_are_forwarded() -> None:
    with gateway() as setup:
        for path in ("/v1/load_lora_adapter", "/shutdown", "/v1/../metrics/x"):
            assert httpx2.post(setup.url.removesuffix("/v1") + path, json={}).status_code == 404
        unknown, wrong = httpx2.get(f"{setup.url}/load"), httpx2.get(f"{setup.url}/completions")
        assert (
            unknown.json()["error"]["code"] == 404
            and "GET /v1/load: expected" in unknown.json()["error"]["message"]
        )
        assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (
            405,
            "POST",
            405,
        )
        assert not setup.engine.asked


def test_health_reports_the_gateway_and_ready_an_upstream() -> None:
    with RunningApp(
        make_app(GatewaySettings(upstreams=(Upstream(name="none", url="http://127.0.0.1:9/v1"),)))
    ) as front:
        root = front.url.removesuffix("/v1")
        assert httpx2.get(f"{root}/health").status_code == 200
        assert httpx2.get(f"{root}/ready").status_code == 503
        assert httpx2.get(f"{root}/v1/models").status_code == 503
    with gateway() as setup:
        assert httpx2.get(setup.url.removesuffix("/v1") + "/ready").json() == {"status": "ready"}


# ------------------------------------------------------------------------------------ slow engine


def test_full_queue_returns_429_with_retry_after() -> None:
    with gateway(running=2, waiting=3) as setup, ThreadPoolExecutor(20) as pool:
        answers = list(
            pool.map(lambda n: setup.ask({"tokens": 1, "pause": 0.2}, stream=n % 2 == 0), range(20))
        )
        codes = sorted(answer.status_code for answer in answers)
        assert codes.count(200) >= 5 and set(codes) == {200, 429} and len(codes) == 20
        assert all(
            int(answer.headers["retry-after"]) >= 1
            for answer in answers
            if answer.status_code == 429
        )
        assert setup.engine.most_at_once == 2
        setup.wait_for_metric("running", 0)
        setup.wait_for_metric("waiting", 0)


def test_queue_timeout_returns_429() -> None:
    with gateway(running=1, queue_seconds=0.2) as setup, ThreadPoolExecutor(2) as pool:
        first = pool.submit(setup.ask, {"hold": True})
        until(lambda: setup.engine.asked)
        began = time.monotonic()
        second = setup.ask({})
        assert (
            second.status_code == 429 and 0.19 < time.monotonic() - began < 10
        )  # not until it is released
        setup.engine.released.set()
        assert "timed out in the queue" in second.json()["error"]["message"]
        assert first.result().status_code == 200


def test_urgent_requests_run_first() -> None:
    with gateway(running=1) as setup, ThreadPoolExecutor(6) as pool:
        running = pool.submit(setup.ask, {"name": "first", "hold": True})
        until(lambda: setup.engine.asked)
        later = []
        for n, priority in enumerate((7, 3, 5, 0)):
            later.append(pool.submit(setup.ask, {"name": str(priority)}, priority=priority))
            until(lambda n=n: setup.metric("waiting") == n + 1)
        setup.engine.released.set()
        assert all(one.result().status_code == 200 for one in (running, *later))
        assert setup.engine.order == ["first", "0", "3", "5", "7"]
        assert [body.get("priority") for body in setup.engine.asked] == [
            None,
            0,
            3,
            5,
            7,
        ]  # the engine receives it too


def test_deadline_returns_504_or_an_error_event() -> None:
    with gateway(deadline=0.8) as setup:
        whole = setup.ask({"tokens": 1, "pause": 3, "name": "a"})
        assert (
            whole.status_code == 504
            and "not complete within 0.8 s" in whole.json()["error"]["message"]
        )
        stream = setup.ask({"tokens": 20, "pause": 0.05, "name": "b"}, stream=True)
        expected = events(stream.text)
        assert (
            stream.status_code == 200
            and len(expected) > 2
            and expected[-1]["error"]["type"] == "timeout_error"
        )
        until(lambda: setup.engine.left == ["a", "b"])  # and the engine stops working
        until(lambda: setup.metric("running") == 0)


def test_client_that_never_reads_loses_its_slot_at_the_deadline(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("quantkit.serve.gateway.app.TIMEOUT_GRACE", 0.2)
    with gateway(running=1) as setup:
        with socket.create_connection(("127.0.0.1", httpx2.URL(setup.url).port)) as raw:
            content = json.dumps({
                "prompt": json.dumps({"flood": 4000, "size": 100_000}),
                "stream": True,
            }).encode()
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-request-timeout: "
                b"2\r\ncontent-length: %d\r\n\r\n" % len(content) + content
            )
            until(
                lambda: setup.engine.asked
            )  # `running` may be 0 again before a busy test reads it
            assert setup.ask({}).status_code == 200  # as soon as the place is free
            setup.wait_for_metric('requests_total{key="anonymous",outcome="late"}', 1)
        until(lambda: setup.engine.left == [""])


def test_half_of_a_surrogate_pair_is_forwarded_unchanged() -> None:
    with gateway() as setup:
        body = json.dumps({"prompt": '{"name": "\\ud800"}', "priority": 3})
        answer = httpx2.post(f"{setup.url}/completions", content=body, headers={"x-priority": "5"})
        assert answer.status_code == 200 and setup.engine.order == ["\ud800"]
        assert setup.engine.asked[0]["priority"] == 5


@pytest.mark.parametrize("limits", [{"deadline": 0.3}, {"body_seconds": 0.3}])
def test_incomplete_body_returns_408(limits: dict[str, float]) -> None:
    with gateway(**limits) as setup:
        answer = send_half_request(setup.url)
        assert (
            answer.startswith(b"HTTP/1.1 408 ")
            and b"expected its end within 0.3 s, found 4 bytes" in answer
        )
        setup.wait_for_metric('requests_total{key="anonymous",outcome="refused"}', 1)


def test_client_can_shorten_its_timeout() -> None:
    with gateway() as setup:
        body = {"prompt": json.dumps({"tokens": 1, "pause": 3})}
        answer = httpx2.post(
            f"{setup.url}/completions", json=body, headers={"x-request-timeout": "0.2"}
        )
        assert answer.status_code == 504
        answer = httpx2.post(
            f"{setup.url}/completions", json=body, headers={"x-request-timeout": "nan"}
        )
        assert answer.status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels_running_and_waiting_requests(stream: bool) -> None:
    with gateway(running=1) as setup:
        for name in ("running", "waiting"):
            body = {
                "prompt": json.dumps({"tokens": 50, "pause": 0.1, "name": name}),
                "stream": stream,
            }
            with socket.create_connection(("127.0.0.1", httpx2.URL(setup.url).port)) as raw:
                content = json.dumps(body).encode()
                raw.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                    b"content-length: %d\r\n\r\n" % len(content) + content
                )
                if name == "running":
                    until(lambda: setup.engine.order == ["running"])
                    held = threading.Thread(
                        target=setup.ask, args=({"tokens": 2, "pause": 0.2, "name": "next"},)
                    )
                    held.start()
                    until(lambda: setup.metric("waiting") == 1)
                else:
                    until(lambda: setup.metric("running") == 1)
        held.join(5)
        until(lambda: setup.engine.left[:1] == ["running"])
        assert setup.engine.order[:2] == ["running", "next"]
        setup.wait_for_metric("running", 0)
        setup.wait_for_metric("waiting", 0)
        setup.wait_for_metric('requests_total{key="anonymous",outcome="left"}', 2)


# --------------------------------------------------------------------------- idle and long streams


def test_idle_stream_gets_heartbeats_that_clients_ignore() -> None:
    with gateway(heartbeat=0.1) as setup:
        answer = setup.ask({"first": 0.5, "tokens": 3, "pause": 0.4}, stream=True)
        head, _, rest = answer.text.partition("data: ")
        assert head.count(": heartbeat\n\n") >= 2 and rest.count(": heartbeat\n\n") >= 2
        assert len(events(answer.text)) == 5
        stream = open_client(setup).completions.create(
            model="stub", prompt='{"tokens": 3, "pause": 0.3}', stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == "0 1 2 "
        until(lambda: setup.metric("heartbeats_total") >= 4)


def test_stream_survives_keep_alive_limits() -> None:
    """The engine closes idle connections after 0.3 s; streams and connections idle for longer."""
    with gateway(keep_alive=0.3, heartbeat=60) as setup, httpx2.Client(timeout=20) as api:
        for pause in (0.0, 0.5, 0.3):
            time.sleep(pause)  # the gateway's own connection to the engine grows old meanwhile
            body = {"prompt": json.dumps({"tokens": 2, "pause": 0.45}), "stream": True}
            answer = api.post(f"{setup.url}/completions", json=body)
            assert answer.status_code == 200 and events(answer.text)[-1] == "[DONE]"


# ----------------------------------------------------------------------------------- dying engine


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("plan", [{"die": 0}, {"status": 503}, {"status": 500}, {"status": 429}])
def test_failure_before_the_first_byte_fails_over(plan: dict[str, Any], stream: bool) -> None:
    class Failing(StubEngine):
        async def work(
            self, values: dict[str, Any], own: dict[str, Any], send: Any, receive: Any
        ) -> None:
            await super().work(values, own | plan, send, receive)

    engine = Failing()
    with RunningApp(engine) as serving:
        upstream = Upstream(name="dying", url=serving.url)
        with gateway(engines=2, upstreams=(upstream,)) as setup:
            answer = setup.ask({"first": 0, "tokens": 2}, stream=stream, priority=3)
            assert answer.status_code == 200 and ("[DONE]" in answer.text) == stream
            assert setup.engine.order == [""] and setup.engine.asked[0]["priority"] == 3
            assert setup.metric('failovers_total{upstream="engine"}') == 1
            assert "priority" not in engine.asked[0]  # it was not said to know priorities


def test_fallback_gets_its_own_key_and_model_and_dead_upstream_is_tried_last() -> None:
    with gateway(
        engines=2, upstreams=(Upstream(name="dead", url="http://127.0.0.1:9/v1"),)
    ) as setup:
        settings = GatewaySettings(upstreams=(
            Upstream(name="dead", url="http://127.0.0.1:9/v1"),
            Upstream(name="cloud", url=setup.urls[1], model="big", key="secret"),
        ))  # fmt: skip
        with RunningApp(make_app(settings)) as front:
            body = {"model": "small", "prompt": '{"tokens": 1}', "priority": 4}
            headers = {"authorization": "Bearer mine"}
            for _ in range(3):
                assert (
                    httpx2.post(f"{front.url}/completions", json=body, headers=headers).status_code
                    == 200
                )
            text = httpx2.get(front.url.removesuffix("/v1") + "/metrics").text
        assert [asked["model"] for asked in setup.second.asked] == ["big"] * 3
        assert all("priority" not in asked for asked in setup.second.asked)
        assert {one["authorization"] for one in setup.second.headers} == {
            "Bearer secret"
        }  # and never the client's
        assert (
            'upstream_failures_total{reason="unreachable",upstream="dead"} 1.0' in text
        )  # once, then it is asked last


@pytest.mark.parametrize("plan", [{"tokens": 5, "die": 3}, {"tokens": 5, "polite_end": 3}])
def test_failure_within_a_stream_is_reported_without_failover(
    plan: dict[str, Any],
) -> None:
    with gateway(engines=2) as setup:
        expected = events(setup.ask(plan, stream=True).text)
        assert [one["choices"][0]["text"] for one in expected[:-1]] == ["0 ", "1 ", "2 "]
        assert expected[-1]["error"]["type"] == "server_error"
        assert not setup.second.asked
        with pytest.raises(openai.APIError, match="try again"):
            list(
                open_client(setup).completions.create(
                    model="stub", prompt=json.dumps(plan), stream=True
                )
            )


def test_failover_is_possible_after_heartbeats() -> None:
    """The first engine is silent, then dies; the client has received only comments."""
    with gateway(heartbeat=0.1) as setup, RunningApp(StubEngine()) as dying:
        settings = GatewaySettings(
            upstreams=(
                Upstream(name="silent", url=dying.url, model="x"),
                Upstream(name="good", url=setup.urls[0], model="y"),
            ),
            limits=Limits(heartbeat=0.1, silence=0.5),
        )
        with RunningApp(make_app(settings)) as front:
            body = {
                "model": "x",
                "prompt": json.dumps({"first": 0.45, "tokens": 2, "pause": 0.2}),
                "stream": True,
            }
            dying_engine = httpx2.post(f"{front.url}/completions", json=body, timeout=20)
            assert (
                events(dying_engine.text)[-1] == "[DONE]"
            )  # slower than a heartbeat, faster than the bound
            body["prompt"] = json.dumps({"first": 1.2, "tokens": 2})
            both = httpx2.post(f"{front.url}/completions", json=body, timeout=20)
            assert both.status_code == 200 and both.text.startswith(": heartbeat")
            assert events(both.text)[-1]["error"]["message"].startswith("good: timed out")


def test_response_is_503_if_all_upstreams_are_dead() -> None:
    dead = (
        Upstream(name="a", url="http://127.0.0.1:9/v1"),
        Upstream(name="b", url="http://127.0.0.1:9/v1"),
    )
    with RunningApp(make_app(GatewaySettings(upstreams=dead))) as front:
        answer = httpx2.post(f"{front.url}/completions", json={"prompt": "{}"})
        assert answer.status_code == 503 and answer.json()["error"]["message"].startswith(
            "b: not reachable"
        )
        assert answer.headers["retry-after"] == "1"


def test_error_of_a_single_engine_is_forwarded() -> None:
    with gateway() as setup:
        answer = setup.ask({"status": 503})
        assert (answer.status_code, answer.headers["retry-after"]) == (
            503,
            "7",
        ) and "stub says no" in answer.text


# --------------------------------------------------------------------------------------------- keys


def test_keys_are_required_and_limit_their_requests() -> None:
    secret, entry = create_key("team-a", priority=4, most=1)
    with gateway(keys=(entry, create_key("other")[1])) as setup, ThreadPoolExecutor(2) as pool:
        assert setup.ask({}).status_code == setup.ask({}, key="qk-wrong").status_code == 401
        assert httpx2.get(f"{setup.url}/models").status_code == 401
        assert [model.id for model in open_client(setup, secret).models.list()] == ["stub"]
        first = pool.submit(setup.ask, {"hold": True}, key=secret, priority=0)
        until(lambda: setup.engine.asked)
        second = setup.ask({}, key=secret)
        setup.engine.released.set()
        assert second.status_code == 429 and "too many concurrent requests" in second.text
        assert first.result().status_code == 200
        assert setup.engine.asked[0]["priority"] == 4  # no more urgent than the key allows
        assert "authorization" not in setup.engine.headers[0]  # the client's key stays here


def test_key_file_has_hashes_and_is_validated_strictly(tmp_path: Path) -> None:
    secret, entry = create_key("a")
    assert secret not in entry.model_dump_json() and len(secret) > 40
    assert (
        authenticate((entry,), f"Bearer {secret}")
        == entry
        == authenticate((entry,), f"bearer {secret} ")
    )
    for wrong in ("", secret, f"Basic {secret}", f"Bearer {secret}x", "Bearer ", "Bearer \udc80"):
        assert authenticate((entry,), wrong) is None
    entries = {"keys": [entry.model_dump()]}
    assert parse_keys(entries, "keys.json") == (entry,)
    for values, expected in (
        ({"keys": [{**entry.model_dump(), "sha256": secret}]}, "keys.json: keys.0.sha256"),
        ({"keys": [{**entry.model_dump(), "admin": True}]}, "keys.json: keys.0.admin"),
        ({"keys": [entry.model_dump()] * 2}, "keys.json: a: expected once, found twice"),
        ({}, "keys.json: keys"),
    ):
        with pytest.raises(UsageError, match=expected):
            parse_keys(values, "keys.json")
    with pytest.raises(UsageError, match="use letters, digits"):
        create_key("a b")


def test_invalid_limit_is_named() -> None:
    assert parse_limits({"running": "3", "deadline": "2.5"}) == Limits(running=3, deadline=2.5)
    with pytest.raises(UsageError, match="--limit runing: .*known limits: running, waiting"):
        parse_limits({"runing": "3"})
    with pytest.raises(UsageError, match="--limit running: .*found '0'"):
        parse_limits({"running": "0"})


# -------------------------------------------------------------------------------- flooding engine


def read_resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    line = next(
        one
        for one in Path(f"/proc/{pid}/status").read_text().splitlines()
        if one.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


@contextmanager
def gateway_process(engine: str, *limits: str) -> Iterator[tuple[str, int]]:
    """Run a gateway in a process of its own; yield its address and its process id."""
    program = str(HERE / "bench" / "gateway.py")
    with stub_engine.run_process(program, "--gateway", engine, *limits) as (url, pid):
        yield url, pid


def read_settled(read: Any, seconds: float = 1.0) -> Any:
    """Return a value once it has not changed for some seconds."""
    value, since = read(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.05)
        if (latest := read()) != value:
            value, since = latest, time.monotonic()
    return value


def test_slow_client_applies_backpressure() -> None:
    """An engine sends 400 MB to a client that reads nothing: the gateway buffers a few MB.

    On a busy machine less may have been sent; never more.
    """
    with gateway() as setup, gateway_process(setup.urls[0]) as (url, pid):
        httpx2.post(f"{url}/completions", json={"prompt": '{"tokens": 1}', "stream": True})
        before, port = read_resident_bytes(pid), httpx2.URL(url).port
        with socket.create_connection(("127.0.0.1", port)) as raw:
            content = json.dumps({
                "prompt": json.dumps({"flood": 4000, "size": 100_000}),
                "stream": True,
            }).encode()
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
                % len(content)
                + content
            )
            until(lambda: setup.engine.sent, 60)
            assert read_settled(lambda: setup.engine.sent) < 60e6
            assert read_resident_bytes(pid) - before < 15e6
        until(lambda: setup.engine.left == [""], 60)  # and the client's leaving reaches it


@pytest.mark.slow
def test_memory_stays_flat_under_a_thousand_queued_requests() -> None:
    """64 run and 936 wait; all are served, and each takes a few kilobytes."""
    with (
        gateway() as setup,
        gateway_process(setup.urls[0], "queue_seconds=600", "header_seconds=600") as (url, pid),
    ):
        root, port = url.removesuffix("/v1"), httpx2.URL(url).port
        plan = json.dumps({"prompt": json.dumps({"hold": True}), "stream": True}).encode()
        request = (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(plan) + plan
        )

        def count_waiting() -> float:
            text = httpx2.get(f"{root}/metrics", timeout=60).text
            lines = [line for line in text.splitlines() if line.startswith(WAITING)]
            return float(lines[0].split()[1])

        def wave() -> int:
            """Send the requests, and serve them once all wait; return the memory meanwhile."""
            setup.engine.released.clear()
            with ExitStack() as stack:
                held = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    for _ in range(1000)
                ]
                for one in held:
                    one.sendall(request)
                until(lambda: count_waiting() == 1000 - 64, 300)
                waiting = read_resident_bytes(pid)
                setup.engine.released.set()
                for one in held:
                    answer = b""
                    while piece := one.recv(65536):
                        answer += piece
                    assert b"200 OK" in answer and b"[DONE]" in answer
            return waiting

        wave()
        first = read_resident_bytes(pid)
        waiting = wave()
        assert read_resident_bytes(pid) - first < 4e6  # nothing stays of a thousand requests
        assert waiting - first < 30e6
