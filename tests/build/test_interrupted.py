"""Builds in real processes that are killed, run out of disk or lose power end with the same
bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.mortal import Order, Server, server
from support.resumed_builds import SMALL, SYMMETRIC, list_differences, read_files

from quantkit.errors import UsageError
from quantkit.io.lock import hold_lock

BUILD = ("build", "r.yaml", "--skip-evaluation")


@pytest.fixture(scope="module")
def mortals() -> Iterator[Server]:
    with server() as actual:
        yield actual


def recipe(place: Path, source: Path, **keys: str) -> Path:
    """A folder with a recipe."""
    place.mkdir(parents=True)
    (place / "r.yaml").write_text(make_recipe_text(source, Path("x"), **{**SMALL, **keys}))
    return place


def finish_build(mortals: Server, place: Path) -> dict[str, bytes]:
    """Run a build to its end; return the bytes of its files."""
    end = mortals.run(Order(place=str(place), arguments=BUILD))
    assert end.code == 0, end.stderr
    return read_files(place)


def remove_remains(place: Path) -> dict[str, bytes]:
    """Remove lock and scratch folder of a build whose last calls failed; return its files."""
    (place / "x.building.lock").unlink(missing_ok=True)  # it says nothing once its holder is gone
    shutil.rmtree(place / "x.building.scratch", ignore_errors=True)
    return read_files(place)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in BF16."""
    return write_checkpoint(
        tmp_path_factory.mktemp("moe") / "source", make_tiny_config("qwen3_moe")
    )


