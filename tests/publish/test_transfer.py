"""Publish to every kind of remote and pull back: transfers, refusals, and untouched files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.damage import rehash, set_status
from support.loadtest_example import make_load_test
from support.places.here import KINDS, RemoteFixture
from support.places.using import (
    LAST,
    WRITING,
    Record,
    flip_last_bit,
    make_other_artifact,
    publish_to,
    pull_from,
    read_files,
)

from quantkit.artifact.layout import LOADTEST, LOADTEST_PAGE, MANIFEST, SIGNATURE
from quantkit.errors import ArtifactError, TransferError, UsageError
from quantkit.publish.publish import publish_artifact
from quantkit.verify.shallow import verify_artifact

QUICK = {"file", "oci", "hf"}


@pytest.fixture(
    params=[pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def there(request: pytest.FixtureRequest, make: Callable[[str], RemoteFixture]) -> RemoteFixture:
    return make(request.param)


# ----------------------------------------------------------------------------------- round trips


def test_pull_returns_published_bytes(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    done = publish_to(built, there.address)
    assert set(done.files) == set(read_files(built)) and done.n_present == 0
    assert done.n_bytes == sum(map(len, read_files(built).values()))
    got = pull_from(there.address, tmp_path / "got")
    assert (
        got.manifest == done.manifest == hashlib.sha256((built / MANIFEST).read_bytes()).hexdigest()
    )
    assert read_files(tmp_path / "got") == read_files(built)
    verify_artifact(tmp_path / "got")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("got")) == ["got"]


def test_repeated_transfer_moves_nothing(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    publish_to(built, there.address)
    again = publish_to(built, there.address)
    assert (again.files, again.n_bytes, again.n_present) == ((), 0, len(read_files(built)))
    pull_from(there.address, tmp_path / "got")
    assert pull_from(there.address, tmp_path / "got").files == ()


def test_dry_run_moves_nothing(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    would, done = publish_to(built, there.address, dry_run=True), publish_to(built, there.address)
    assert (would.files, would.n_bytes, would.n_present) == (
        done.files,
        done.n_bytes,
        done.n_present,
    )
    would = pull_from(there.address, tmp_path / "got", dry_run=True)
    assert not (tmp_path / "got").exists() and not (tmp_path / "got.pulling").exists()
    assert would == pull_from(there.address, tmp_path / "got")


def test_dry_run_leaves_remote_empty(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    publish_to(built, there.address, dry_run=True)
    with pytest.raises(
        TransferError, match="not an artifact of quantkit|expected this on the Hub, found nothing"
    ):
        pull_from(there.address, tmp_path / "got")


def test_signature_is_transferred(artifact: Path, there: RemoteFixture, tmp_path: Path) -> None:
    (artifact / SIGNATURE).write_text('{"signed": true}')
    publish_to(artifact, there.address)
    pull_from(there.address, tmp_path / "got")
    assert (tmp_path / "got" / SIGNATURE).read_text() == '{"signed": true}'
    (artifact / SIGNATURE).write_text('{"signed": "again"}')
    assert set(publish_to(artifact, there.address).files) == {SIGNATURE, MANIFEST}
    (artifact / SIGNATURE).unlink()
    assert publish_to(artifact, there.address).files == ()
    pull_from(there.address, tmp_path / "again")
    assert (tmp_path / "again" / SIGNATURE).read_text() == '{"signed": "again"}'


def test_load_test_is_transferred(artifact: Path, there: RemoteFixture, tmp_path: Path) -> None:
    """Figures can be checked by their form; a page could contain anything."""
    (artifact / LOADTEST).write_text(make_load_test().model_dump_json())
    (artifact / LOADTEST_PAGE).write_text("<script>")
    with pytest.raises(ArtifactError, match="a page that neither manifest nor signature covers"):
        publish_to(artifact, there.address)
    (artifact / LOADTEST_PAGE).unlink()
    publish_to(artifact, there.address)
    pull_from(there.address, tmp_path / "got")
    assert (tmp_path / "got" / LOADTEST).read_text() == (artifact / LOADTEST).read_text()
    (artifact / LOADTEST).unlink()
    assert publish_to(artifact, there.address).files == ()  # it is a known file there


# ---------------------------------------------------------------------------- half of a publication


def test_interrupted_publication_is_no_artifact_and_resumes(
    built: Path,
    there: RemoteFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
) -> None:
    """It breaks off before the third file; the other two are not sent again."""
    from quantkit.publish import publish as publishing

    real, calls = publishing.send_file, []

    def breaking(remote: object, item: object, *rest: object) -> None:
        calls.append(item)
        if len(calls) > 2:
            raise TransferError("the plug was pulled")
        real(remote, item, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(publishing, "send_file", breaking)
    with pytest.raises(TransferError, match="plug"):
        publish_to(built, there.address, jobs=1)
    monkeypatch.setattr(publishing, "send_file", real)
    with pytest.raises(
        TransferError,
        match=f"no {MANIFEST}: not an artifact of quantkit, or its publication did not",
    ):
        pull_from(there.address, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a publication breaks off")
    before = getattr(there.server, "received", 0)
    done = publish_to(built, there.address)
    if there.kind == "hf":  # the hub reports existing files on upload
        assert there.server.received - before < done.n_bytes / 2
    else:
        assert done.n_present == 2 and done.present_bytes == sum(item.n_bytes for item in calls[:2])  # type: ignore[attr-defined]
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)


@pytest.mark.parametrize("status", ["not judged", "rejected"])
def test_publish_requires_accepted_artifact(artifact: Path, tmp_path: Path, status: str) -> None:
    missed = {"figure": "kl_mean", "bound": "<= 1e-07", "value": 0.001, "ok": False}
    set_status(artifact, status, [missed] if status == "rejected" else [])
    rehash(artifact)
    assert verify_artifact(artifact).status == status
    with pytest.raises(
        ArtifactError,
        match=f"expected an accepted artifact, found one that is {status}; .* --force",
    ):
        publish_artifact(artifact, str(tmp_path / "x"), WRITING, lambda _: None)
    assert not (tmp_path / "x").exists()
    assert publish_to(artifact, str(tmp_path / "x")).status == status
    assert pull_from(str(tmp_path / "x"), tmp_path / "got").status == status


def test_publish_refuses_damaged_artifact(artifact: Path, tmp_path: Path) -> None:
    (artifact / LAST).write_bytes(flip_last_bit((artifact / LAST).read_bytes()))
    with pytest.raises(ArtifactError, match="not what its manifest says"):
        publish_to(artifact, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_publish_replaces_other_artifact_with_overwrite(
    artifact: Path, there: RemoteFixture, tmp_path: Path
) -> None:
    second = make_other_artifact(artifact)
    publish_to(second, there.address)
    with pytest.raises(
        TransferError, match="expected no other artifact, found one; .* --overwrite"
    ):
        publish_to(artifact, there.address)
    pull_from(there.address, tmp_path / "before")
    assert read_files(tmp_path / "before") == read_files(second)
    done = publish_to(artifact, there.address, overwrite=True)
    if there.kind not in {"oci", "oci-real"}:
        assert done.removed == ("merges.txt",)
    pull_from(there.address, tmp_path / "after")
    assert read_files(tmp_path / "after") == read_files(artifact)
    with pytest.raises(
        UsageError, match="exists already; choose another folder or pass --overwrite"
    ):
        pull_from(there.address, tmp_path / "before")
    pull_from(there.address, tmp_path / "before", overwrite=True)
    assert read_files(tmp_path / "before") == read_files(artifact)


@pytest.mark.parametrize("there", ["file", "s3", "memory"], indirect=True)
def test_publish_keeps_other_files(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    there.write("thesis.tex", b"years of work")
    with pytest.raises(TransferError, match="found 1 other files, the first 'thesis.tex'"):
        publish_to(built, there.address)
    publish_to(built, there.address, overwrite=True)
    assert there.read("thesis.tex") == b"years of work"
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)


# ------------------------------------------------------------------------------ faults of remotes


def test_pull_names_lost_file(
    built: Path, there: RemoteFixture, tmp_path: Path, record_property: Record
) -> None:
    publish_to(built, there.address)
    there.write(LAST, None)
    with pytest.raises(TransferError) as caught:
        pull_from(there.address, tmp_path / "got")
    assert LAST in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a file is lost after publishing")
    if there.kind != "oci-real":  # it still reports the blob as present
        publish_to(built, there.address)
        pull_from(there.address, tmp_path / "got")
        assert read_files(tmp_path / "got") == read_files(built)


@pytest.mark.parametrize("change", ["same size", "longer"])
def test_pull_refuses_changed_file(
    built: Path, there: RemoteFixture, tmp_path: Path, change: str, record_property: Record
) -> None:
    publish_to(built, there.address)
    content = there.read(LAST)
    there.write(LAST, flip_last_bit(content) if change == "same size" else content + b"x")
    with pytest.raises(TransferError) as caught:
        pull_from(there.address, tmp_path / "got")
    assert LAST in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a file is changed after publishing ({change})")
    there.write(LAST, content)
    pull_from(there.address, tmp_path / "got")
    assert read_files(tmp_path / "got") == read_files(built)


def test_pull_refuses_invalid_manifest(built: Path, there: RemoteFixture, tmp_path: Path) -> None:
    publish_to(built, there.address)
    size = len(there.read(MANIFEST))
    for content in (b"{" + b" " * (size - 1), b"[]" + b" " * (size - 2)):
        there.write(MANIFEST, content)
        with pytest.raises(
            TransferError, match="expected JSON|expected a JSON|received bytes differ|expected sha"
        ):
            pull_from(there.address, tmp_path / "got")
    assert not (tmp_path / "got").exists()
