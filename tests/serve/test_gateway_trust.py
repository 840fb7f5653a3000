"""The gateway and browsers of other sites, clients without a key, and requests of many prompts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from support.gateway_front import run_front, wait_until
from support.stub_engine import RunningApp

from quantkit.serve.gateway.access import HostPolicy
from quantkit.serve.gateway.api_keys import create_key
from quantkit.serve.gateway.errors import RequestRejected

# -------------------------------------------------------------------------------- browsers and keys


@pytest.mark.parametrize(
    ("host", "origin", "is_served"),
    [
        ("localhost:8000", "", True),
        ("127.0.0.1", "", True),
        ("[::1]:8000", "", True),
        ("LOCALHOST.", "", True),
        ("192.168.1.5:8000", "", True),  # an address cannot be rebound
        ("evil.example:8000", "", False),
        ("localhost.evil.example", "", False),
        ("", "", False),
        ("localhost@evil.example", "", False),
        ("localhost", "http://localhost:3000", True),
        ("localhost", "http://127.0.0.1", True),
        ("192.168.1.5:8000", "http://192.168.1.5:3000", True),
        ("localhost", "https://evil.example", False),
        ("localhost", "null", False),
        ("localhost", "http://192.168.1.6", False),
        ("evil.example", "http://evil.example", False),
        ("box.lan", "https://ui.lan", True),
        ("BOX.lan:80", "", True),
        ("box.lan.evil.example", "", False),
    ],
)
def test_only_names_of_this_machine_and_allowed_ones_are_served(
    host: str, origin: str, is_served: bool
) -> None:
    policy = HostPolicy("127.0.0.1", ("box.lan", "ui.lan"))
    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    if is_served:
        policy.check(headers)
    else:
        with pytest.raises(RequestRejected, match="--allow-host"):
            policy.check(headers)


def test_second_host_or_origin_does_not_hide_the_first() -> None:
    policy = HostPolicy("127.0.0.1", ())
    for name, bad, good in (
        (b"host", b"evil.example", b"localhost"),
        (b"origin", b"http://evil.example", b"http://localhost"),
    ):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(RequestRejected):
                policy.check([(name, value) for value in pair])


def test_browser_of_another_site_reaches_nothing_without_keys() -> None:
    with run_front(settings={"allowed_hosts": ("box",)}) as front:
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            assert front.post({"prompt": "{}"}, **headers).status_code == 403
            for path in ("/health", "/metrics", "/ready", "/v1/models"):
                assert httpx2.get(front.root + path, headers=headers).status_code == 403
        assert not front.engine.asked
        assert front.post({"prompt": "{}"}, host="box:1", origin="http://box").status_code == 200


def test_key_replaces_the_check_of_host_and_origin() -> None:
    text, entry = create_key("a")
    with run_front(keys=(entry,)) as front:
        headers = {"host": "api.example", "origin": "https://chat.example"}
        assert front.post({"prompt": "{}"}, **headers).status_code == 401
        headers["authorization"] = f"Bearer {text}"
        assert front.post({"prompt": "{}"}, **headers).status_code == 200
        assert httpx2.get(f"{front.root}/metrics", headers=headers).status_code == 200
        del headers["authorization"]  # open on loopback, but not to a page of another site
        assert httpx2.get(f"{front.root}/metrics").status_code == 200
        assert httpx2.get(f"{front.root}/metrics", headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/metrics", "/ready"])
def test_operators_endpoints_need_a_key_beyond_loopback(path: str) -> None:
    text, entry = create_key("a")
    for keys in ((), (entry,)):
        for host, is_open, status in (
            ("0.0.0.0", False, 401),
            ("0.0.0.0", True, 200),
            ("127.0.0.1", False, 200),
            ("::1", False, 200),
        ):
            with run_front(
                keys=keys, settings={"host": host, "has_open_metrics": is_open}
            ) as front:
                answer = httpx2.get(front.root + path)
                assert answer.status_code == status
                assert status == 200 or "--open-metrics" in answer.json()["error"]["message"]
                with_key = httpx2.get(
                    front.root + path, headers={"authorization": f"Bearer {text}"}
                )
                assert with_key.status_code == (200 if keys else status)
                assert httpx2.get(f"{front.root}/health").status_code == 200


def test_transformers_engine_without_a_gateway_checks_host_and_origin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server that `quantkit serve` starts, with a decoder that is never used."""
    from quantkit.serve.engines import decoding, engine_process, start

    served = list[Any]()
    decoder = SimpleNamespace(name="a", context=1, close=lambda: None)
    monkeypatch.setattr(decoding, "Decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(
        engine_process,
        "make_server",
        lambda app, *_: SimpleNamespace(run=lambda: served.append(app)),
    )
    plan: Any = SimpleNamespace(
        options=SimpleNamespace(name="", chat_template=None, host="127.0.0.1", port=1),
        target=SimpleNamespace(path=".", name="a"),
        memory=SimpleNamespace(context=1),
        launch=SimpleNamespace(notes=()),
    )
    start.run_transformers(plan, ["box"], lambda _: None, start.skip_check)
    with RunningApp(served[0]) as running:
        url = f"http://127.0.0.1:{running.port}/v1/models"
        for headers, status in (
            ({}, 200),
            ({"host": "box"}, 200),
            ({"host": "evil.example"}, 403),
            ({"origin": "http://evil.example"}, 403),
        ):
            assert httpx2.get(url, headers=headers).status_code == status