@pytest.fixture(scope="module")
def whole(
    mortals: Server, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of an uninterrupted build."""
    return finish_build(mortals, recipe(tmp_path_factory.mktemp("whole") / "place", source))


def test_signals_report_how_far_the_build_is(
    mortals: Server, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL after the embedding, Ctrl-C after a block, SIGTERM after the last one; the resumed
    build has the same bytes.
    """
    place = recipe(tmp_path / "a", source)
    stands = (
        "x.building: {} of 2 blocks are done and kept; the same command resumes from there, "
        "--restart "
    )
    for number, done, code, says in (
        (signal.SIGKILL, 0, -signal.SIGKILL, None),
        (signal.SIGINT, 1, 130, "interrupted"),
        (signal.SIGTERM, 2, 143, "terminated"),
    ):
        end = mortals.run(Order(place=str(place), arguments=BUILD, step=1, number=number))
        assert end.code == code, end.stderr
        if says:
            assert f"continuing: {stands.format(done - 1)}" in end.stderr
            assert end.stderr.endswith(f"{says}\n{stands.format(done)}starts over\n")
    assert (place / "x.building.scratch").is_dir() and not (place / "x").exists()
    assert list_differences(finish_build(mortals, place), whole) == []
    assert sorted(path.name for path in place.iterdir()) == ["r.yaml", "x", "x.build.log"]


def test_full_disk_is_one_sentence_and_no_loss(
    mortals: Server, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The disk is full or fails at several calls, and the build resumes."""
    place = recipe(tmp_path / "a", source)
    for call, fault in ((4, "EIO"), (90, "ENOSPC"), (50, "EIO"), (70, "ENOSPC")):
        end = mortals.run(Order(place=str(place), arguments=BUILD, call=call, fault=fault))
        assert end.code == 1 and "error: " in end.stderr and "Traceback" not in end.stderr, (
            end.stderr
        )
    assert list_differences(finish_build(mortals, place), whole) == []


# ----------------------------------------------------------------------------------------- the lock


HOLDER = "import sys, time; from pathlib import Path; from quantkit.io.lock import hold_lock\n"
HOLDER += "with hold_lock(Path('x.building.lock')): print('held', flush=True); time.sleep(60)"


def test_second_build_is_refused_and_a_dead_holder_is_ignored(
    mortals: Server, source: Path, tmp_path: Path
) -> None:
    """The error names the holder; the lock file of a killed holder is ignored."""
    place = recipe(tmp_path / "a", source)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=place, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        end = mortals.run(Order(place=str(place), arguments=BUILD))
        assert end.code == 2, end.stderr
        assert (
            "x.building: expected to be the only build here, found another at work (process "
            in end.stderr
        )
        assert f"(process {holder.pid} on " in end.stderr
        holder.kill()
    lock = place / "x.building.lock"
    assert json.loads(lock.read_text())["pid"] == holder.pid
    with hold_lock(lock):
        assert json.loads(lock.read_text())["pid"] != holder.pid
        with pytest.raises(UsageError, match="expected to be the only build here"), hold_lock(lock):
            pass
    assert not lock.exists()


@pytest.mark.parametrize(
    ("change", "free"),
    [({}, False), ({"pid": 2**22 + 1}, True), ({"ticks": 1}, True), ({"host": "elsewhere"}, False)],
    ids=["alive", "gone", "another process of that number", "another machine"],
)
def test_named_holder_counts_where_files_cannot_be_locked(
    change: dict[str, object], free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    path = tmp_path / "x.building.lock"
    with hold_lock(path):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | change))
    monkeypatch.setattr(fcntl, "flock", refuse)
    if free:
        with hold_lock(path):
            assert json.loads(path.read_text())["pid"] == owner["pid"]
        assert not path.exists()
    else:
        with (
            pytest.raises(UsageError, match=r"x\.building: expected to be the only build here"),
            hold_lock(path),
        ):
            pass
        assert path.exists()


# --------------------------------------------------------------------------------------- the matrix


MIXED = (
    '[{match: "*.self_attn.*", quantize: {method: rtn, rounding: nearest, bits: 4, group_size: 64, '
    "symmetric: true}}, "
    '{match: "*.experts.*.down_proj", quantize: {method: gptq, bits: 4, group_size: 64, symmetric: '
    "true}}, "
    "{preset: experts-only}]"
)
MATRIX: dict[str, tuple[str, bool, int, dict[str, str]]] = {
    "three formats": (
        "qwen3_moe",
        False,
        3,
        {"format": "[gptq, compressed_tensors, dense]", "quantize": SYMMETRIC},
    ),
    "fp8, mtp": ("deepseek_v3", True, 0, {"mtp": "quantize", "rules": "all-linear"}),
    "mixed rules": (
        "qwen3_moe",
        False,
        0,
        {"format": "compressed_tensors", "quantize": SYMMETRIC, "rules": MIXED},
    ),
    "both streams": (
        "mixtral",
        False,
        2,
        {"quantize": "{method: awq, rounding: gptq, group_size: 64}", "propagate": "both"},
    ),
    "dense model": (
        "llama",
        False,
        0,
        {"quantize": "{method: gptq, group_size: 64}", "format": "[gptq_v2, awq]"},
    ),
    "nf4": (
        "qwen2",
        False,
        0,
        {"quantize": "{method: nf4, group_size: 64}", "format": "bitsandbytes"},
    ),
    "nothing measured": (
        "glm4_moe",
        False,
        2,
        {"quantize": "{method: rtn, group_size: 64}", "fidelity": "none"},
    ),
    "original inputs": ("deepseek_v2", False, 3, {"propagate": "original"}),
}
"""Name -> family, FP8 source, experts in a wave (0: all), keys of the recipe."""
KILLS = 26
FEW = {
    "calibration": "{set: tiny-v3, sequences: 4, length: 32, min_expert_tokens: 2}",
    "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 32}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRIX)
def test_killed_at_random(
    name: str, mortals: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Builds that are killed, or lose power and all that was not synced, until they are through:
    nothing differs.
    """
    family, fp8, wave, keys = MATRIX[name]
    source, chance = (
        write_checkpoint(tmp_path / "source", make_tiny_config(family), fp8=fp8),
        random.Random(name),
    )
    whole = finish_build(mortals, recipe(tmp_path / "whole", source, **keys))
    kills, builds, resumed = 0, 0, 0
    while kills < KILLS:
        place = recipe(tmp_path / f"{builds}", source, **keys)
        builds, sealed = builds + 1, False
        while not sealed and kills < KILLS:
            order = Order(
                place=str(place),
                arguments=BUILD,
                call=chance.randint(1, 160),
                fault=chance.choice(("kill", "power")),
                wave=wave,
            )
            end = mortals.run(order)
            assert end.code in (0, -signal.SIGKILL), end.stderr
            sealed, kills = end.code == 0, kills + (end.code != 0)
            resumed += "continuing: " in end.stderr
        assert (
            list_differences(read_files(place) if sealed else finish_build(mortals, place), whole)
            == []
        )
    assert resumed > KILLS // 4
    record_property("faults", kills)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_power_loss_at_every_call(
    family: str, mortals: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One build per writing call: everything unsynced is lost there, and the final bytes are the
    same.
    """
    source, keys = (
        write_checkpoint(tmp_path / "source", make_tiny_config(family, num_hidden_layers=1)),
        FEW,
    )
    whole, calls = finish_build(mortals, recipe(tmp_path / "whole", source, **keys)), 0
    for call in range(1, 1000):
        place = recipe(tmp_path / f"{call}", source, **keys)
        end = mortals.run(
            Order(place=str(place), arguments=BUILD, call=call, fault="power", wave=2)
        )
        if end.code == 0:
            break
        assert end.code == -signal.SIGKILL, end.stderr
        complete = (place / "x").exists() and not (place / "x.building.scratch").exists()
        assert (
            list_differences(
                remove_remains(place) if complete else finish_build(mortals, place), whole
            )
            == []
        )
        shutil.rmtree(place)
        calls += 1
    assert 100 < calls < 999
    record_property("faults", calls)


@pytest.mark.slow
@pytest.mark.reliability
def test_disk_error_at_every_call(
    mortals: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A disk error is one sentence, whichever call it hits, and the build resumes afterwards."""
    source, calls = (
        write_checkpoint(tmp_path / "source", make_tiny_config("qwen3_moe", num_hidden_layers=1)),
        0,
    )
    whole = finish_build(mortals, recipe(tmp_path / "whole", source, **FEW))
    artifact = read_files(tmp_path / "whole" / "x")
    for call in range(1, 1000):
        place = recipe(tmp_path / f"{call}", source, **FEW)
        fault = ("EIO", "ENOSPC", "EROFS")[call % 3]
        end = mortals.run(Order(place=str(place), arguments=BUILD, call=call, fault=fault, wave=4))
        if end.calls < call:
            break
        assert end.code in (0, 1) and "Traceback" not in end.stderr, (call, end.stderr)
        assert end.code == 1 or (place / "x").exists(), (call, end.stderr)
        if (
            place / "x"
            # also with an error: it has its name, and that this lasts could not be made sure of
        ).exists():
            assert list_differences(read_files(place / "x"), artifact) == []
        assert end.code == 0 or "error: " in end.stderr, (call, end.stderr)
        scratch = end.code == 0 and (place / "x.building.scratch").exists()
        assert scratch == ("x.building.scratch: the build is done" in end.stderr), (
            call,
            end.stderr,
        )
        assert (
            list_differences(
                remove_remains(place) if end.code == 0 else finish_build(mortals, place), whole
            )
            == []
        )
        shutil.rmtree(place)
        calls += 1
    assert 100 < calls < 999
    record_property("faults", calls)
