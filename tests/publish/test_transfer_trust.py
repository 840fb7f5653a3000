"""Input that wants to break publish and pull: names, manifests, links, addresses; and what must not
be replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.places.here import RemoteFixture, make_folder, make_registry
from support.places.registry import TITLE, FakeRegistry, format_digest
from support.places.using import LAST, Record, publish_to, pull_from, read_files, run_command

from quantkit.artifact.layout import MANIFEST
from quantkit.errors import QuantkitError, TransferError, UsageError
from quantkit.io.path_safety import find_name_faults
from quantkit.io.retry import RetryPolicy
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.pull import pull_artifact
from quantkit.publish.remote import RemoteOptions, UploadFile, parse_address, remove_secrets
from quantkit.publish.staging_dir import open_staging_dir

# -------------------------------------------------------------------------------------------- names

BAD_NAMES = [
    "../outside",
    "a/../../outside",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/.",
    "",
    "a/",
    "\x00",
    "a\x00b",
    "a\nb",
    "a\x1b[2J",
    "..",
    "a\\..\\b",
    "C:evil",
    "C:\\evil",
    "con \u202egnp.exe",
    "x" * 300,
    "/".join("abcdefgh" for _ in range(200)),
    "\ud800",
    " a",
    "a ",
    "a.",
    "model.safetensors.part",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_find_name_faults_reports_unsafe_name(name: str) -> None:
    assert len(list(find_name_faults(["config.json", name]))) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["A", "a"],
        ["quantkit/x", "Quantkit/X"],
        ["\u00e9", "e\u0301"],
        ["stra\u00dfe", "STRASSE"],
        ["a", "a/b"],
        ["a", "A/b"],
    ],
)
def test_find_name_faults_reports_colliding_names(names: list[str]) -> None:
    assert len(list(find_name_faults(names))) == 1


def test_find_name_faults_accepts_good_names() -> None:
    names = [
        "model-00001-of-00002.safetensors",
        "quantkit/samples/tokens.parquet",
        "\u6a21\u578b \u00fc.json",
        ".gitattributes",
        "..."[:1] + "x",
    ]
    assert list(find_name_faults(names)) == []


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6, unique=True))
def test_valid_names_stay_in_folder(names: list[str]) -> None:
    good = [name for name in names if not list(find_name_faults([name]))]
    root = Path("/somewhere/deep")
    for name in good:
        whole = Path(os.path.normpath(root / name))
        assert whole.is_relative_to(root) and whole != root and "\x00" not in name


def hostile(built: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> RemoteFixture:
    """A published artifact with another manifest."""
    there = make_folder(folder / "hostile")
    publish_to(built, there.address)
    values = json.loads(there.read(MANIFEST))
    change(values)
    there.write(MANIFEST, json.dumps(values).encode())
    return there


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name != "\ud800"], ids=ascii)
def test_pull_refuses_manifest_with_unsafe_name(
    built: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    there = hostile(built, tmp_path / "in", lambda values: values["files"].update({name: entry}))
    before = {path for path in tmp_path.rglob("*") if "got" not in path.name}
    with pytest.raises(
        TransferError, match="expected names that stay in the artifact's folder"
    ) as caught:
        pull_from(there.address, tmp_path / "got")
    assert "\n" not in str(caught.value) and "\x00" not in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if "got" not in path.name} == before
    assert not (tmp_path / "got").exists()
    record_property("fault", f"a manifest names {ascii(name)[:40]}")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.BIN", "adapter_config.json", "vocab.pkl"]
)
def test_pull_refuses_a_second_model_before_it_fetches(
    built: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    """The folder would verify by its hashes; engines would load the other files."""
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    there = hostile(built, tmp_path / "in", lambda values: values["files"].update({name: entry}))
    there.write(name, b"x")
    with pytest.raises(
        TransferError, match=f"expected the files of an artifact, found {name}: "
    ) as caught:
        pull_from(there.address, tmp_path / "got")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("got*"))
    record_property("fault", f"a manifest names {name}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(files=[]), "files: expected the files of an artifact"),
        (lambda v: v.update(files={}), "files: expected the files of an artifact"),
        (lambda v: v["files"].update(x=1), "files: 'x': expected sha256 and bytes"),
        (
            lambda v: v["files"].update(x={"sha256": "0" * 63, "bytes": 1}),
            "files: 'x': expected sha256 and bytes",
        ),
        (
            lambda v: v["files"].update(x={"sha256": "0" * 64, "bytes": -1}),
            "files: 'x': expected sha256 and bytes",
        ),
        (
            lambda v: v["files"].update(x={"sha256": "0" * 64, "bytes": True}),
            "files: 'x': expected sha256 and bytes",
        ),
        (
            lambda v: v["files"].update({"merges.txt": {"sha256": "0" * 64, "bytes": 10**30}}),
            "1 missing or changed",
        ),
        (
            lambda v: v["files"].pop("config.json"),
            "the files that arrived do not match the manifest",
        ),
        (lambda v: v.update(schema_version=99), "schema_version: expected 1, found 99"),
        (lambda v: v.update(unhashed=["../x"]), "expected names that stay"),
    ],
)
def test_pull_refuses_wrong_manifest(
    built: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    said: str,
    record_property: Record,
) -> None:
    there = hostile(built, tmp_path, change)
    with pytest.raises(TransferError) as caught:
        pull_from(there.address, tmp_path / "got")
    assert said in str(caught.value)
    assert not (tmp_path / "got").exists()
    record_property("fault", f"a manifest lies: {said}")


def test_links_are_not_followed(built: Path, tmp_path: Path, record_property: Record) -> None:
    """At the source, and in the staging folder of an earlier pull."""
    publish_to(built, str(tmp_path / "there"))
    secret = tmp_path / "secret"
    secret.write_bytes((built / "README.md").read_bytes())
    (tmp_path / "there/README.md").unlink()
    (tmp_path / "there/README.md").symlink_to(secret)
    with pytest.raises(TransferError, match="README.md: expected .* bytes, found no file"):
        pull_from(str(tmp_path / "there"), tmp_path / "got")
    (tmp_path / "there/README.md").unlink()
    publish_to(built, str(tmp_path / "there"))
    victim = tmp_path / "victim"
    victim.mkdir()
    with open_staging_dir(tmp_path / "got") as staging:  # of an earlier pull, which kept a file
        (staging.folder / "config.json").write_bytes(b"{}")
    (staging.folder / "quantkit").mkdir()
    (staging.folder / "quantkit/samples").symlink_to(victim)
    (staging.folder / "config.json.part").symlink_to(victim / "new")
    pull_from(str(tmp_path / "there"), tmp_path / "got")
    assert not list(victim.iterdir())
    assert read_files(tmp_path / "got") == read_files(built)
    (tmp_path / "more.pulling").symlink_to(victim)
    with pytest.raises(UsageError, match="found a link; if nothing of yours is in it, remove it"):
        pull_from(str(tmp_path / "there"), tmp_path / "more")
    with open_staging_dir(tmp_path / "most") as staging:
        (staging.folder / "config.json").write_bytes(b"{}")
    shutil.rmtree(staging.folder)
    staging.folder.symlink_to(victim)
    with pytest.raises(UsageError, match=r"most\.pulling/artifact: .* found a link; remove it"):
        pull_from(str(tmp_path / "there"), tmp_path / "most")
    assert not list(victim.iterdir())
    record_property("fault", "links at the source and in the staging folder")


@pytest.mark.parametrize("inside", [".", "quantkit"])
@pytest.mark.parametrize("name", ["got.pulling", "got.pulling.replaced"])
def test_pull_keeps_foreign_folder(built: Path, name: str, inside: str, tmp_path: Path) -> None:
    """A folder that contains one named quantkit is a user's as well."""
    publish_to(built, str(tmp_path / "there"))
    (tmp_path / name / inside).mkdir(parents=True)
    (tmp_path / name / inside / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=rf"{name}: expected nothing.*move it away"):
        pull_from(str(tmp_path / "there"), tmp_path / "got")
    assert (tmp_path / name / inside / "thesis.txt").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"there", name}


