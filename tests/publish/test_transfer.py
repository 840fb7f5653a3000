"""Publishing to every kind of place and pulling it back: what is sent, what is refused, what is left as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.damage import judged, rehash
from support.loadtest_example import make_load_test
from support.places.here import KINDS, Place
from support.places.using import LAST, WRITING, Record, fetched, files, flipped, other, sent

from quantkit.artifact.layout import LOADTEST, LOADTEST_PAGE, MANIFEST, SIGNATURE
from quantkit.errors import ArtifactError, TransferError, UsageError
from quantkit.publish.publish import publish_artifact
from quantkit.verify.shallow import verify_artifact

QUICK = {"file", "oci", "hf"}


@pytest.fixture(
    params=[pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def there(request: pytest.FixtureRequest, make: Callable[[str], Place]) -> Place:
    return make(request.param)


# ------------------------------------------------------------------------------------------------------ there and back


def test_what_is_published_is_pulled_byte_for_byte(
    built: Path, there: Place, tmp_path: Path
) -> None:
    done = sent(built, there.address)
    assert set(done.files) == set(files(built)) and done.there == 0
    assert done.n_bytes == sum(map(len, files(built).values()))
    got = fetched(there.address, tmp_path / "got")
    assert (
        got.manifest == done.manifest == hashlib.sha256((built / MANIFEST).read_bytes()).hexdigest()
    )
    assert files(tmp_path / "got") == files(built)
    verify_artifact(tmp_path / "got")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("got")) == ["got"]


def test_again_sends_and_fetches_nothing(built: Path, there: Place, tmp_path: Path) -> None:
    sent(built, there.address)
    again = sent(built, there.address)
    assert (again.files, again.n_bytes, again.there) == ((), 0, len(files(built)))
    fetched(there.address, tmp_path / "got")
    assert fetched(there.address, tmp_path / "got").files == ()


def test_a_dry_run_moves_nothing(built: Path, there: Place, tmp_path: Path) -> None:
    would, done = sent(built, there.address, dry_run=True), sent(built, there.address)
    assert (would.files, would.n_bytes, would.there) == (done.files, done.n_bytes, done.there)
    would = fetched(there.address, tmp_path / "got", dry_run=True)
    assert not (tmp_path / "got").exists() and not (tmp_path / "got.pulling").exists()
    assert would == fetched(there.address, tmp_path / "got")


def test_a_dry_run_of_a_publication_leaves_the_place_empty(
    built: Path, there: Place, tmp_path: Path
) -> None:
    sent(built, there.address, dry_run=True)
    with pytest.raises(
        TransferError, match="not an artifact of quantkit|expected this on the Hub, found none"
    ):
        fetched(there.address, tmp_path / "got")


def test_the_signature_travels_too(artifact: Path, there: Place, tmp_path: Path) -> None:
    (artifact / SIGNATURE).write_text('{"signed": true}')
    sent(artifact, there.address)
    fetched(there.address, tmp_path / "got")
    assert (tmp_path / "got" / SIGNATURE).read_text() == '{"signed": true}'
    (artifact / SIGNATURE).write_text('{"signed": "again"}')
    assert set(sent(artifact, there.address).files) == {SIGNATURE, MANIFEST}
    (artifact / SIGNATURE).unlink()
    assert sent(artifact, there.address).files == ()
    fetched(there.address, tmp_path / "again")
    assert (tmp_path / "again" / SIGNATURE).read_text() == '{"signed": "again"}'


def test_a_load_test_travels_and_its_page_does_not(
    artifact: Path, there: Place, tmp_path: Path
) -> None:
    """Figures can be checked by their form; a page of somebody else's could say and do anything."""
    (artifact / LOADTEST).write_text(make_load_test().model_dump_json())
    (artifact / LOADTEST_PAGE).write_text("<script>")
    sent(artifact, there.address)
    fetched(there.address, tmp_path / "got")
    assert (tmp_path / "got" / LOADTEST).read_text() == (artifact / LOADTEST).read_text()
    assert not (tmp_path / "got" / LOADTEST_PAGE).exists()
    (artifact / LOADTEST).unlink()
    assert sent(artifact, there.address).files == ()  # it is no stranger there


# ------------------------------------------------------------------------------------------------ half of a publication


