"""Remotes of each kind, with direct access to their files for tests."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.places.hub import TOKEN, FakeHub
from support.places.registry import FakeRegistry
from support.places.wire import Corruptor, Proxy

from quantkit.io.retry import RetryPolicy

REAL_REGISTRY = shutil.which("docker-registry")
KINDS = ("file", "s3", "memory", "oci", "oci-real", "hf")
WIRED = ("s3", "oci", "oci-real", "hf")


@dataclass
class RemoteFixture:
    """An address with direct access to its files: read and write (None removes a file)."""

    kind: str
    address: str
    read: Callable[[str], bytes]
    write: Callable[[str, bytes | None], None]
    port: int | None = None
    route: Callable[[int], str] | None = None  # returns the address through another port
    server: Any = None

    @contextmanager
    def through_proxy(
        self, up: Corruptor | None = None, down: Corruptor | None = None
    ) -> Iterator[tuple[str, Proxy]]:
        """Yield the address through a proxy that corrupts the stream."""
        assert self.port and self.route
        wire = Proxy(self.port, up=up, down=down)
        try:
            yield self.route(wire.port), wire
        finally:
            self.route(self.port)
            wire.close()


@contextmanager
def open_remote_fixture(
    kind: str, folder: Path, patch: pytest.MonkeyPatch, s3_port: int
) -> Iterator[RemoteFixture]:
    """Open a new, empty remote."""
    with ExitStack() as stack:
        if kind == "file":
            yield make_folder(folder / "published")
        elif kind == "memory":
            yield make_memory(folder.name)
        elif kind == "s3":
            yield make_s3(folder.name, patch, s3_port)
        elif kind == "oci":
            server = FakeRegistry()
            stack.callback(server.close)
            yield make_registry(server)
        elif kind == "oci-real":
            yield make_real_registry(folder, stack)
        else:
            hub = FakeHub()
            stack.callback(hub.close)
            yield make_hub(hub, patch, folder)


def make_folder(path: Path) -> RemoteFixture:
    """A local folder."""

    def write(name: str, content: bytes | None) -> None:
        if content is None:
            return (path / name).unlink()
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)

    return RemoteFixture("file", str(path), lambda name: (path / name).read_bytes(), write)


def make_memory(name: str) -> RemoteFixture:
    """fsspec's memory store, which stands for every scheme without a file of its own."""
    import fsspec

    files, root = fsspec.filesystem("memory"), f"/{name}/a"

    def write(name: str, content: bytes | None) -> None:
        files.rm_file(f"{root}/{name}") if content is None else files.pipe_file(
            f"{root}/{name}", content
        )

    return RemoteFixture(
        "memory", f"memory:/{root}", lambda name: bytes(files.cat_file(f"{root}/{name}")), write
    )


def make_s3(name: str, patch: pytest.MonkeyPatch, port: int) -> RemoteFixture:
    """moto's S3 server."""
    import boto3

    bucket = "b-" + hashlib.sha256(name.encode()).hexdigest()[:20]
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "5ecret/of/the/test",
        "AWS_REGION": "us-east-1",
    }
    for variable, value in keys.items():
        patch.setenv(variable, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    client.create_bucket(Bucket=bucket)

    def route(port: int) -> str:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return f"s3://{bucket}/models/a"

    def write(name: str, content: bytes | None) -> None:
        key = f"models/a/{name}"
        client.delete_object(Bucket=bucket, Key=key) if content is None else client.put_object(
            Bucket=bucket, Key=key, Body=content
        )

    def read(name: str) -> bytes:
        return bytes(client.get_object(Bucket=bucket, Key=f"models/a/{name}")["Body"].read())

    return RemoteFixture("s3", route(port), read, write, port, route, client)


def make_registry(server: FakeRegistry) -> RemoteFixture:
    """The strict fake registry; names are resolved through the tagged image manifest."""

    def digest(name: str) -> str:
        import json

        image = json.loads(server.manifests[server.tags["v1"]])
        title = "org.opencontainers.image.title"
        return next(
            str(layer["digest"]) for layer in image["layers"] if layer["annotations"][title] == name
        )

    def write(name: str, content: bytes | None) -> None:
        if content is None:
            del server.blobs[digest(name)]
        else:
            server.blobs[digest(name)] = content

    def route(port: int) -> str:
        return f"oci://127.0.0.1:{port}/team/tiny:v1"

    return RemoteFixture(
        "oci",
        route(server.port),
        lambda name: server.blobs[digest(name)],
        write,
        server.port,
        route,
        server,
    )


def make_real_registry(folder: Path, stack: ExitStack) -> RemoteFixture:
    """Docker's registry, if it is installed."""
    if REAL_REGISTRY is None:
        pytest.skip("docker-registry is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config, root = folder / "registry.yml", folder / "registry"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{root}'}}}}\nhttp: {{addr: "
        f"'127.0.0.1:{port}'}}\n"
    )
    process = subprocess.Popen([REAL_REGISTRY, "serve", str(config)], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)

    def path(name: str) -> Path:
        from quantkit.publish.oci_client import OciClient as Client

        client = Client(f"127.0.0.1:{port}", "team/tiny", "registry", 1, RetryPolicy())
        image: Any = client.manifest("v1")
        title = "org.opencontainers.image.title"
        digest = next(
            str(layer["digest"]) for layer in image["layers"] if layer["annotations"][title] == name
        )[7:]
        client.close()
        return root / "docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"

    def write(name: str, content: bytes | None) -> None:
        path(name).unlink() if content is None else path(name).write_bytes(content)

    def route(port: int) -> str:
        return f"oci://127.0.0.1:{port}/team/tiny:v1"

    return RemoteFixture(
        "oci-real", route(port), lambda name: path(name).read_bytes(), write, port, route
    )


def make_hub(hub: FakeHub, patch: pytest.MonkeyPatch, folder: Path) -> RemoteFixture:
    """The fake Hub, without xet, which needs other servers."""
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "none"))

    def route(port: int) -> str:
        url = f"http://127.0.0.1:{port}"
        patch.setenv("HF_ENDPOINT", url)
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        return "hf://team/tiny"

    def read(name: str) -> bytes:
        return hub.files("team/tiny")[name]

    def write(name: str, content: bytes | None) -> None:
        commits = hub.repos["team/tiny"]["main"]
        files = dict(commits[-1][1])
        old = files.pop(name)
        if content is not None:
            files[name] = content
            if len(content) >= 30_000:
                hub.lfs[hashlib.sha256(content).hexdigest()] = content
        assert old != content
        commits.append((hashlib.sha1(repr((len(commits), name)).encode()).hexdigest(), files))

    return RemoteFixture("hf", route(hub.port), read, write, hub.port, route, hub)
