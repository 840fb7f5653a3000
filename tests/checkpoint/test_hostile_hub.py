"""A Hub that attacks the machine which plans or downloads a model."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session
from support.places.hub_endpoint import use_hub
from support.places.raw_server import Answer, RawServer, Serve, endless, make_head, repeat

from quantkit.checkpoint import hub
from quantkit.errors import CheckpointError
from quantkit.io import bounded_http, hub_client
from quantkit.io.bounded_http import ResponseLimits, call_with_deadline
from quantkit.io.hub_client import HubBudget, bound_hub
from quantkit.io.retry import ResponseRefused, TransientError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUFFERS = 60_000_000
"""Bytes of a refused answer with the socket buffers of eight connections."""
NAMES = ("config.json", "model.safetensors", "tokenizer.json")
RESOLVES: tuple[Callable[[str], object], ...] = (hub.resolve_model, hub.read_model_headers)


def answer_json(value: object, **headers: str) -> list[bytes]:
    """Return an answer in JSON."""
    return [make_head(**headers), json.dumps(value).encode()]


def make_answer(part: str, attack: Callable[[], Iterable[bytes]], n_bytes: int = 2) -> Answer:
    """Return a Hub of three files that attacks in the answers whose path contains `part`."""

    def answer(method: str, path: str) -> Iterable[bytes]:
        if part in path:
            return attack()
        if "/revision/" in path:
            return answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": []})
        if "/tree/" in path:
            return answer_json([
                {"type": "file", "path": name, "size": n_bytes, "oid": "0" * 40} for name in NAMES
            ])
        head = make_head(ETag=f'"{path[-9:]}"', X_Repo_Commit=COMMIT, Content_Length="2")
        return [head, b"" if method == "HEAD" else b"{}"]

    return answer


def drip() -> Iterator[bytes]:
    """Yield a head, and a body of a byte every 50 ms."""
    yield make_head()
    while True:
        time.sleep(0.05)
        yield b" "


def drip_head() -> Iterator[bytes]:
    """Yield a head that does not end, a byte every 50 ms."""
    yield b"HTTP/1.1 200 OK\r\nX: "
    while True:
        time.sleep(0.05)
        yield b"a"


def refuse(
    resolve: Callable[[str], object],
    server: RawServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return the sentence with which a model of the server is refused."""
    use_hub(server.url, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/tiny")
    assert server.sent < BUFFERS
    return str(caught.value)


@pytest.mark.parametrize("resolve", RESOLVES)
@pytest.mark.parametrize("part", ["/revision/", "/tree/"])
def test_endless_and_compressed_answers_of_the_api_are_refused(
    part: str,
    resolve: Callable[[str], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_client, "API_ANSWER", ResponseLimits(n_bytes=1_000_000))
    for attack, expected in (
        (endless, "expected at most 1,000,000 bytes, found more; do not use this server"),
        (partial(endless, status=500), "expected at most 4,000,000 bytes, found more"),
        (
            lambda: [make_head(Content_Encoding="gzip"), gzip.compress(bytes(10**7))],
            "expected an answer that is not compressed, found 'gzip'",
        ),
    ):
        server = serve(make_answer(part, attack))
        assert expected in refuse(resolve, server, tmp_path, monkeypatch)


def test_endless_config_of_a_plan_is_refused(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "JSON_LIMIT_BYTES", 1_000_000)
    server = serve(make_answer("/config.json", endless))
    said = refuse(hub.read_model_headers, server, tmp_path, monkeypatch)
    assert said == (
        "org/tiny: expected at most 1,000,000 bytes, found more; do not use this server"
    )


def test_compressed_config_of_a_plan_is_refused(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = gzip.compress(bytes(10**7))
    server = serve(make_answer("/config.json", lambda: [make_head(Content_Encoding="gzip"), bomb]))
    assert "expected an answer that is not compressed" in refuse(
        hub.read_model_headers, server, tmp_path, monkeypatch
    )
    assert b"accept-encoding: identity" in server.heads[-1].lower()


def test_header_of_a_range_without_end_is_cut(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = partial(endless, status=206, Content_Range="bytes 0-99999/1000000000")
    server = serve(make_answer("/model.safetensors", attack))
    assert "model.safetensors: " in refuse(hub.read_model_headers, server, tmp_path, monkeypatch)


@pytest.mark.parametrize("resolve", RESOLVES)
def test_slow_body_and_slow_head_end_at_a_deadline(
    resolve: Callable[[str], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_client, "API_ANSWER", ResponseLimits(n_bytes=10**6, seconds=0.3))
    monkeypatch.setattr(hub_client, "call_with_deadline", partial(call_with_deadline, seconds=0.5))
    for attack in (drip, drip_head):
        start = time.monotonic()
        said = refuse(resolve, serve(make_answer("/tree/", attack)), tmp_path, monkeypatch)
        assert said.startswith("org/tiny: expected an answer of the Hub in time, found: the ")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("resolve", RESOLVES)
def test_endless_listing_and_listing_of_another_host_are_refused(
    resolve: Callable[[str], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_client, "MAX_PAGES", 5)
    link = f"/api/models/org/tiny/tree/{COMMIT}?cursor=x"

    def attack() -> list[bytes]:
        return answer_json([], Link=f'<{link}>; rel="next"')

    server = serve(make_answer("/tree/", attack))
    said = refuse(resolve, server, tmp_path, monkeypatch)
    assert "found more than 5 pages of them" in said
    assert sum("/tree/" in line for line in server.requests) == 5
    victim = serve(lambda *_: answer_json([]))
    link = f"http://localhost:{victim.port}/x"
    said = refuse(resolve, serve(make_answer("/tree/", attack)), tmp_path, monkeypatch)
    assert "expected the listing to stay at 127.0.0.1, found a page at 'localhost'" in said
    assert victim.requests == []


@pytest.mark.parametrize("resolve", RESOLVES)
@pytest.mark.parametrize(
    "page", [{}, [7], [{"type": "file", "path": "config.json", "size": -1, "oid": "0"}], [{}]]
)
def test_listing_of_something_else_is_refused(
    page: object,
    resolve: Callable[[str], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(make_answer("/tree/", lambda: answer_json(page)))
    assert "found " in refuse(resolve, server, tmp_path, monkeypatch)


def test_second_listing_without_end_exceeds_the_requests_of_the_download(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub lists again, and follows pages to any host."""
    monkeypatch.setattr(hub, "MAX_PAGES", 10)
    listings = list[str]()
    plain = make_answer("nothing", endless)

    def answer(method: str, path: str) -> Iterable[bytes]:
        if "/tree/" not in path:
            return plain(method, path)
        listings.append(path)
        if len(listings) == 1:
            return plain(method, path)
        return answer_json([], Link=f'<{server.url}/tree/{COMMIT}?{len(listings)}>; rel="next"')

    server = serve(answer)
    said = refuse(hub.resolve_model, server, tmp_path, monkeypatch)
    assert "expected at most 70 requests, needed more; do not use this server" in said
    assert len(listings) <= 71


@pytest.mark.parametrize("name", NAMES)
def test_file_longer_than_listed_exceeds_the_bytes_of_the_download(
    name: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_API_BYTES", 1_000_000)

    def attack() -> Iterator[bytes]:
        yield make_head(ETag='"1"', X_Repo_Commit=COMMIT, X_Linked_Size="3000000000")
        yield from repeat()

    server = serve(make_answer(f"/{name}", attack))
    said = refuse(hub.resolve_model, server, tmp_path, monkeypatch)
    assert "expected at most 1,000,012 bytes of all answers, found more" in said
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert written < 2_000_000


def test_model_larger_than_the_disk_is_refused_before_the_download(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(make_answer("nothing", endless, n_bytes=10**18))
    said = refuse(hub.resolve_model, server, tmp_path, monkeypatch)
    assert said.startswith("org/tiny: expected 3000000000.0 GB free in ")
    assert not any("/resolve/" in line for line in server.requests)


def test_slow_file_is_given_up(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_http, "RATE_WINDOW_SECONDS", 0.3)
    methods = list[str]()

    def attack() -> Iterator[bytes]:
        head = server.heads[-1].startswith(b"HEAD")
        methods.append("HEAD" if head else "GET")
        yield make_head(ETag='"1"', X_Repo_Commit=COMMIT, Content_Length="1000")
        if not head:
            yield from drip()

    server = serve(make_answer("/config.json", attack))
    said = refuse(hub.resolve_model, server, tmp_path, monkeypatch)
    assert "the server sent less than 1,000 bytes per second" in said
    assert "GET" in methods


@pytest.mark.parametrize("resolve", RESOLVES)
@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/config.json"])
def test_redirect_to_this_machine_is_not_followed(
    part: str,
    resolve: Callable[[str], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = serve(lambda *_: answer_json({"sha": COMMIT}))
    for target in (
        f"http://localhost:{victim.port}/x",
        "http://169.254.169.254/x",
        "https://10.1/",
    ):

        def attack(target: str = target) -> list[bytes]:
            return [make_head(307, Location=target, X_Repo_Commit=COMMIT, ETag='"1"')]

        said = refuse(resolve, serve(make_answer(part, attack)), tmp_path, monkeypatch)
        assert "expected downloads from public hosts over https, found a redirect to" in said
    assert victim.requests == []


@pytest.mark.parametrize(
    "header",
    [{"Retry-After": "1000000"}, {"RateLimit": f'"api";r=0;t={"9" * 400}'}],
    ids=["Retry-After", "RateLimit"],
)
@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/config.json"])
def test_server_demands_no_long_wait(
    part: str,
    header: dict[str, str],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """huggingface_hub sleeps as long as a server says."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
    server = serve(make_answer(part, lambda: [make_head(429, **header), b""]))
    assert "found: the server demands a wait of " in refuse(
        hub.resolve_model, server, tmp_path, monkeypatch
    )


# ------------------------------------------------------------------------------- the client's scope


def test_mirror_cannot_switch_to_a_client_without_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Xet's client is native; its address would come from the mirror."""
    use_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with bound_hub(HubBudget(n_bytes=1, n_requests=1)):
        assert constants.HF_HUB_DISABLE_XET
    assert not constants.HF_HUB_DISABLE_XET
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    with bound_hub(HubBudget(n_bytes=1, n_requests=1)):
        assert not constants.HF_HUB_DISABLE_XET


def test_budget_ends_with_its_scope(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda *_: [make_head(), b"{}"])
    use_hub(server.url, tmp_path, monkeypatch)
    with bound_hub(HubBudget(n_bytes=3, n_requests=9)):
        assert get_session().get(server.url).content == b"{}"
        with pytest.raises(ResponseRefused, match="at most 3 bytes of all answers"):
            get_session().get(server.url)
    client = get_session()
    assert not isinstance(client, hub_client.HubClient)
    assert client.get(server.url).content == b"{}"


def test_budget_of_time_ends_a_download(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda *_: drip())
    use_hub(server.url, tmp_path, monkeypatch)
    budget = HubBudget(n_bytes=10**6, n_requests=9, seconds=0.2)
    with (
        bound_hub(budget),
        pytest.raises(TransientError, match="took more than 0 seconds"),
        get_session().stream("GET", server.url) as answer,
    ):
        answer.read()


def test_range_bounds_an_answer_that_ignores_it(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HfFileSystem holds such an answer in memory."""
    server = serve(lambda *_: endless())
    use_hub(server.url, tmp_path, monkeypatch)
    with (
        hub_client.HubClient() as client,
        pytest.raises(ResponseRefused, match="at most 100 bytes"),
    ):
        client.get(server.url, headers={"Range": "bytes=100-199"})
    with hub_client.HubClient() as client, pytest.raises(ResponseRefused, match="8,000,000 bytes"):
        client.get(server.url + "/org/tiny/resolve/main/x")
