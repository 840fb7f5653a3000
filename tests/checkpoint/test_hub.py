"""Models by folder, by built-in name and from a Hub that runs on the loopback interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from support.places.hub_endpoint import use_hub

from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": json.dumps({"quantization_config": {"weight_block_size": [2, 2]}}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps({
        "weight_map": {"w": "a.safetensors", "w_scale_inv": "b.safetensors", "big": "b.safetensors"}
    }).encode(),
    "a.safetensors": save({"w": torch.ones(3, 3).to(torch.float8_e4m3fn)}),
    "b.safetensors": save({"w_scale_inv": torch.ones(2, 2), "big": torch.zeros(200_000)}),
    "pytorch_model.bin": b"never fetched",
    "original/x.safetensors": b"never fetched",
}


class FakeHub:
    """The responses of the Hub that a download needs, and a record of the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.sent_bytes = 0
        self.ranges = True
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub_.answer(self)

            def do_HEAD(self) -> None:
                hub_.answer(self)

            def log_message(self, format: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append(path)
        if path.startswith("/api/models/org/tiny/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.files.items())
            ]
            return self.send(request, 200, json.dumps(listing).encode())
        if path in {
            "/api/models/org/tiny",
            *(f"/api/models/org/tiny/revision/{name}" for name in ("main", "v1", COMMIT)),
        }:
            siblings = [{"rfilename": name} for name in self.files]
            return self.send(
                request,
                200,
                json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        start, _, name = path.partition(f"/resolve/{COMMIT}/")
        if start == "/org/tiny" and name in self.files:
            return self.send(request, 200, self.files[name])
        known = path.startswith(("/api/models/org/tiny/", "/org/tiny/"))
        code = (
            "RevisionNotFound"
            if "/revision/" in path and known
            else "EntryNotFound"
            if known
            else "RepoNotFound"
        )
        return self.send(request, 404, b"{}", code)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, content: bytes, code: str = ""
    ) -> None:
        total, requested = len(content), request.headers.get("Range")
        if status == 200 and requested and self.ranges:
            first, _, last = requested.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last or total) + 1], 206
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Content-Type", "application/json")
        request.send_header(
            "ETag", f'"{abs(hash(self.files.get(unquote(request.path).rpartition("/")[2], b"")))}"'
        )
        request.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            request.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}"
            )
        if code:
            request.send_header("X-Error-Code", code)
        request.end_headers()
        if request.command == "GET":
            self.sent_bytes += len(content)
            request.wfile.write(content)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(dict(FILES))
    use_hub(fake.url, tmp_path, monkeypatch)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def get_error(model: str, revision: str | None = None) -> str:
    messages = set()
    for resolve in (hub.resolve_model, hub.read_model_headers):
        with pytest.raises((CheckpointError, UsageError)) as caught:
            resolve(model, revision)
        messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()


def test_headers_are_fetched_without_weights(fake_hub: FakeHub) -> None:
    headers = hub.read_model_headers("org/tiny", "main")
    assert headers.revision == COMMIT
    assert {name: (spec.dtype, spec.shape) for name, spec in headers.specs.items()} == {
        "w": ("F8_E4M3", (3, 3)),
        "big": ("F32", (200_000,)),
    }
    assert set(headers.stored_specs) == {"w", "w_scale_inv", "big"}
    assert headers.config.has("quantization_config")
    assert fake_hub.sent_bytes < 300_000  # of 800,000: the first piece of each file


