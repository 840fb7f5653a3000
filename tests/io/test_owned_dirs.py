"""Folders of quantkit are recognized by a marker and a journal that agree; any other is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import ArtifactError, QuantkitError, UsageError
from quantkit.io import files, journal
from quantkit.io.journal import Journal, read_first_entry
from quantkit.io.lock import hold_lock
from quantkit.io.owned_dirs import (
    JOURNAL,
    OWNER_FILE,
    check_owned_dir,
    check_work_dir,
    make_owned_dir,
    make_owner_id,
    read_marker,
    remove_owned_dir,
)
from quantkit.io.path_safety import check_no_link

THESIS = "years of work"


def make_work_dir(folder: Path) -> str:
    """Make a working folder with a journal; return its id."""
    owner = make_owner_id()
    make_owned_dir(folder, owner)
    Journal.begin(folder / JOURNAL, {"kind": "began", "owner": owner}, owner)
    return owner


def read_tree(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_marker_and_journal_that_agree_are_recognized_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "x.building.scratch"
    assert check_work_dir(folder, "move it") is None
    owner = make_work_dir(folder)
    (folder / "states-0").mkdir()
    (folder / "states-0" / "calibration").write_text("numbers")
    assert check_work_dir(folder, "move it") == owner
    remove_owned_dir(folder, owner)
    assert list(tmp_path.iterdir()) == []


def plant_clone(folder: Path) -> None:
    """A clone of this project, whose package has the name of the evidence folder."""
    (folder / "quantkit").mkdir(parents=True)


def plant_other_journal(folder: Path) -> None:
    """The working folder of a build, with the marker of another one."""
    make_work_dir(folder)
    make_owned_dir(folder, make_owner_id())


def plant_marker(folder: Path) -> None:
    """A folder with a marker and no journal."""
    make_owned_dir(folder, make_owner_id())


def plant_marker_link(folder: Path) -> None:
    """A working folder whose marker is a link to the marker of a real one."""
    make_work_dir(folder.with_name("real"))
    folder.mkdir()
    (folder / JOURNAL).write_bytes((folder.with_name("real") / JOURNAL).read_bytes())
    (folder / OWNER_FILE).symlink_to(folder.with_name("real") / OWNER_FILE)


def plant_invalid_journal(folder: Path) -> None:
    """A working folder whose journal is not one."""
    make_owned_dir(folder, make_owner_id())
    (folder / JOURNAL).write_text(f'{{"owner": "{read_marker(folder)}"}}\n')


PLANTED: tuple[Callable[[Path], None], ...] = (
    plant_clone, plant_other_journal, plant_marker, plant_marker_link, plant_invalid_journal,
)  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_folder_without_agreement_is_refused_and_kept(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "x.building.scratch"
    plant(folder)
    (folder / "thesis.txt").write_text(THESIS)
    before = read_tree(folder)
    with pytest.raises(
        UsageError, match=r"x\.building\.scratch: expected nothing, or .* that no journal .*; move"
    ):
        check_work_dir(folder, "move it away")
    for owner in (None, make_owner_id()):
        remove_owned_dir(folder, owner)
    assert read_tree(folder) == before


def test_folder_of_another_job_is_refused_and_kept(tmp_path: Path) -> None:
    """As after `cp -r a.building b.building`: the marker is real, the journal of `b` has another
    id.
    """
    folder, owner = tmp_path / "b.building", make_owner_id()
    make_owned_dir(folder, owner)
    (folder / "thesis.txt").write_text(THESIS)
    check_owned_dir(folder, owner, "move it away")
    with pytest.raises(UsageError, match=r"b\.building: .* move it away"):
        check_owned_dir(folder, make_owner_id(), "move it away")
    remove_owned_dir(folder, make_owner_id())
    assert (folder / "thesis.txt").read_text() == THESIS


def test_remains_of_a_killed_process_are_accepted(tmp_path: Path) -> None:
    """Killed before the marker was complete, before the journal had its name, and while both were
    removed.
    """
    folder, owner = tmp_path / "x.building.scratch", make_owner_id()
    folder.mkdir()
    for content in (b"", b'{"own'):
        (folder / OWNER_FILE).write_bytes(content)
        assert check_work_dir(folder, "") is None
    make_owned_dir(folder, owner)
    files.name_part(folder, owner).write_bytes(b"half a line")
    assert check_work_dir(folder, "") is None
    remove_owned_dir(folder, None)
    assert not folder.exists()
    owner = make_work_dir(folder)
    (folder / OWNER_FILE).unlink()  # removed before the journal, which is last
    assert check_work_dir(folder, "") == owner
    remove_owned_dir(folder, owner)
    assert not folder.exists()


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "x.building.scratch"
    victim.mkdir()
    (victim / "thesis.txt").write_text(THESIS)
    owner = make_work_dir(folder)
    (folder / "states-0").symlink_to(victim)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").symlink_to(victim / "thesis.txt")
    remove_owned_dir(folder, owner)
    assert not folder.exists() and read_tree(victim) == {"thesis.txt": THESIS}
    folder.symlink_to(victim)
    make_owned_dir(victim, owner)
    with pytest.raises(UsageError, match="found a link; move it"):
        check_owned_dir(folder, owner, "move it away")
    remove_owned_dir(folder, owner)
    assert folder.is_symlink() and (victim / "thesis.txt").exists()


def test_journal_that_is_a_link_is_neither_read_nor_cut(tmp_path: Path) -> None:
    """A torn line would be cut off, which would cut a file elsewhere."""
    Journal.begin(tmp_path / "real", {"n": 0})
    with (tmp_path / "real").open("ab") as file:
        file.write(b"a line that was torn")
    before = (tmp_path / "real").read_bytes()
    (tmp_path / "link").symlink_to("real")
    os.link(tmp_path / "real", tmp_path / "second")
    for name in ("link", "second"):
        with pytest.raises(QuantkitError, match=rf"{name}: cannot be written: .*expected a file"):
            Journal.open(tmp_path / name)
    assert (tmp_path / "real").read_bytes() == before


def test_journal_of_terabytes_is_not_read(tmp_path: Path) -> None:
    """A file with holes takes no disk."""
    path = tmp_path / "journal.jsonl"
    Journal.begin(path, {"n": 0})
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    assert read_first_entry(path) == {"n": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "MAX_BYTES", 1 << 20)
        with pytest.raises(ArtifactError, match="expected at most 1048576 bytes, found more"):
            Journal.open(path)


def test_write_atomic_follows_no_planted_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the old predictable name, nor at the name itself, nor at the random one."""
    victim, path = tmp_path / "victim", tmp_path / "x.json"
    victim.write_text(THESIS)
    (tmp_path / "x.json.part").symlink_to(victim)
    path.symlink_to(victim)
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and not path.is_symlink()
    assert victim.read_text() == THESIS and (tmp_path / "x.json.part").is_symlink()
    monkeypatch.setattr(files.secrets, "token_hex", lambda _n: "guessed")
    files.name_part(tmp_path, "guessed").symlink_to(victim)
    with pytest.raises(QuantkitError, match=r"x\.json: cannot be written: file exists"):
        files.write_atomic(path, b"newer")
    assert victim.read_text() == THESIS and path.read_bytes() == b"new"
    assert files.name_part(tmp_path, "guessed").is_symlink()


