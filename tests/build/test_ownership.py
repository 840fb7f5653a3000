"""A build removes and overwrites only its own files, whatever was put where it works."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

from quantkit import pipeline
from quantkit.artifact import replace
from quantkit.build.progress_log import BuildProgress
from quantkit.errors import ArtifactError, UsageError
from quantkit.io.journal import Journal
from quantkit.io.owned_dirs import OWNER_FILE, make_owner_id
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

KEYS = {
    "quantize": "{method: rtn, bits: 4, group_size: 64}",
    "fidelity": "none",
    "calibration": "null",
}
THESIS = "years of work"


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one block."""
    return write_checkpoint(
        tmp_path_factory.mktemp("dense") / "source", make_tiny_config("llama", num_hidden_layers=1)
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(source: Path, *, overwrite: bool = False, restart: bool = False) -> list[str]:
    """Build into `x` of the current folder; return the messages."""
    text, output = make_recipe_text(source, Path("x"), **KEYS), list[str]()
    pipeline.build_artifacts(
        parse_recipe(text, "r.yaml"),
        text,
        overwrite=overwrite,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
        on_message=output.append,
        restart=restart,
    )
    return output


def interrupt(
    source: Path, patch: pytest.MonkeyPatch, owner: object, name: str, *, overwrite: bool = False
) -> None:
    """Run a build that dies after its first call of a function."""
    real = getattr(owner, name)

    def fatal(*args: object, **kwargs: object) -> object:
        real(*args, **kwargs)
        raise Killed

    with patch.context() as inner, pytest.raises(Killed):
        inner.setattr(owner, name, fatal)
        build(source, overwrite=overwrite)


def plant(folder: Path) -> Path:
    """Make a user's folder that holds a clone of this project; return a file of theirs."""
    (folder / "quantkit").mkdir(parents=True)
    (folder / "quantkit" / "thesis.txt").write_text(THESIS)
    return folder / "quantkit" / "thesis.txt"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["x.building", "x.building.scratch", "x.replaced"])
def test_folder_that_contains_a_folder_named_quantkit_is_kept(
    name: str, restart: bool, source: Path, place: Path
) -> None:
    theirs = plant(place / name)
    with pytest.raises(UsageError, match=rf"{name}: expected nothing.*move it away") as caught:
        build(source, restart=restart)
    assert "\n" not in str(caught.value)
    assert theirs.read_text() == THESIS
    assert {path.name for path in place.iterdir()} == {name}


