"""Data sets of the hub whose server or repository attacks the machine that reads them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import fsspec
import pytest
from huggingface_hub import HfFileSystem
from support.places.hub_endpoint import use_hub
from support.places.raw_server import Answer, RawServer, Serve, endless, make_head

from quantkit.errors import CalibrationError
from quantkit.evaluate.lm_eval_tasks import open_lm_eval_tasks
from quantkit.evaluate.tasks import load_tasks
from quantkit.io import hub_client
from quantkit.io.bounded_http import ResponseLimits
from quantkit.texts import hub_data
from quantkit.texts.corpora import load_set
from quantkit.texts.hub_data import bound_data_set, translate_library_faults

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = b'{"text": "one"}\n{"text": "two"}\n'
README = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
BUFFERS = 60_000_000
MIXTURE = f"""\
version: 2
name: mixed
parts:
  - name: a
    kind: web
    rows: 2
    licence: MIT
    datasets: {{path: org/d, split: train, revision: {COMMIT}}}
"""


def make_answer(
    files: dict[str, bytes], part: str, attack: Callable[[], Iterable[bytes]]
) -> Answer:
    """Return a Hub with one data set that attacks in the answers whose path contains `part`."""

    def answer(method: str, path: str) -> Iterable[bytes]:
        if part in path and (method == "GET" or "/api/" in path):
            return attack()
        listing = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        if "/tree/" in path or "/paths-info/" in path:
            return [make_head(), json.dumps(listing).encode()]
        if "/revision/" in path:
            return [
                make_head(),
                json.dumps({"id": "org/d", "sha": COMMIT, "siblings": siblings}).encode(),
            ]
        name = path.partition("?")[0].rpartition("/")[2]
        if name not in files:
            return [make_head(404, X_Error_Code="EntryNotFound", Content_Length="2"), b"{}"]
        head = make_head(
            ETag=f'"{name}"', X_Repo_Commit=COMMIT, Content_Length=str(len(files[name]))
        )
        return [head, b"" if method == "HEAD" else files[name]]

    return answer


def make_files(data_files: str = "data.jsonl") -> dict[str, bytes]:
    """Return the files of a data set whose README names `data_files`."""
    return {"README.md": README.format(data_files).encode(), "data.jsonl": ROWS}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RawServer], object]:
    """Return a function that loads a mixture of a data set of a server."""

    def load_from(server: RawServer) -> object:
        use_hub(server.url, tmp_path, monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        HfFileSystem.clear_instance_cache()
        (tmp_path / "mixed.yaml").write_text(MIXTURE, encoding="utf-8")
        return load_set(str(tmp_path / "mixed.yaml"), tmp_path)

    return load_from


def refuse(load: Callable[[RawServer], object], server: RawServer) -> str:
    """Return the sentence with which a data set is refused."""
    with pytest.raises(CalibrationError) as caught:
        load(server)
    assert server.sent < BUFFERS
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_rows_of_the_hub_are_read(load: Callable[[RawServer], object], serve: Serve) -> None:
    server = serve(make_answer(make_files(), "nothing", endless))
    corpus = load(server)
    assert corpus.parts[0].texts == ("one", "two")  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["/README.md", "/revision/", "/tree/", "/data.jsonl"])
def test_endless_and_compressed_answers_are_refused(
    part: str,
    load: Callable[[RawServer], object],
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_client, "API_ANSWER", ResponseLimits(n_bytes=1_000_000))
    monkeypatch.setattr(hub_data, "MAX_DOWNLOAD_BYTES", 1_000_000)
    server = serve(make_answer(make_files(), part, endless))
    said = refuse(load, server)
    assert "expected at most" in said or part == "/data.jsonl", said
    bomb = gzip.compress(bytes(10**7))
    attack: Callable[[], Iterable[bytes]] = lambda: [make_head(Content_Encoding="gzip"), bomb]  # noqa: E731
    assert "not compressed" in refuse(load, serve(make_answer(make_files(), part, attack)))


def test_other_addresses_in_the_readme_are_not_called(
    load: Callable[[RawServer], object], serve: Serve
) -> None:
    victim = serve(lambda *_: [make_head(), ROWS])
    for address in (
        f"{victim.url}/x.jsonl",
        f"http://localhost:{victim.port}/*.jsonl",
        f"zip://x.jsonl::{victim.url}/x.zip",
        f"ftp://127.0.0.1:{victim.port}/x.jsonl",
    ):
        said = refuse(load, serve(make_answer(make_files(address), "nothing", endless)))
        assert "found an address of another server" in said
    assert victim.requests == []


@pytest.mark.parametrize("prefix", ["", "../../../../../../../.."])
def test_files_of_this_machine_are_not_read(
    prefix: str, load: Callable[[RawServer], object], serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    files = make_files(f"{prefix}{tmp_path}/secret.jsonl")
    said = refuse(load, serve(make_answer(files, "nothing", endless)))
    assert "don't belong to org/d" in said or "expected" in said


def test_data_of_a_task_is_bounded_too(
    load: Callable[[RawServer], object],
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task file may name a data set of the hub."""
    victim = serve(lambda *_: [make_head(), ROWS])
    server = serve(make_answer(make_files(f"{victim.url}/x.jsonl"), "nothing", endless))
    refuse(load, server)  # makes the server the hub
    task = {
        "task": "mine",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "test_split": "train",
        "quantkit": {"domain": "math", "hub": {"path": "org/d"}},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    loaded = load_tasks([str(tmp_path / "mine.yaml")])
    with open_lm_eval_tasks(loaded) as opened:
        assert "found an address of another server" in opened.failed["mine"]
    assert victim.requests == []


def test_time_and_requests_have_a_budget(
    load: Callable[[RawServer], object], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(make_answer(make_files(), "nothing", endless))
    monkeypatch.setattr(hub_data, "MAX_REQUESTS", 3)
    assert "expected at most 3 requests, needed more" in refuse(load, server)
    assert len(server.requests) <= 3
    monkeypatch.setattr(hub_data, "DOWNLOAD_SECONDS", 0.0)
    assert "the download took more than 0 seconds" in refuse(load, server)


def test_file_systems_are_as_before_after_the_scope() -> None:
    with bound_data_set():
        assert fsspec.get_filesystem_class("https") is hub_data.RefusedFileSystem
        assert fsspec.get_filesystem_class("file") is not hub_data.RefusedFileSystem
    assert fsspec.get_filesystem_class("https") is not hub_data.RefusedFileSystem
    with pytest.raises(hub_data.DataSetFault, match="one"), translate_library_faults():
        raise LookupError("one\ntwo")
