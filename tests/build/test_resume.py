"""An interrupted build resumes and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.resumed_builds import SMALL, SYMMETRIC, list_differences, read_files

from quantkit import pipeline
from quantkit.artifact.make_manifest import read_versions
from quantkit.artifact.read_report import read_report
from quantkit.artifact.writer import ArtifactWriter
from quantkit.build import moe, progress_log, session
from quantkit.build.block_plan import ExpertRange
from quantkit.build.context import BlockContext
from quantkit.build.expert_ops import ExpertSlice
from quantkit.build.progress_log import BuildProgress
from quantkit.build.session import BuildSession
from quantkit.build.spool import Spool
from quantkit.checkpoint.tensors import ShardWriter
from quantkit.errors import ArtifactError, QuantkitError, UsageError
from quantkit.io.journal import Journal
from quantkit.plan import plan, sources
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

THREE = {"format": "[gptq, compressed_tensors, dense]", "quantize": SYMMETRIC}
"""Two formats that share a build loop, and one with a loop of its own."""


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


def build(
    source: Path, messages: list[str] | None = None, *, restart: bool = False, **keys: str
) -> list[str]:
    """Build a small recipe into `x` of the current folder; return the messages."""
    text = make_recipe_text(source, Path("x"), **{**SMALL, **keys})
    said = [] if messages is None else messages
    pipeline.build_artifacts(
        parse_recipe(text, "r.yaml"),
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
        on_message=said.append,
        restart=restart,
    )
    return said


def end_process_at(
    patch: pytest.MonkeyPatch, owner: object, name: str, call: int, after: bool
) -> None:
    """End the process at the `call`th call of a function, before or after it."""
    real, calls = getattr(owner, name), list[int]()

    def call_and_end(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    patch.setattr(owner, name, call_and_end)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in BF16."""
    return write_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", make_tiny_config("qwen3_moe")
    )


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted build of three formats."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert build(source, **THREE) == []
    assert {path.name for path in place.iterdir()} == {"x-gptq", "x-compressed-tensors", "x-dense"}
    return read_files(place)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_resume_after_a_kill_before_and_after_every_step(
    source: Path, whole: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process finishes one step and dies before or after its journal entry, until the build is
    done.
    """
    output, ends = list[str](), 0
    for run in range(100):
        with monkeypatch.context() as patch:
            end_process_at(patch, BuildProgress, "commit_step", 1, after=bool(run % 2))
            try:
                build(source, output, **THREE)
            except Killed:
                ends += 1
                continue
        break
    steps = 1 + 2 + 1  # the embedding, two blocks, what follows them
    assert ends == 2 * 2 * steps  # of two loops
    assert "0 of 2 blocks are done" in output[0] and "2 of 2 blocks are done" in output[-1]
    assert list_differences(read_files(place), whole) == []


POINTS: Sequence[tuple[object, str, int, bool]] = (
    (ArtifactWriter, "write", 1, False),  # nothing is there yet
    (Journal, "append", 1, False),
    (ArtifactWriter, "write", 3, True),
    (Spool, "flush", 2, False),
    (ShardWriter, "flush", 1, True),
    (ShardWriter, "finish", 1, True),  # a whole file that no journal knows
    (ShardWriter, "finish", 2, False),
    (Journal, "append", 1, True),  # unused states are not removed
    (ArtifactWriter, "close", 1, True),
    (pipeline, "write_model_files", 1, True),
    (pipeline, "measure_text", 1, False),
    (pipeline, "write_evidence", 1, True),
    (pipeline, "seal_artifact", 1, True),
    (pipeline, "seal_artifact", 2, True),
    (BuildSession, "mark_sealed", 1, True),
    (pipeline, "rename_into_place", 1, True),  # one of two has its name
    (pipeline, "rename_into_place", 2, True),
    (BuildProgress, "commit_step", 2, True),  # of the second loop
    (pipeline, "rename_into_place", 3, False),
    (pipeline, "rename_into_place", 3, True),
    (BuildSession, "remove_scratch", 1, False),
)


def test_resume_after_a_kill_at_every_kind_of_write(
    source: Path, whole: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One build that dies again and again, each time later."""
    for owner, name, call, after in POINTS:
        with monkeypatch.context() as patch:
            end_process_at(patch, owner, name, call, after)
            with pytest.raises(Killed):
                build(source, **THREE)
                pytest.fail(f"not killed at {name} {call}")
    assert "2 of 2 blocks are done" in build(source, **THREE)[0]
    assert list_differences(read_files(place), whole) == []
    for path in place.iterdir():
        verify_artifact(path)


def limit_waves(patch: pytest.MonkeyPatch, size: int) -> None:
    """Hold so many experts at once, and save every wave."""
    real = plan.plan_memory

    def plan_fewer_experts(*args, **kwargs):  # type: ignore[no-untyped-def]  # stands for `plan_memory`
        return replace(real(*args, **kwargs), wave_experts=size)

    patch.setattr(plan, "plan_memory", plan_fewer_experts)
    patch.setattr(progress_log, "MIN_SECONDS", 0.0)
    patch.setattr(progress_log, "MIN_COST_RATIO", 0)


def count_waves(patch: pytest.MonkeyPatch, waves: list[int], run: int) -> None:
    """Append `run` for each wave that is read."""
    real = moe.read_wave

    def count_and_read(context: BlockContext, wave: Sequence[ExpertRange]) -> list[ExpertSlice]:
        waves.append(run)
        return real(context, wave)

    patch.setattr(moe, "read_wave", count_and_read)


GPTQ = SYMMETRIC.replace(
    "awq", "gptq"
)  # rescales nothing: there is no fold to check, and nothing to sum over waves


@pytest.mark.parametrize(
    ("propagate", "quantize"),
    [
        pytest.param("quantized", SYMMETRIC, marks=pytest.mark.slow),
        ("both", SYMMETRIC),
        pytest.param("original", SYMMETRIC, marks=pytest.mark.slow),
        ("quantized", GPTQ),
        ("original", GPTQ),
    ],
)
def test_resume_after_a_kill_at_every_wave(
    source: Path, propagate: str, quantize: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process finishes one wave and dies before or after its entry; a pass reads only
    unfinished experts.
    """
    keys = {**THREE, "propagate": propagate, "quantize": quantize}
    with monkeypatch.context() as patch:
        limit_waves(patch, 3)
        build(source, **keys)
    whole = read_files(place)
    for path in [*place.iterdir()]:
        shutil.rmtree(path)
    output, waves = list[str](), list[int]()
    for run in range(100):
        with monkeypatch.context() as patch:
            limit_waves(patch, 3 if run % 5 else 2)  # the budget may change in between
            end_process_at(patch, BuildProgress, "record_wave", 1, after=bool(run % 3))
            count_waves(patch, waves, run)
            try:
                build(source, output, **keys)
            except Killed:
                continue
        break
    assert (
        max(waves.count(run) for run in range(run)) <= 3
    )  # the wave that ended it, and those after the last checkpoint
    assert any("of 2 blocks and 3 experts of the next are done" in line for line in output)
    assert list_differences(read_files(place), whole) == []
    assert not list(place.rglob("*.building*"))


def test_saved_states_survive_a_kill_in_the_next_wave(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a wave, several times at the same place and then later."""
    limit_waves(monkeypatch, 3)
    build(source, **THREE)
    whole = read_files(place)
    for path in [*place.iterdir()]:
        shutil.rmtree(path)
    for call in (1, 2, 2, 5, 5, 3, 9, 4, 4, 7):
        with monkeypatch.context() as patch:
            end_process_at(patch, moe, "add_to_stream", call, after=bool(call % 2))
            with suppress(Killed):
                build(source, **THREE)
    build(source, **THREE)
    assert list_differences(read_files(place), whole) == []


def interrupt_after_first_block(source: Path, patch: pytest.MonkeyPatch, **keys: str) -> None:
    """Run a build that dies after its first block."""
    with patch.context() as inner:
        end_process_at(inner, BuildProgress, "commit_step", 2, after=True)
        with pytest.raises(Killed) as caught:
            build(source, **keys)
    assert "1 of 2 blocks are done and kept; the same command resumes" in caught.value.__notes__[0]


def test_changed_inputs_are_named_and_restart_starts_over(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe, source or version is refused; another memory budget gives the same bytes."""
    copy = Path(shutil.copytree(source, place / "source"))
    interrupt_after_first_block(copy, monkeypatch)
    with pytest.raises(
        UsageError,
        match=r"x\.building: .* recipe\.quantize\.group_size was 64, is 32; .* --restart",
    ):
        build(copy, quantize="{method: awq, rounding: nearest, bits: 4, group_size: 32}")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"another: source\.files\.model\.safetensors changed; "):
        build(copy)
    (copy / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as patch:
        patch.setattr(
            session, "read_versions", lambda plan: {**read_versions(plan), "torch": "0.1"}
        )
        with pytest.raises(UsageError, match=r"another: versions\.torch was '.*', is '0\.1'; "):
            build(copy)
    with monkeypatch.context() as patch:
        own = session.JOURNAL_FORMAT
        patch.setattr(session, "JOURNAL_FORMAT", own + 1)
        with pytest.raises(UsageError, match=rf"another: journal was {own}, is {own + 1}; "):
            build(copy)
    assert build(copy, memory="3GB") != []
    resumed = read_files(place / "x")
    shutil.rmtree(place / "x")
    interrupt_after_first_block(copy, monkeypatch)
    assert build(copy, restart=True, quantize="{method: rtn, bits: 4, group_size: 64}") == []
    shutil.rmtree(place / "x")
    assert build(copy) == []
    fresh = read_files(place / "x")
    with_budget = ("README.md", "quantkit/fidelity.html", "quantkit/fidelity.json", "recipe.yaml")
    with_hashes = ("quantkit/bom.cdx.json", "quantkit/manifest.json")
    assert list_differences(fresh, resumed) == sorted((*with_budget, *with_hashes))
    for name in with_budget:  # they state the recipe, and differ in nothing else
        assert fresh[name].replace(b"memory: 4GB", b"memory: 3GB") == resumed[name], name
    assert {path.name for path in place.iterdir()} == {"source", "x"}


@pytest.mark.parametrize(
    "formats", ["[compressed_tensors, gptq, dense]", "[gptq, dense]", "gptq_v2"]
)
def test_other_formats_destroy_nothing(
    formats: str, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's path does not depend on the formats and their order."""
    interrupt_after_first_block(source, monkeypatch, **THREE)
    before = read_files(place)
    with pytest.raises(
        UsageError,
        match=r"another: recipe\.format\.0 was 'gptq', is|another: recipe\.format\.1 was",
    ):
        build(source, **{**THREE, "format": formats})
    assert list_differences(read_files(place), before) == []


def test_missing_shards_are_reported_at_the_start(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after_first_block(source, monkeypatch, **{**THREE, "output": "{path: x}"})
    shutil.rmtree(place / "x-gptq.building")
    with pytest.raises(
        ArtifactError,
        match=r"safetensors\.part: expected the file that the build started, found none: its",
    ):
        build(source, **{**THREE, "output": "{path: x}"})
    build(source, restart=True, **{**THREE, "output": "{path: x}"})
    assert {path.name for path in place.iterdir()} == {"x-gptq", "x-compressed-tensors", "x-dense"}


def test_source_that_changes_during_the_build_is_an_error(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors from before and after a change must not be mixed; a file with a new time only is
    unchanged.
    """
    copy = Path(shutil.copytree(source, place / "source"))
    real, weights = pipeline.build_blocks, copy / "model.safetensors"

    def changing(*args):  # type: ignore[no-untyped-def]  # stands for the build loop
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_blocks", changing)
        with pytest.raises(
            QuantkitError, match=r"source: expected the files that the build began with"
        ):
            build(copy)
    assert not (place / "x").exists()
    (copy / "config.json").touch()
    build(copy, restart=True)


def test_damaged_journal_and_missing_shards_are_errors(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        end_process_at(
            patch, Journal, "append", 2, after=True
        )  # the states in front of the block are still there
        with pytest.raises(Killed):
            build(source)
    journal = place / "x.building.scratch" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    spooled = {path.name: path.read_bytes() for path in (journal.parent / "states-0").iterdir()}
    shard = next((place / "x.building").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(
        ArtifactError, match=r"safetensors: expected \d+ bytes as written, found no file"
    ):
        build(source)
    shard.write_bytes(content)
    for name, states in spooled.items():
        (journal.parent / "states-0" / name).write_bytes(states)
    journal.write_bytes(lines[0] + lines[1].replace(b"embed", b"amber") + lines[2])
    with pytest.raises(
        ArtifactError, match=r"journal\.jsonl: line 2: expected an entry with its sha256.*--restart"
    ):
        build(source)
    journal.write_bytes(
        lines[0] + lines[1] + lines[2][:100]
    )  # torn: the second step had not been noted
    assert "0 of 2 blocks are done" in build(source)[0]


# ---------------------------------------------------------------------------- what others put there


@pytest.mark.parametrize(
    "name", ["x.building", "x.building.scratch", "x.replaced", "x.building.lock"]
)
@pytest.mark.parametrize("restart", [False, True])
def test_files_of_the_user_are_refused_and_kept(
    source: Path, name: str, restart: bool, place: Path
) -> None:
    """A folder, file or link of the user's at a build's paths is refused and stays unchanged."""
    keys = {"quantize": "{method: rtn, bits: 4, group_size: 64}", "fidelity": "none"}
    theirs = place / name
    if not name.endswith("lock"):
        theirs.mkdir()
        (theirs / "thesis.txt").write_text("years of work")
        with pytest.raises(UsageError, match=rf"{theirs.name}: expected nothing.*move it away"):
            build(source, restart=restart, **keys)
        theirs.rename(place / "elsewhere")
        theirs.symlink_to("elsewhere")
        with pytest.raises(UsageError, match=rf"{theirs.name}: expected nothing.*move it away"):
            build(source, restart=restart, **keys)
        assert (theirs / "thesis.txt").read_text() == "years of work" and theirs.is_symlink()
        theirs.unlink()
    theirs.write_text("years of work")
    with pytest.raises(UsageError, match=rf"{theirs.name}: expected .*move it away"):
        build(source, restart=restart, **keys)
    assert theirs.read_text() == "years of work"
    assert not (place / "x").exists()


def test_empty_folder_is_used(source: Path, place: Path) -> None:
    """It may be left by a build that was killed before its first file."""
    for name in ("x.building", "x.building.scratch"):
        (place / name).mkdir()
    build(source, quantize="{method: rtn, bits: 4, group_size: 64}", fidelity="none")
    assert {path.name for path in place.iterdir()} == {"x"}


# -------------------------------------------------------------------------------------- the journal


def test_journal_returns_its_entries(tmp_path: Path) -> None:
    """Floats to the last bit, infinities included; a truncated file loses only its last entry."""
    path, last = tmp_path / "j", {"x": [0.1 + 0.2, 1e-310, float("inf")], "ü": None}
    journal = Journal.begin(path, {"n": 0})
    journal.append({"n": 1})
    before = path.read_bytes()
    journal.append(last)
    actual = Journal.open(path)
    assert actual is not None and actual.entries == [{"n": 0}, {"n": 1}, last]
    content = path.read_bytes()
    for cut in range(len(before), len(content)):
        path.write_bytes(content[:cut])
        torn = Journal.open(path)
        assert torn is not None and torn.entries == [{"n": 0}, {"n": 1}]
        assert path.read_bytes() == before
    torn.append(last)
    assert path.read_bytes() == content


def test_changed_byte_of_a_journal_is_detected(tmp_path: Path) -> None:
    """In the last line it is a torn line, in earlier lines damage."""
    path = tmp_path / "j"
    journal = Journal.begin(path, {"n": 0})
    journal.append({"n": 1})
    content = path.read_bytes()
    first = content.index(b"\n")
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        actual = None
        with suppress(ArtifactError):
            actual = Journal.open(path)
        assert (
            (actual is None)
            if place <= first
            else (actual is not None and actual.entries == [{"n": 0}])
        )
    assert Journal.open(tmp_path / "none") is None
    assert json.loads(content.splitlines()[0])["entry"] == {"n": 0}


def test_build_leaves_no_file_open(source: Path, place: Path) -> None:
    """Removing an open file frees no disk space."""
    build(source, **THREE)
    links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert [link for link in links if str(place) in link] == []


def test_resumed_build_keeps_the_sets_that_auto_stood_for(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that began without the hub resumes with its own texts where the hub answers."""
    text = {
        "calibration": "{sequences: 8, length: 32, min_expert_tokens: 8}",
        "fidelity": "{windows: 4, length: 32}",
    }
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    answers = iter(["no connection"])
    monkeypatch.setattr(sources, "find_hub_fault", lambda: next(answers, ""))
    monkeypatch.setattr(sources, "find_self_fault", lambda *_: "the model is too large")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        end_process_at(patch, BuildProgress, "commit_step", 2, after=True)
        build(source, **text)
    said = build(source, **text)
    assert said and "of 2 blocks are done" in said[0]
    report = read_report(place / "x")
    assert report.calibration is not None and report.measured_on is not None
    assert report.calibration.set == "general-math-code"
    assert "the hub cannot be read: no connection" in report.calibration.chosen
    assert report.measured_on.set == "general-heldout"
