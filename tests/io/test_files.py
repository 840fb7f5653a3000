"""Plain files: atomic writes, hashes, free space, and the data that ships with the package."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest

from quantkit.errors import ArtifactError, CheckpointError, QuantkitError, UsageError
from quantkit.io import files, package_data


def test_write_atomic_replaces_the_file_or_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        QuantkitError,
        match=r"x.json: cannot be written: no space left on device \(.* GB free\); free",
    ):
        files.write_atomic(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 1, "a": ["é"]}


def test_large_files_are_copied_in_chunks_and_kept_if_the_source_fails(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(2 * files.CHUNK_BYTES + 5))
    sizes = [len(chunk) for chunk in files.iterate_chunks(source)]
    assert sizes == [files.CHUNK_BYTES, files.CHUNK_BYTES, 5]
    files.write_atomic(target, files.iterate_chunks(source))
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(CheckpointError, match="lost: expected a readable file"):
        files.write_atomic(target, files.iterate_chunks(tmp_path / "lost"))
    assert target.read_bytes() == source.read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["source", "target"]


def test_write_output_keeps_links_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_output(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "full").symlink_to("/dev/full")
    files.write_output(tmp_path / "link", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(QuantkitError, match=r"full: cannot be written: no space left on device"):
        files.write_output(tmp_path / "full", b"new")
    assert (tmp_path / "full").is_symlink()
    files.write_output(tmp_path / "plain", b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "file",
        "full",
        "link",
        "pipe",
        "plain",
    ]


def test_reads_are_limited_and_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read_bytes(path, 5) == b"12345"
    with pytest.raises(CheckpointError) as caught:
        files.read_bytes(path, 4)
    assert (
        str(caught.value)
        == f"{path}: expected at most 4 bytes, found 5; this is not the file it claims to be"
    )
    with pytest.raises(
        ArtifactError, match="expected a readable file, found: is a directory; check the path"
    ):
        files.read_bytes(tmp_path, error=ArtifactError)
    with pytest.raises(ArtifactError, match="expected JSON, found an error"):
        files.read_json(path.with_name("x"), ArtifactError) if path.write_bytes(b"{") else None
    with pytest.raises(
        CheckpointError, match="expected 9 bytes or more, found 1; fetch the file again"
    ):
        files.read_prefix(path, 9)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_parse_json_rejects_non_finite_numbers(number: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"x: expected finite numbers, found '{number}'; repair or fetch"
    ):
        files.parse_json(b'{"a": {"b": [1.5, %s]}}' % number.encode(), "x")
    assert files.parse_json(b'{"a": [1e308, -0.0, 1e-999]}', "x") == {"a": [1e308, -0.0, 0.0]}


@pytest.mark.parametrize("unit", ["[],", "{},", "1,", "[[[[]]]],"])
def test_parse_json_rejects_too_many_values_without_memory(unit: str) -> None:
    """Ten million values take gigabytes: they are counted before parsing."""
    text = b'{"a":[' + unit.encode() * 5_000_000 + b"1]}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="x: expected at most 5,000,000 values, found "):
        files.parse_json(text, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_write_error_gives_free_space_only_if_disk_is_full(tmp_path: Path) -> None:
    full, broken = (
        str(files.make_write_error(tmp_path, OSError(n, os.strerror(n))))
        for n in (errno.EDQUOT, errno.EIO)
    )
    assert "GB free); free some space" in full and "free" not in broken.removeprefix(str(tmp_path))


def test_sha256_file_and_get_free_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"quantkit" * 100_000)
    assert files.sha256_file(path) == hashlib.sha256(b"quantkit" * 100_000).hexdigest()
    with pytest.raises(
        CheckpointError, match="expected a readable file, found: no such file or directory"
    ):
        files.sha256_file(tmp_path / "absent")
    assert files.get_free_bytes(tmp_path / "not" / "yet" / "there") > 0


def test_messages_are_shortened() -> None:
    assert files.shorten_repr("x" * 1000) == "'" + "x" * 39 + "..." + "x" * 16 + "'"
    assert files.join_faults(["a", "b"]) == "a\nb"


def test_package_data_is_found_in_a_wheel_and_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "quantkit"
    monkeypatch.setattr(package_data, "_PACKAGE", package)
    with pytest.raises(
        UsageError,
        match="expected the recipes that ship with quantkit, found none; install quantkit",
    ):
        package_data.locate_folder("recipes")
    (tmp_path / "recipes").mkdir()
    assert package_data.locate_folder("recipes") == tmp_path / "recipes"
    (package / "data" / "recipes").mkdir(parents=True)
    assert package_data.locate_folder("recipes") == package / "data" / "recipes"


def test_wrong_builtin_model_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_data, "_PACKAGE", tmp_path)
    folder = tmp_path / "data" / "models" / "tiny_v3" / "checkpoint"
    with pytest.raises(UsageError) as caught:
        package_data.locate_model("builtin:tiny-v3")
    assert str(caught.value) == (
        "source.model: no built-in model 'builtin:tiny-v3'; known: none; install quantkit again"
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert package_data.locate_model("builtin:tiny-v3") == folder
    with pytest.raises(UsageError) as caught:
        package_data.locate_model("builtin:tiny_v4")
    assert str(caught.value) == (
        "source.model: no built-in model 'builtin:tiny_v4'; did you mean builtin:tiny-v3? known: "
        "builtin:tiny-v3"
    )


def test_expand_home_keeps_the_path_of_an_unknown_user() -> None:
    assert files.expand_home("~") == Path.home() and files.expand_home("a/~") == Path("a/~")
    assert files.expand_home("~nobody-here/x") == Path("~nobody-here/x")
