"""Properties of single kinds of remotes, and the output of both commands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.places.here import RemoteFixture
from support.places.registry import format_digest
from support.places.using import RETRY_POLICY, publish_to, pull_from, read_files, run_command

from quantkit.artifact.layout import MANIFEST
from quantkit.errors import TransferError
from quantkit.publish.publish import publish_artifact
from quantkit.publish.pull import pull_artifact
from quantkit.publish.remote import RemoteOptions, UploadFile, open_remote
from quantkit.verify.shallow import verify_artifact

# ---------------------------------------------------------------------------------- kinds of places


def test_s3_round_trip(built: Path, make: Callable[[str], RemoteFixture], tmp_path: Path) -> None:
    there = make("s3")
    publish_to(built, there.address)
    assert publish_to(built, there.address).files == ()
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a part: the fewest that S3 allows."""
    monkeypatch.setattr("quantkit.publish.remotes.s3.PART_BYTES", 5 << 20)
    return 5 << 20


def big(folder: Path, content: bytes) -> UploadFile:
    """A file to be sent."""
    (folder / "big").write_bytes(content)
    return UploadFile(
        name="big",
        path=folder / "big",
        n_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_s3_reuses_parts_of_broken_upload(
    make: Callable[[str], RemoteFixture], tmp_path: Path, parts: int
) -> None:
    """Those that are there by MD5 are not sent again, whatever else is under the key."""
    there = make("s3")
    client, (bucket, _, prefix) = there.server, there.address.removeprefix("s3://").partition("/")
    content = os.urandom(1 << 20) * 16
    item = big(tmp_path, content)
    key = f"{prefix}/big"
    meta = {"quantkit-sha256": item.sha256}
    upload = client.create_multipart_upload(Bucket=bucket, Key=key, Metadata=meta)["UploadId"]
    for number, body in ((1, content[:parts]), (2, b"\0" * parts)):
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
    with there.through_proxy() as (address, wire):
        remote = open_remote(address, RemoteOptions(writing=True))
        remote.send(item, lambda _: None)
        assert len(content) - parts < wire.carried < len(content) - parts + 300_000
        assert remote.list_remote([item], MANIFEST).present == {"big"}
    head = client.head_object(Bucket=bucket, Key=key)
    assert head["Metadata"] == meta and head["ContentLength"] == len(content)
    assert there.read("big") == content
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_s3_restarts_upload_of_other_content(
    make: Callable[[str], RemoteFixture], tmp_path: Path, parts: int
) -> None:
    """Its metadata would be wrong: the object is sent again."""
    there = make("s3")
    client, (bucket, _, prefix) = there.server, there.address.removeprefix("s3://").partition("/")
    content = os.urandom(1 << 20) * 12
    item = big(tmp_path, content)
    begun = {"Bucket": bucket, "Key": f"{prefix}/big"}
    upload = client.create_multipart_upload(**begun, Metadata={"quantkit-sha256": "0" * 64})[
        "UploadId"
    ]
    client.upload_part(**begun, UploadId=upload, PartNumber=1, Body=content[:parts])
    remote = open_remote(there.address, RemoteOptions(writing=True))
    remote.send(item, lambda _: None)
    assert client.head_object(**begun)["Metadata"] == {"quantkit-sha256": item.sha256}
    assert remote.list_remote([item], MANIFEST).present == {"big"}


def test_s3_reads_object_without_metadata(
    make: Callable[[str], RemoteFixture], tmp_path: Path
) -> None:
    there = make("s3")
    (tmp_path / "x").write_bytes(b"content")
    item = UploadFile(
        name="x", path=tmp_path / "x", n_bytes=7, sha256=hashlib.sha256(b"content").hexdigest()
    )
    remote = open_remote(there.address, RemoteOptions(writing=True))
    for content, actual in ((b"content", {"x"}), (b"contend", set())):
        there.write("x", content)
        assert remote.list_remote([item], MANIFEST).present == actual


def test_hub_uses_branches_and_private_repositories(
    built: Path, tmp_path: Path, make: Callable[[str], RemoteFixture]
) -> None:
    there = make("hf")
    options = RemoteOptions(writing=True, revision="v2", private=True, retry_policy=RETRY_POLICY)
    done = publish_artifact(built, there.address, options, lambda _: None, force=True)
    assert there.server.private == {"team/tiny": True}
    assert set(there.server.files("team/tiny")) == {".gitattributes"}
    assert set(there.server.files("team/tiny", "v2")) == {".gitattributes", *read_files(built)}
    commit = there.server.repos["team/tiny"]["v2"][-1][0]
    assert done.location == f"hf://team/tiny@{commit}"
    with pytest.raises(TransferError, match="not an artifact of quantkit"):
        pull_from(there.address, tmp_path / "got")
    for number, revision in enumerate(("v2", commit)):
        pull_artifact(
            there.address, tmp_path / str(number), RemoteOptions(revision=revision), lambda _: None
        )
        assert read_files(tmp_path / str(number)) == read_files(built)


def test_hub_adds_the_model_to_a_collection(
    built: Path, make: Callable[[str], RemoteFixture]
) -> None:
    """Again: it stays there once. An unknown collection does not undo the publication."""
    there, slug = make("hf"), "team/quantized-" + "0a" * 12
    there.server.collections[slug] = []
    for _ in range(2):
        done = run_command("publish", "--force", "--collection", slug, built, there.address)
        assert done.exit_code == 0 and f"is in the collection {slug}" in done.stdout
        assert there.server.collections[slug] == ["team/tiny"]
    other = slug.replace("0a", "0b")
    done = run_command("publish", "--force", "--collection", other, built, there.address)
    assert done.exit_code == 1 and MANIFEST in there.server.files("team/tiny")
    assert "is published, but not in the collection" in done.stderr
    assert f"collection {other}: expected this on the Hub" in done.stderr


@pytest.mark.parametrize(
    ("collection", "address", "sentence"),
    [
        ("team/quantized", "hf://team/tiny", "expected the end of a collection's address"),
        ("team/q-" + "0a" * 12, "folder", "expected a model of the Hub as destination"),
    ],
)
def test_wrong_collection_is_refused_before_anything_is_sent(
    collection: str, address: str, sentence: str, built: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "there" if address == "folder" else address
    done = run_command("publish", "--force", "--collection", collection, built, dest)
    assert done.exit_code == 2 and sentence in done.stderr and not (tmp_path / "there").exists()


def test_hub_publishes_in_one_commit(built: Path, make: Callable[[str], RemoteFixture]) -> None:
    there = make("hf")
    publish_to(built, there.address)
    commits = there.server.repos["team/tiny"]["main"]
    assert len(commits) == 2 and MANIFEST in commits[1][1]
    publish_to(built, there.address)
    assert len(commits) == 2


def test_hub_keeps_foreign_model(built: Path, make: Callable[[str], RemoteFixture]) -> None:
    there = make("hf")
    there.server.make("team/tiny")
    there.server.repos["team/tiny"]["main"][-1][1].update({
        "config.json": b"{}",
        "logo.png": b"",
        "LICENSE": b"MIT",
    })
    with pytest.raises(TransferError, match="found 1 other files, the first 'config.json'"):
        publish_to(built, there.address)
    publish_to(built, there.address, overwrite=True)
    files = there.server.files("team/tiny")
    assert (
        files["LICENSE"] == b"MIT" and files["config.json"] == (built / "config.json").read_bytes()
    )


def test_oci_pull_by_digest(
    built: Path, tmp_path: Path, make: Callable[[str], RemoteFixture]
) -> None:
    there = make("oci")
    done = publish_to(built, there.address)
    there.server.tags.clear()
    pull_from(done.location.replace(":v1@", "@"), tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)
    assert (
        json.loads(there.server.manifests[sha_of(done.location)])["artifactType"]
        == "application/vnd.quantkit.artifact.v1"
    )


def test_oci_pull_ignores_moved_tag(
    built: Path,
    tmp_path: Path,
    make: Callable[[str], RemoteFixture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unfinished upload is completed."""
    from quantkit.publish import pull as pulling

    there = make("oci")
    publish_to(built, there.address)
    real = pulling.run_in_parallel

    def moving(*args: object) -> None:
        there.server.tags.clear()
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pulling, "run_in_parallel", moving)
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)


def sha_of(place: str) -> str:
    return place.rpartition("@")[2]


def test_oci_reports_foreign_image(built: Path, make: Callable[[str], RemoteFixture]) -> None:
    there = make("oci")
    image = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "layers": [],
    }
    content = json.dumps(image).encode()
    there.server.manifests[format_digest(content)] = content
    there.server.tags["v1"] = format_digest(content)
    with pytest.raises(TransferError, match="another image under the tag v1"):
        publish_to(built, there.address)
    publish_to(built, there.address, overwrite=True)


# --------------------------------------------------------------------------------- the command line


def test_commands_print_transfer(built: Path, tmp_path: Path) -> None:
    total = sum(map(len, read_files(built).values()))
    there, count = tmp_path / "there", len(read_files(built))
    refused = run_command("publish", built, there)
    assert refused.exit_code == 1 and refused.stdout == ""
    dry = run_command("publish", "--force", "--dry-run", built, there)
    assert dry.exit_code == 0
    assert (
        dry.stdout.splitlines()[0]
        == f"{there}: would send {count} files, {total / 1e6:.1f} MB; 0 files, 0 B were there"
    )
    assert sorted(line.strip() for line in dry.stdout.splitlines()[1:]) == sorted(read_files(built))
    assert not list(tmp_path.iterdir()) or {p.name for p in tmp_path.iterdir()} == {"built0"}
    done = run_command("publish", "--force", built, there)
    assert (
        done.stdout
        == f"{there}: sent {count} files, {total / 1e6:.1f} MB; 0 files, 0 B were there\n"
    )
    assert "publish: 100 %" in done.stderr
    values = json.loads(run_command("publish", "--force", "--json", built, there).stdout)
    assert (
        values["files"] == []
        and values["bytes"] == 0
        and values["there"] == count
        and values["dry_run"] is False
    )
    got = run_command("pull", there, tmp_path / "got")
    moved = f"fetched {count} files, {total / 1e6:.1f} MB; 0 files, 0 B were there"
    assert got.stdout == f"{tmp_path / 'got'}: verified; {moved} (not judged)\n"
    values = json.loads(run_command("pull", "--json", there, tmp_path / "got").stdout)
    assert (
        values["verified"]
        and values["files"] == []
        and values["manifest"] == hashlib.sha256((built / MANIFEST).read_bytes()).hexdigest()
    )
    verify_artifact(tmp_path / "got")


def test_commands_do_not_import_torch(built: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from quantkit.cli.main import main\n"
        f"main(['publish', '--force', {str(built)!r}, {str(tmp_path / 'there')!r}], "
        "standalone_mode=False)\n"
        f"main(['pull', {str(tmp_path / 'there')!r}, {str(tmp_path / 'got')!r}], "
        "standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'fsspec', 'huggingface_hub'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