@pytest.mark.parametrize("restart", [False, True])
def test_folder_that_takes_the_place_of_a_staging_folder_is_kept(
    restart: bool, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is this build's; the folder is not."""
    interrupt(source, monkeypatch, BuildProgress, "commit_step")
    (place / "x.building").rename(place / "moved")
    theirs = plant(place / "x.building")
    with pytest.raises(UsageError, match=r"x\.building: expected nothing.*move it away"):
        build(source, restart=restart)
    (place / "x.building" / OWNER_FILE).write_text(json.dumps({"owner": make_owner_id()}))
    with pytest.raises(UsageError, match=r"x\.building: expected nothing.*move it away"):
        build(source, restart=restart)
    assert theirs.read_text() == THESIS
    shutil.rmtree(place / "x.building")
    (place / "moved").rename(place / "x.building")
    build(source)
    assert {path.name for path in place.iterdir()} == {"x"}
    verify_artifact(place / "x")


def test_build_of_an_earlier_version_is_one_sentence(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal has no owner, and its folders no marker."""
    interrupt(source, monkeypatch, BuildProgress, "commit_step")
    journal = Journal.open(place / "x.building.scratch" / "journal.jsonl")
    assert journal is not None
    first, *rest = journal.entries
    old = Journal.begin(journal.path, {key: first[key] for key in first if key != "owner"})
    for entry in rest:
        old.append(entry)
    for name in ("x.building", "x.building.scratch"):
        (place / name / OWNER_FILE).unlink()
    before = sorted(place.rglob("*"))
    for restart in (False, True):
        with pytest.raises(
            UsageError,
            match=r"^x\.building\.scratch: expected a build that this version .* earlier version; "
            r"resume it with that version, or remove this folder and x\.building to start over$",
        ):
            build(source, restart=restart)
    assert sorted(place.rglob("*")) == before


def test_links_in_the_folders_of_a_build_lead_nowhere(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In staging and scratch folders, at every name that the build writes or empties."""
    interrupt(source, monkeypatch, BuildProgress, "commit_step")
    victim = place / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text(THESIS)
    staging, scratch = place / "x.building", place / "x.building.scratch"
    for name in ("config.json", "config.json.part", "recipe.yaml", "README.md", "other"):
        (staging / name).symlink_to(victim / "thesis.txt")
    shutil.rmtree(staging / "quantkit")
    (staging / "quantkit").symlink_to(victim)
    shutil.rmtree(scratch / "states-0")
    (scratch / "states-0").symlink_to(victim)
    with pytest.raises(UsageError, match=r"states-0: expected a folder, found a link; remove it"):
        build(source)
    (scratch / "states-0").unlink()
    build(source)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"thesis.txt": THESIS}
    verify_artifact(place / "x")


def test_journal_that_names_a_file_elsewhere_is_refused(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of states are removed after their step."""
    interrupt(source, monkeypatch, BuildProgress, "commit_step")
    thesis = place / "thesis.txt"
    thesis.write_text(THESIS)
    journal = Journal.open(place / "x.building.scratch" / "journal.jsonl")
    assert journal is not None
    step = {**journal.entries[1]["step"], "states": {"calibration": "../../thesis.txt"}}
    journal.append({"kind": "step", "step": step})
    with pytest.raises(ArtifactError, match=r"expected the name of a file of states, found '\.\."):
        build(source)
    assert thesis.read_text() == THESIS


# ------------------------------------------------------------------------------------ --overwrite


def test_overwrite_keeps_files_that_the_manifest_does_not_name(source: Path, place: Path) -> None:
    build(source)
    notes = place / "x" / "notes.txt"
    notes.write_text(THESIS)
    with pytest.raises(
        UsageError, match=r"x: expected only the files of an artifact, found 'notes\.txt', which"
    ):
        build(source, overwrite=True)
    assert notes.read_text() == THESIS
    notes.unlink()
    build(source, overwrite=True)
    verify_artifact(place / "x")
    assert {path.name for path in place.iterdir()} == {"x"}


@pytest.mark.parametrize("manifest", [None, "{", "{}"])
def test_overwrite_refuses_folders_that_are_no_artifacts(
    manifest: str | None, source: Path, place: Path
) -> None:
    theirs = plant(place / "x")
    if manifest is not None:
        (place / "x" / "quantkit" / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match="not an artifact of quantkit; --overwrite replaces art"):
        build(source, overwrite=True)
    assert theirs.read_text() == THESIS


def test_link_at_the_output_is_replaced_and_not_followed(source: Path, place: Path) -> None:
    build(source)
    (place / "x").rename(place / "kept")
    (place / "x").symlink_to("missing")
    with pytest.raises(UsageError, match="x: exists already"):
        build(source)
    (place / "x").unlink()
    (place / "x").symlink_to("kept")
    build(source, overwrite=True)
    assert not (place / "x").is_symlink()
    verify_artifact(place / "x")
    verify_artifact(place / "kept")


def test_replaced_artifact_is_removed_only_if_the_journal_names_it(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the old artifact had been moved away: it is removed by the next run, and nothing
    else.
    """
    build(source)
    (place / "x" / "README.md").write_text("another")  # a changed artifact is replaced as well
    real = os.rename

    def die(old: object, new: object) -> None:
        real(old, new)  # type: ignore[arg-type]
        raise Killed

    for planted in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "rename", die)
            build(source, overwrite=True)
        replaced = place / "x.replaced"
        assert not (place / "x").exists() and (replaced / "quantkit" / "manifest.json").is_file()
        if planted:
            shutil.rmtree(replaced)
            plant(replaced)
        build(source, overwrite=True)
        verify_artifact(place / "x")
        assert replaced.exists() == planted
    assert (place / "x.replaced" / "quantkit" / "thesis.txt").read_text() == THESIS


def test_remove_replaced_keeps_what_was_added_meanwhile(source: Path, place: Path) -> None:
    build(source)
    manifest = replace.hash_manifest(place / "x")
    replace.remove_replaced(place / "x", "0" * 64)
    verify_artifact(place / "x")
    (place / "x" / "samples").mkdir()
    (place / "x" / "samples" / "thesis.txt").write_text(THESIS)
    replace.remove_replaced(place / "x", manifest)
    assert [path for path in (place / "x").rglob("*") if path.is_file()] == [
        place / "x" / "samples" / "thesis.txt"
    ]