def test_half_a_publication_is_none_and_goes_on(
    built: Path,
    there: Place,
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
        sent(built, there.address, jobs=1)
    monkeypatch.setattr(publishing, "send_file", real)
    with pytest.raises(
        TransferError,
        match=f"no {MANIFEST}: not an artifact of quantkit, or its publication did not",
    ):
        fetched(there.address, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a publication breaks off")
    before = getattr(there.server, "received", 0)
    done = sent(built, there.address)
    if there.kind == "hf":  # the hub tells what it has when it is asked to take it
        assert there.server.received - before < done.n_bytes / 2
    else:
        assert done.there == 2 and done.there_bytes == sum(item.n_bytes for item in calls[:2])  # type: ignore[attr-defined]
    fetched(there.address, tmp_path / "got")
    assert files(tmp_path / "got") == files(built)


@pytest.mark.parametrize("status", ["not judged", "rejected"])
def test_only_accepted_artifacts(artifact: Path, tmp_path: Path, status: str) -> None:
    missed = {"figure": "kl_mean", "bound": "<= 1e-07", "value": 0.001, "ok": False}
    judged(artifact, status, [missed] if status == "rejected" else [])
    rehash(artifact)
    assert verify_artifact(artifact).status == status
    with pytest.raises(
        ArtifactError,
        match=f"expected an accepted artifact, found one that is {status}; .* --force",
    ):
        publish_artifact(artifact, str(tmp_path / "x"), WRITING, lambda _: None)
    assert not (tmp_path / "x").exists()
    assert sent(artifact, str(tmp_path / "x")).status == status
    assert fetched(str(tmp_path / "x"), tmp_path / "got").status == status


def test_a_damaged_artifact_is_not_published(artifact: Path, tmp_path: Path) -> None:
    (artifact / LAST).write_bytes(flipped((artifact / LAST).read_bytes()))
    with pytest.raises(ArtifactError, match="not what its manifest says"):
        sent(artifact, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_another_artifact_is_replaced_only_when_asked(
    artifact: Path, there: Place, tmp_path: Path
) -> None:
    second = other(artifact)
    sent(second, there.address)
    with pytest.raises(
        TransferError, match="expected no other artifact, found one; .* --overwrite"
    ):
        sent(artifact, there.address)
    fetched(there.address, tmp_path / "before")
    assert files(tmp_path / "before") == files(second)
    done = sent(artifact, there.address, overwrite=True)
    if there.kind not in {"oci", "oci-real"}:
        assert done.removed == ("more.txt",)
    fetched(there.address, tmp_path / "after")
    assert files(tmp_path / "after") == files(artifact)
    with pytest.raises(
        UsageError, match="exists already; choose another folder or pass --overwrite"
    ):
        fetched(there.address, tmp_path / "before")
    fetched(there.address, tmp_path / "before", overwrite=True)
    assert files(tmp_path / "before") == files(artifact)


@pytest.mark.parametrize("there", ["file", "s3", "memory"], indirect=True)
def test_other_files_are_left_alone(built: Path, there: Place, tmp_path: Path) -> None:
    there.write("thesis.tex", b"years of work")
    with pytest.raises(TransferError, match="found 1 other files, the first 'thesis.tex'"):
        sent(built, there.address)
    sent(built, there.address, overwrite=True)
    assert there.read("thesis.tex") == b"years of work"
    fetched(there.address, tmp_path / "got")
    assert files(tmp_path / "got") == files(built)


# -------------------------------------------------------------------------------------------------- what a place can do


def test_a_lost_file_is_named(
    built: Path, there: Place, tmp_path: Path, record_property: Record
) -> None:
    sent(built, there.address)
    there.write(LAST, None)
    with pytest.raises(TransferError) as caught:
        fetched(there.address, tmp_path / "got")
    assert LAST in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a file is lost after publishing")
    if there.kind != "oci-real":  # it goes on believing that it has the blob
        sent(built, there.address)
        fetched(there.address, tmp_path / "got")
        assert files(tmp_path / "got") == files(built)


@pytest.mark.parametrize("change", ["same size", "longer"])
def test_a_file_that_was_changed_is_refused(
    built: Path, there: Place, tmp_path: Path, change: str, record_property: Record
) -> None:
    sent(built, there.address)
    content = there.read(LAST)
    there.write(LAST, flipped(content) if change == "same size" else content + b"x")
    with pytest.raises(TransferError) as caught:
        fetched(there.address, tmp_path / "got")
    assert LAST in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "got").exists()
    record_property("fault", f"{there.kind}: a file is changed after publishing ({change})")
    there.write(LAST, content)
    fetched(there.address, tmp_path / "got")
    assert files(tmp_path / "got") == files(built)


def test_a_manifest_that_is_none(built: Path, there: Place, tmp_path: Path) -> None:
    sent(built, there.address)
    size = len(there.read(MANIFEST))
    for content in (b"{" + b" " * (size - 1), b"[]" + b" " * (size - 2)):
        there.write(MANIFEST, content)
        with pytest.raises(
            TransferError, match="expected JSON|expected a JSON|other bytes|expected sha"
        ):
            fetched(there.address, tmp_path / "got")
    assert not (tmp_path / "got").exists()