# -------------------------------------------------------------------------------------------- turns


def test_thousand_prompts_count_as_a_thousand_turns() -> None:
    with run_front(running=4) as front, ThreadPoolExecutor(3) as pool:

        def ask(prompts: Any, **more: Any) -> Any:
            return pool.submit(front.post, {"prompt": prompts, **more})

        policy = front.gateway.queue.policy
        plan = json.dumps({"hold": True})
        first = ask(plan)
        wait_until(lambda: policy.n_running == 1)
        large = ask([plan] * 1000)
        wait_until(lambda: policy.waiting)
        assert policy.n_running == 1  # it does not fit yet
        later = ask(plan)
        wait_until(lambda: len(policy.waiting) == 2)  # and nothing passes it
        front.engine.released.set()
        assert [one.result().status_code for one in (first, large, later)] == [200, 200, 200]
        assert [len(one["prompt"]) for one in front.engine.asked] == [14, 1000, 14]
        wait_until(lambda: policy.n_running == 0)  # slots are released after the answers


@pytest.mark.parametrize(
    ("path", "values", "turns"),
    [
        ("completions", {"prompt": "a"}, 1),
        ("completions", {"prompt": [1, 2, 3]}, 1),
        ("completions", {"prompt": ["a"]}, 1),
        ("completions", {"prompt": ["a", "b", "c"]}, 3),
        ("completions", {"prompt": [[1, 2], [3]]}, 2),
        ("completions", {"prompt": ["a\n", "é", ""], "n": 2}, 6),
        ("completions", {"prompt_embeds": ["a", "b"], "best_of": 3, "n": 1}, 6),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * 4, "n": 2}, 2),
        ("responses", {"input": [{"role": "user", "content": "a"}] * 4}, 1),
        ("embeddings", {"input": ["a"] * 7}, 7),
    ],
)
def test_key_is_limited_in_turns(path: str, values: dict[str, Any], turns: int) -> None:
    """A key of `turns` turns is served; one of fewer is refused, for good."""
    enough, key = create_key("enough", most=turns)
    few, small = create_key("few", most=max(1, turns - 1))
    with run_front(keys=(key, small)) as front:
        if turns > 1:
            refused = front.post(values, path, authorization=f"Bearer {few}")
            assert refused.status_code == 400
            assert f"at most {turns - 1} for this key, found {turns}" in refused.text
            assert not front.engine.asked
        assert front.post(values, path, authorization=f"Bearer {enough}").status_code == 200
        assert len(front.engine.asked) == 1