def test_pull_with_overwrite_keeps_other_files(built: Path, tmp_path: Path) -> None:
    publish_to(built, str(tmp_path / "there"))
    got = Path(shutil.copytree(built, tmp_path / "got"))
    (got / "README.md").write_text("changed")
    (got / "notes.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"found 'notes\.txt', which its manifest does not name"):
        pull_from(str(tmp_path / "there"), got, overwrite=True)
    assert (got / "notes.txt").read_text() == "years of work"
    (got / "notes.txt").unlink()
    pull_from(str(tmp_path / "there"), got, overwrite=True)
    assert read_files(got) == read_files(built)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "got"}


def test_publish_refuses_folder_that_is_a_link(built: Path, tmp_path: Path) -> None:
    """Its files would be written, and replaced ones removed, where the link leads."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "manifest.json").write_text("{}")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/quantkit").symlink_to(victim)
    with pytest.raises((TransferError, UsageError), match="there"):
        publish_to(built, str(tmp_path / "there"), overwrite=True)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"manifest.json": "{}"}


def test_publish_refuses_link(built: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "there/config.json").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="expected a file or folder, found a link"):
        publish_to(built, str(tmp_path / "there"))
    assert (tmp_path / "victim").read_bytes() == b"mine"


@pytest.mark.parametrize("title", ["../evil", "/evil", "quantkit/manifest.json"])
def test_pull_refuses_wrong_image(
    built: Path, tmp_path: Path, title: str, record_property: Record
) -> None:
    """A title that leads out of the folder is not asked for; a title twice is refused."""
    server = FakeRegistry()
    there = make_registry(server)
    publish_to(built, there.address)
    digest = server.tags["v1"]
    image = json.loads(server.manifests[digest])
    server.blobs[format_digest(b"evil")] = b"evil"
    image["layers"].append({
        "digest": format_digest(b"evil"),
        "size": 4,
        "annotations": {TITLE: title},
    })
    server.manifests["sha256:" + "0" * 64] = json.dumps(image).encode()
    server.tags["v1"] = "sha256:" + "0" * 64
    with pytest.raises(TransferError, match="in a row .received a manifest with another digest"):
        pull_from(there.address, tmp_path / "in" / "got")
    content = json.dumps(image).encode()
    server.manifests[format_digest(content)] = content
    server.tags["v1"] = format_digest(content)
    if title == MANIFEST:
        with pytest.raises(TransferError, match="expected one blob, found two"):
            pull_from(there.address, tmp_path / "in" / "got")
    else:
        pull_from(there.address, tmp_path / "in" / "got")
        assert read_files(tmp_path / "in" / "got") == read_files(built)
    assert not (tmp_path / "evil").exists() and not (tmp_path / "in" / "evil").exists()
    server.close()
    record_property("fault", f"an image has a layer titled {title}")


# ------------------------------------------------------------------------ existing final names


def test_pull_keeps_other_content(built: Path, tmp_path: Path) -> None:
    publish_to(built, str(tmp_path / "there"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years")
    (tmp_path / "note").write_text("a file")
    for name in ("thesis", "note"):
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="exists"):
                pull_from(str(tmp_path / "there"), tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis/thesis.tex").read_text() == "years" and (
        tmp_path / "note"
    ).read_text() == "a file"
    (tmp_path / "empty").mkdir()
    pull_from(str(tmp_path / "there"), tmp_path / "empty")
    assert read_files(tmp_path / "empty") == read_files(built)


def test_pull_replaces_damaged_artifact_with_overwrite(built: Path, tmp_path: Path) -> None:
    publish_to(built, str(tmp_path / "there"))
    pull_from(str(tmp_path / "there"), tmp_path / "got")
    (tmp_path / "got" / LAST).write_bytes(b"damaged")
    with pytest.raises(
        UsageError, match="contains this artifact, but it was changed; --overwrite replaces it"
    ):
        pull_from(str(tmp_path / "there"), tmp_path / "got")
    pull_from(str(tmp_path / "there"), tmp_path / "got", overwrite=True)
    assert read_files(tmp_path / "got") == read_files(built)


def test_publish_refuses_folder_inside_artifact(artifact: Path) -> None:
    before = read_files(artifact)
    with pytest.raises(UsageError, match="expected a folder outside the artifact"):
        publish_to(artifact, str(artifact / "copy"))
    assert publish_to(artifact, str(artifact)).files == ()
    assert read_files(artifact) == before


def test_hashed_reader_detects_changed_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"other")
    item = UploadFile(
        name="x", path=tmp_path / "x", n_bytes=5, sha256=hashlib.sha256(b"first").hexdigest()
    )
    with (
        HashedReader(item) as pieces,
        pytest.raises(QuantkitError, match="changed during publication"),
    ):
        list(pieces)


# ---------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf://a/b", "hf"),
        ("owner/name", "hf"),
        ("s3://b/p", "s3"),
        ("S3A://b/p", "s3"),
        ("gs://b/p", "gs"),
        ("oci://h:1/n:t", "oci"),
        ("file:///x", "file"),
        ("/x/y", "file"),
        ("./a/b", "file"),
        ("../a", "file"),
        ("name", "file"),
        ("a/b/c", "file"),
        ("~/x", "file"),
        ("-x/y", "file"),
    ],
)
def test_parse_address(
    text: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address(text)[0] == kind


def test_ambiguous_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    with pytest.raises(UsageError, match=r"it could be either; write \./shared/x or hf://shared/x"):
        parse_address("shared/x")
    (tmp_path / "shared/x").mkdir()
    assert parse_address("shared/x") == ("file", "shared/x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a URL"),
        ("a\x00b", "expected a URL"),
        ("s3://key:secret@bucket/x", "expected no password"),
        ("oci://u:p@host/x", "expected no password"),
        ("simplecache::s3://b/x", "a chain of them"),
        ("nope://x/y", "nope:// is none"),
        ("zip://x/y", "zip:// is none"),
        ("s3://", "found no bucket"),
        ("hf://a", "expected hf://owner/name"),
        ("hf://datasets/a/b", "expected hf://owner/name"),
        ("oci://host", "expected oci://host/name:tag"),
        ("oci://host/UPPER", "expected oci://host/name:tag"),
        ("oci://h/../../x", "expected oci://host/name:tag"),
        ("file://elsewhere/x", "expected a folder of this machine"),
        ("oci://h/n@sha256:12", "expected oci://"),
    ],
)
def test_open_remote_refuses_invalid_address(
    built: Path, tmp_path: Path, text: str, said: str
) -> None:
    for words in (("pull", text, tmp_path / "got"), ("publish", "--force", built, text)):
        done = run_command(*words)
        assert done.exit_code == 2 and said in done.stderr, done.stderr
        assert "secret" not in done.stderr and done.stderr.count("\n") == 1


def test_revision_requires_hub(tmp_path: Path) -> None:
    for words in (("--revision", "x"), ("--private",)):
        done = run_command("publish", "x", str(tmp_path / "y"), *words)
        assert (
            done.exit_code == 2 and "expected a repository of the Hugging Face Hub" in done.stderr
        )


def test_open_remote_names_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    done = run_command("pull", "s3://bucket/x", tmp_path / "got")
    assert done.exit_code == 2 and "pip install 'quantkit[s3]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    sorted(set(fsspec.available_protocols()) - {"file", "local", "s3", "s3a", "hf", "memory"}),
)
def test_unknown_scheme_gives_one_sentence(tmp_path: Path, scheme: str) -> None:
    """Whatever a library does without its package, its server or its login."""
    options = RemoteOptions(retry_policy=RetryPolicy(tries=1))
    with pytest.raises(QuantkitError) as caught:
        pull_artifact(f"{scheme}://127.0.0.1:1/x", tmp_path / "got", options, lambda _: None)
    assert "\n" not in str(caught.value)


@given(
    st.text(max_size=30)
    | st.from_regex(r"(s3|gs|oci|hf|file|memory)://[a-z@:/.?#%-]{0,20}", fullmatch=True)
)
def test_parse_address_accepts_or_refuses(text: str) -> None:
    with contextlib.suppress(UsageError):
        scheme, rest = parse_address(text)
        assert text.endswith(rest) and scheme == scheme.lower()


@given(st.text(max_size=60))
def test_remove_secrets_is_idempotent(text: str) -> None:
    assert remove_secrets(remove_secrets(text)) == remove_secrets(text)