def test_write_atomic_leaves_nothing_when_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "x", b"new")
    assert list(tmp_path.iterdir()) == []


def test_continued_files_are_no_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text(THESIS)
    (tmp_path / "soft").symlink_to(victim)
    os.link(victim, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name in ("soft", "hard", "pipe"):
        with pytest.raises(OSError, match="expected a file"):
            files.open_part(tmp_path / name)
    os.close(files.create_file(tmp_path / "soft"))
    assert not (tmp_path / "soft").is_symlink() and victim.read_text() == THESIS


@pytest.mark.parametrize("kind", ["link", "pipe", "other"])
def test_lock_file_that_no_holder_wrote_is_refused_and_kept(kind: str, tmp_path: Path) -> None:
    victim, lock = tmp_path / "victim", tmp_path / "x.lock"
    victim.write_text(THESIS)
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.write_text(THESIS)
    with pytest.raises(QuantkitError), hold_lock(lock):
        pytest.fail("it was locked")
    assert os.path.lexists(lock) and victim.read_text() == THESIS


def test_check_no_link_names_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "quantkit").symlink_to("real")
    assert check_no_link(tmp_path, "real/page.html") == tmp_path / "real/page.html"
    with pytest.raises(UsageError, match=r"quantkit: expected a file or folder, found a link"):
        check_no_link(tmp_path, "quantkit/page.html")
