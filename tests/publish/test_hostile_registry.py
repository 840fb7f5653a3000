"""A registry, a hub and an S3 store that attack the machine that pulls."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.places.raw_server import Answer, RawServer, Serve, endless, make_head
from support.places.using import Record, pull_from

from quantkit.errors import QuantkitError, TransferError
from quantkit.io import bounded_http, hub_client
from quantkit.io.bounded_http import ResponseLimits
from quantkit.io.public_hosts import is_public_host
from quantkit.io.retry import RetryPolicy
from quantkit.publish import oci_auth
from quantkit.publish.oci_auth import (
    check_realm,
    get_registered_domain,
    parse_challenge,
    parse_token,
)
from quantkit.publish.remotes import fsspec, s3

BUFFERS = 40_000_000
"""Bytes of a pull with the socket buffers of all its connections; unbounded ones take gigabytes."""
ONCE = RetryPolicy(tries=2, first_wait=0.01)
DIGEST = "sha256:" + "0" * 64


def pull(server: RawServer, tmp_path: Path) -> str:
    """Pull from a hostile registry; return the sentence of the refusal."""
    with pytest.raises(QuantkitError) as caught:
        pull_from(f"oci://127.0.0.1:{server.port}/team/tiny:v1", tmp_path / "got", ONCE)
    assert not (tmp_path / "got").exists()
    return str(caught.value)


def answer_json(value: object, **headers: str) -> list[bytes]:
    """Return an answer in JSON."""
    return [make_head(**headers), json.dumps(value).encode()]


# ------------------------------------------------------------------------------- bodies of answers


def test_endless_manifest_is_refused(serve: Serve, tmp_path: Path, record_property: Record) -> None:
    server = serve(lambda *_: endless())
    assert "expected at most 4,000,000 bytes, found more; do not use this" in pull(server, tmp_path)
    assert server.sent < BUFFERS
    record_property("fault", "oci: a manifest without end")


def test_compressed_manifest_is_refused(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    server = serve(lambda *_: [make_head(Content_Encoding="gzip"), bomb])
    assert "expected an answer that is not compressed, found 'gzip'" in pull(server, tmp_path)
    record_property("fault", "oci: a compressed bomb")


def test_endless_error_is_refused(serve: Serve, tmp_path: Path, record_property: Record) -> None:
    server = serve(lambda *_: endless(status=418))
    assert "expected at most 4,000,000 bytes" in pull(server, tmp_path)
    assert server.sent < BUFFERS
    record_property("fault", "oci: an error without end")


def test_blob_longer_than_its_size_is_refused(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    """The size is that of the image; also for the error in place of a blob."""
    title = {"org.opencontainers.image.title": "quantkit/manifest.json"}
    layer = {"digest": DIGEST, "size": 1000, "annotations": title}
    for status in (200, 500):

        def answer(_: str, path: str, status: int = status) -> Iterable[bytes]:
            if "/manifests/" in path:
                return answer_json({"schemaVersion": 2, "layers": [layer]})
            return endless(status=status)

        server = serve(answer)
        assert "expected at most" in pull(server, tmp_path)
        assert server.sent < BUFFERS
    record_property("fault", "oci: a blob without end")


def test_byte_per_connection_is_given_up(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    """A byte is no progress: it would reset the number of tries for ever."""
    manifest = json.dumps({
        "schema_version": 1,
        "files": {"config.json": {"sha256": "0" * 64, "bytes": 10**6}},
    }).encode()
    from quantkit.publish.oci_client import format_digest

    def layer(name: str, digest: str, size: int) -> dict[str, object]:
        note = {"org.opencontainers.image.title": name}
        return {"digest": digest, "size": size, "annotations": note}

    layers = [
        layer("quantkit/manifest.json", format_digest(manifest), len(manifest)),
        layer("config.json", DIGEST, 10**6),
    ]

    def answer(_: str, path: str) -> Iterable[bytes]:
        if "/manifests/" in path:
            return answer_json({"schemaVersion": 2, "layers": layers})
        if path.endswith(format_digest(manifest)):
            return [make_head(), manifest]
        return [make_head(206, Content_Length="1000000"), b"x"]

    server = serve(answer)
    assert "2 failures in a row" in pull(server, tmp_path)
    assert sum(DIGEST in line for line in server.requests) == 2
    record_property("fault", "oci: one byte per connection")


# ------------------------------------------------------------------------------------------- logins


REALMS = (
    "http://169.254.169.254/latest/meta-data", "https://169.254.169.254/x", "http://127.0.0.1:1/x",
    "https://127.0.0.1/x", "https://localhost/x", "https://[::1]/x", "https://2130706433/x",
    "https://0x7f000001/x", "https://127.1/x", "https://evil.example.net/token", "file:///etc/passwd",
    "https://registry.example.com@evil.net/x", "https://user:pw@registry.example.com/x", "ftp://x",
    "https://registry.example.com.evil.net/x", "http://registry.example.com/token", "//x", "",
    "https://evil-example.com/x", "https://com/x", "https://registry.example.com:99999/x",
    "https://metadata.google.internal/x", "https://\x00/x", "https://[::ffff:127.0.0.1]/x",
)  # fmt: skip


@pytest.mark.parametrize("realm", REALMS)
def test_realm_of_another_host_is_refused(realm: str, record_property: Record) -> None:
    with pytest.raises(
        TransferError, match="expected (the registry to name a login over https|a login at)"
    ):
        check_realm(realm, "registry.example.com:5000", "https", "oci://x")
    record_property("fault", f"oci: the realm {realm!r}")


@pytest.mark.parametrize(
    ("realm", "registry"),
    [
        ("https://auth.docker.io/token", "registry-1.docker.io"),
        ("https://ghcr.io/token", "ghcr.io"),
        ("https://gitlab.com/jwt/auth", "registry.gitlab.com"),
        ("https://docker-auth.elastic.co/auth", "docker.elastic.co"),
        ("https://quay.io/v2/auth", "quay.io"),
        ("https://own.azurecr.io/oauth2/token", "own.azurecr.io"),
        ("https://registry:5001/auth", "registry:5000"),
        ("https://10.0.0.5:5001/auth", "10.0.0.5:5000"),
        ("https://Auth.Example.co.uk/x", "registry.example.co.uk"),
    ],
)
def test_realm_of_real_registries_is_accepted(realm: str, registry: str) -> None:
    assert check_realm(realm, registry, "https", "oci://x") == realm


def test_further_hosts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    realm = "https://login.partner.net/token"
    with pytest.raises(TransferError, match="add it to QUANTKIT_OCI_AUTH_HOSTS"):
        check_realm(realm, "registry.example.com", "https", "oci://x")
    monkeypatch.setenv(oci_auth.AUTH_HOSTS_VARIABLE, "other.net, login.partner.net")
    assert check_realm(realm, "registry.example.com", "https", "oci://x") == realm


def test_domains_are_compared_by_their_registered_part() -> None:
    assert get_registered_domain("a.b.example.com") == "example.com"
    assert get_registered_domain("a.example.co.uk") == "example.co.uk"
    for host in ("localhost", "10.0.0.1", "127.1", "co.uk", "registry", "a.local", "::1", ""):
        assert get_registered_domain(host) is None, host
    assert not is_public_host("169.254.169.254") and not is_public_host("[fe80::1]")
    assert is_public_host("storage.googleapis.com") and is_public_host("8.8.8.8")


def test_realm_makes_no_call_elsewhere(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    """With a real server at the named address, which is not called."""
    victim = serve(lambda *_: answer_json({"token": "x"}))
    target = f"http://localhost:{victim.port}/latest/meta-data"
    challenge = f'Bearer realm="{target}",service="s",scope="repository:x:pull"'
    registry = serve(lambda *_: [make_head(401, WWW_Authenticate=challenge)])
    assert "expected the registry to name a login over https" in pull(registry, tmp_path)
    assert victim.requests == []
    record_property("fault", "oci: a realm on this machine")


@pytest.mark.parametrize(
    "token", ["a\r\nX-Evil: 1", "a b", "", "\u00e4", "x" * 40_000, 7, None, "a\x00b"]
)
def test_unusable_token_is_refused(
    token: object, serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    """A line end would add a header to each request."""

    def answer(_: str, path: str) -> Iterable[bytes]:
        if path.startswith("/token"):
            return answer_json({"token": token})
        realm = f'Bearer realm="http://127.0.0.1:{server.port}/token",service="s"'
        return [make_head(401, WWW_Authenticate=realm)]

    server = serve(answer)
    assert "expected a token of printable characters" in pull(server, tmp_path)
    assert not any(b"x-evil" in head.lower() for head in server.heads)
    record_property("fault", "oci: a token that is none")


def test_endless_login_is_refused(serve: Serve, tmp_path: Path, record_property: Record) -> None:
    def answer(_: str, path: str) -> Iterable[bytes]:
        if path.startswith("/token"):
            return endless()
        realm = f'Bearer realm="http://127.0.0.1:{server.port}/token"'
        return [make_head(401, WWW_Authenticate=realm)]

    server = serve(answer)
    assert "expected at most 4,000,000 bytes" in pull(server, tmp_path)
    assert server.sent < BUFFERS
    record_property("fault", "oci: a login without end")


def test_redirect_of_a_blob_to_this_machine_is_refused(
    serve: Serve, tmp_path: Path, record_property: Record
) -> None:
    """Downloads may lead to any public host over https: registries redirect to stores."""
    victim = serve(lambda *_: [make_head(), b"secret"])
    title = {"org.opencontainers.image.title": "quantkit/manifest.json"}
    layer = {"digest": DIGEST, "size": 6, "annotations": title}
    for target in (
        f"http://localhost:{victim.port}/x",
        "http://169.254.169.254/x",
        "https://10.1/",
    ):

        def answer(_: str, path: str, target: str = target) -> Iterable[bytes]:
            if "/manifests/" in path:
                return answer_json({"schemaVersion": 2, "layers": [layer]})
            return [make_head(307, Location=target)]

        assert "expected downloads from public hosts" in pull(serve(answer), tmp_path)
    assert victim.requests == []
    record_property("fault", "oci: a redirect to this machine")


def test_challenge_is_parsed_without_its_order() -> None:
    header = 'Bearer service="s",realm="https://x/y",scope="repository:a:pull,push"'
    assert parse_challenge(header) == (
        "bearer",
        {"service": "s", "realm": "https://x/y", "scope": "repository:a:pull,push"},
    )
    assert parse_challenge("") == ("", {})
    assert parse_challenge("Bearer " + "a" * 100_000 + '="x"') == ("bearer", {})  # in no time
    assert parse_token(b'{"access_token": "a.b-c_d~+/="}', "x") == "a.b-c_d~+/="


# ------------------------------------------------------------------------------ listings and pages


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[RawServer], None]:
    """Make a server the Hub."""

    def use(server: RawServer) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_token")

    return use


def pull_from_hub(tmp_path: Path) -> str:
    with pytest.raises(QuantkitError) as caught:
        pull_from("hf://team/tiny", tmp_path / "got", ONCE)
    return str(caught.value)


def test_endless_listing_of_the_hub_is_refused(
    serve: Serve,
    hub: Callable[[RawServer], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """Pages without entries that name a next one; and pages of another host."""
    monkeypatch.setattr(hub_client, "MAX_PAGES", 5)
    link = "/api/models/team/tiny/tree/c?cursor=x"

    def answer(_: str, path: str) -> Iterable[bytes]:
        if "/revision/" in path:
            return answer_json({"sha": "c"})
        return answer_json([], Link=f'<{link}>; rel="next"')

    server = serve(answer)
    hub(server)
    assert "found more than 5 pages" in pull_from_hub(tmp_path)
    assert sum("/tree/" in line for line in server.requests) == 5
    victim = serve(lambda *_: answer_json([]))
    link = f"http://localhost:{victim.port}/x"
    assert "expected the listing to stay at 127.0.0.1, found a page at" in pull_from_hub(tmp_path)
    assert victim.requests == []
    record_property("fault", "hf: a listing without end")


def test_endless_answer_of_the_hub_is_refused(
    serve: Serve,
    hub: Callable[[RawServer], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    monkeypatch.setattr(hub_client, "API_ANSWER", ResponseLimits(n_bytes=100_000, seconds=60.0))
    entry = {"type": "file", "path": "quantkit/manifest.json", "size": 1000, "oid": "0" * 40}
    cases: dict[str, Answer] = {
        "revision": lambda *_: endless(),
        "tree": lambda _, path: answer_json({"sha": "c"}) if "/revision/" in path else endless(),
        "file": lambda _, path: (
            answer_json({"sha": "c"})
            if "/revision/" in path
            else answer_json([entry])
            if "/tree/" in path
            else endless()
        ),
        "gzip": lambda *_: [make_head(Content_Encoding="gzip"), gzip.compress(bytes(10**7))],
    }
    for name, answer in cases.items():
        server = serve(answer)
        hub(server)
        said = pull_from_hub(tmp_path)
        assert "expected at most" in said or "not compressed" in said, (name, said)
        assert server.sent < BUFFERS
    record_property("fault", "hf: an answer without end")


class EndlessS3:
    """Stands for s3fs on a bucket with more objects than any artifact."""

    def __init__(self) -> None:
        self.pages = 0

    def call_s3(self, operation: str, **_: object) -> dict[str, object]:
        assert operation == "list_objects_v2"
        self.pages += 1
        content = [{"Key": f"p/{self.pages}", "Size": 1}, {"Key": "p/folder/", "Size": 0}]
        return {"Contents": content, "IsTruncated": True, "NextContinuationToken": "x"}

    def invalidate_cache(self) -> None:
        """Do nothing."""


def test_endless_listing_of_s3_is_refused(record_property: Record) -> None:
    files = EndlessS3()
    with pytest.raises(TransferError, match="found more than 100 pages of files"):
        s3.S3Remote(files, "bucket/p", "s3://bucket/p").sizes()
    assert files.pages == s3.MAX_PAGES
    record_property("fault", "s3: a listing without end")


def test_store_that_ignores_ranges_is_refused(record_property: Record) -> None:
    """As a store that expands a compressed object does."""

    class Store:
        def cat_file(self, *_: object, **__: object) -> bytes:
            return bytes(1_000_000)

        def info(self, _: str) -> dict[str, int]:
            return {"size": 1000}

    with pytest.raises(TransferError, match="expected 1,000 bytes, found 1,000,000; the store"):
        fsspec.FsspecRemote(Store(), "root", "gs://x").fetch_manifest("m")
    record_property("fault", "gs: more bytes than the range")


def test_limits_have_room_for_real_answers() -> None:
    """A manifest of an OCI registry has 4 MiB at most, of which 4 MB are taken; a page of the Hub
    has 1,000 entries of 300 bytes.
    """
    assert bounded_http.SMALL_ANSWER.n_bytes >= 4_000_000
    assert hub_client.API_ANSWER.n_bytes >= 1_000 * 300