def test_model_is_downloaded_and_opened(fake_hub: FakeHub) -> None:
    model = hub.resolve_model("org/tiny", "v1")
    assert model.revision == COMMIT
    opened = Checkpoint.open(model.folder)
    assert opened.read(["w"])["w"].tolist() == [[1.0] * 3] * 3
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_data_in_subfolders_is_downloaded_and_nothing_else(fake_hub: FakeHub) -> None:
    """As a folder's is carried over; names are allow-listed, and never patterns."""
    folder = "additional_chat_templates"
    fake_hub.files |= {
        f"{folder}/tool_use.jinja": b"{{ 1 }}",
        f"{folder}/.hidden.jinja": b"x",
        f"{folder}/x.py": b"x",
        f"{folder}/deep/x.jinja": b"x",
        "other/x.jinja": b"x",
        "[a-z].json": b"{}",
    }
    model = hub.resolve_model("org/tiny", "v1")
    names = {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*.*")}
    assert {name for name in names if "/" in name} == {
        f"{folder}/tool_use.jinja",
        f"{folder}/deep/x.jinja",
        "other/x.jinja",
    }
    assert "[a-z].json" in names
    assert [path.name for path in Checkpoint.open(model.folder).sidecars].count(
        "tool_use.jinja"
    ) == 1


def test_unknown_model_and_revision_are_rejected(fake_hub: FakeHub) -> None:
    assert get_error("org/none") == (
        "org/none: expected this model on the Hub, found none that this user may see; check "
        "source.model"
    )
    assert get_error("org/tiny", "v9") == (
        "org/tiny@v9: expected this revision on the Hub, found none; check source.revision"
    )


def test_incomplete_repositories_are_rejected(fake_hub: FakeHub) -> None:
    config = fake_hub.files.pop("config.json")
    with pytest.raises(
        CheckpointError, match=r"org/tiny: expected a config.json in the repository, found none"
    ):
        hub.read_model_headers("org/tiny")
    fake_hub.files["config.json"] = config
    del fake_hub.files["a.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        hub.read_model_headers("org/tiny")
    assert str(caught.value) == (
        "org/tiny: model.safetensors.index.json: expected the repository to hold every file, found "
        "1 missing, the first 'a.safetensors'; the upload is not complete, use another revision"
    )
    del fake_hub.files["model.safetensors.index.json"]
    with pytest.raises(
        CheckpointError, match="expected model.safetensors or .*, found neither; quantkit reads"
    ):
        hub.read_model_headers("org/tiny")


def test_damaged_headers_are_rejected_before_the_download(fake_hub: FakeHub) -> None:
    fake_hub.files["a.safetensors"] = save({"w": torch.ones(3, 3)})
    with pytest.raises(
        CheckpointError,
        match="tensor 'w_scale_inv': expected 'w' of this scale as F8_E4M3, found F32",
    ):
        hub.read_model_headers("org/tiny")
    fake_hub.files["a.safetensors"] = b"\x02" + b"\0" * 7 + b"[]"
    with pytest.raises(
        CheckpointError, match=r"org/tiny: a.safetensors: header: expected to start with"
    ):
        hub.read_model_headers("org/tiny")
    fake_hub.files["a.safetensors"] = b"abc"
    with pytest.raises(
        CheckpointError,
        match=r"org/tiny: a.safetensors: expected at least 8 bytes of header length",
    ):
        hub.read_model_headers("org/tiny")


def test_long_header_takes_a_second_request(fake_hub: FakeHub) -> None:
    names = {f"{'n' * 1000}{number}": torch.zeros(1) for number in range(300)}
    fake_hub.files = {"config.json": b"{}", "model.safetensors": save(names)}
    assert set(hub.read_model_headers("org/tiny").specs) == set(names)
    assert fake_hub.asked.count(f"/org/tiny/resolve/{COMMIT}/model.safetensors") == 2


def test_server_without_ranges_is_rejected(fake_hub: FakeHub) -> None:
    fake_hub.ranges = False
    with pytest.raises(
        CheckpointError,
        match=r"org/tiny: [ab].safetensors: expected the server to send a part .* 200",
    ):
        hub.read_model_headers("org/tiny")


def test_missing_network_and_offline_mode_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    for resolve in (hub.resolve_model, hub.read_model_headers):
        with pytest.raises(CheckpointError) as caught:
            resolve("org/tiny")
        message = str(caught.value)
        assert message.startswith(
            "org/tiny: expected to reach http://127.0.0.1:9 or find the model in the local cache, "
            "found no connection ("
        )
        assert message.endswith(
            "; connect, or download the model elsewhere and give its folder as source.model"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get_error("org/tiny") == (
        "org/tiny: expected to reach http://127.0.0.1:9 or find the model in the local cache, "
        "found offline mode (HF_HUB_OFFLINE); connect, or download the model elsewhere and give "
        "its folder as source.model"
    )


def test_local_models_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    assert hub.resolve_model(str(tmp_path / "m")) == hub.ResolvedModel(
        folder=tmp_path / "m", revision=None
    )
    assert hub.read_model_headers(str(tmp_path / "m")).specs["a"].shape == (2,)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("m").folder == tmp_path / "m"
    assert get_error(f"{tmp_path}/m", "v1") == (
        f"source.revision: expected none for a model on this machine ({tmp_path}/m), found 'v1'; "
        "remove it"
    )
    assert get_error("./absent") == (
        "source.model: expected a folder, builtin:<name> or a Hub id like org/name, found "
        "'./absent', which is none of these; check the path"
    )
    assert get_error("builtin:absent").startswith(
        "source.model: no built-in model 'builtin:absent'; known: "
    )
