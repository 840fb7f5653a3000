"""Warnings and errors before a build begins: model, tokens, disk, benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.builds import build
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

from quantkit.build import disk_space, session
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.evaluate.check_plan import plan_and_check
from quantkit.plan.plan import Plan
from quantkit.plan.sources import resolve_source_facts
from quantkit.recipe.parse import parse_recipe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", make_tiny_config("llama"))


@pytest.fixture
def no_hashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when a build hashes its source."""

    def compute_hashes(*_: object) -> dict[str, str]:
        raise AssertionError("the source was hashed")

    monkeypatch.setattr(Checkpoint, "compute_hashes", compute_hashes)
    yield


def plan(folder: Path, **keys: str) -> Plan:
    """Return the checked plan of a small recipe."""
    recipe = parse_recipe(make_recipe_text(folder, folder.parent / "out", **keys), "r.yaml")
    (made,) = plan_and_check(recipe, resolve_source_facts(recipe))
    return made


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_nothing_is_said_of_a_good_source(source: Path) -> None:
    assert plan(source).warnings == plan(source, memory="5GB").warnings
    assert not [x for x in plan(source).warnings if "disk" in x or "benchmarks" in x]


@pytest.mark.usefixtures("no_hashing")
def test_config_that_transformers_refuses_is_refused_first(source: Path) -> None:
    change_config(source, hidden_act="no such function")
    for refuse in (plan, lambda folder: build(folder, folder.parent / "out")):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            refuse(source)


@pytest.mark.usefixtures("no_hashing")
def test_tokens_beyond_the_embedding_are_refused_first(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", make_tiny_config("llama", vocab_size=300))
    for refuse in (plan, lambda path: build(path, path.parent / "out")):
        with pytest.raises(CheckpointError, match="expected token ids below 300, the rows of"):
            refuse(folder)


@pytest.mark.usefixtures("no_hashing")
def test_full_disk_is_said_and_refused_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "get_free_bytes", lambda _: 1000)
    assert any("GB of disk for the artifacts and scratch" in x for x in plan(source).warnings)
    with pytest.raises(ArtifactError, match=r"found 1e-06 GB free; free some space, or set output"):
        build(source, source.parent / "out")


def test_files_of_an_interrupted_build_count_as_room(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(source)
    monkeypatch.setattr(disk_space, "get_free_bytes", lambda _: 0)
    assert disk_space.describe_disk_shortage([made])
    folder = session.scratch_folder([made])
    folder.mkdir(parents=True)
    (folder / "states").write_bytes(b"\1" * (made.n_bytes + made.memory.scratch_bytes + 4096))
    assert disk_space.describe_disk_shortage([made]) == ""


def test_benchmarks_that_cannot_run_are_said(source: Path) -> None:
    said = plan(source, evaluation="{tasks: [tiny-v3-math]}").warnings
    assert not [x for x in said if x.startswith("benchmarks")]
    task = source.parent / "task.yaml"
    task.write_text("no: task")
    said = plan(source, evaluation=f"{{tasks: [{task}]}}").warnings
    assert [x for x in said if x.startswith("benchmarks will not run: ")]
