"""The same recipe gives the same bytes with any number of threads and any memory budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.paths import ROOT

ARGUMENTS = (
    "--skip-evaluation",
    "--set",
    "gates.kl_mean.max=1",
    "--set",
    "calibration.sequences=24",
    "--set",
    "fidelity.windows=8",
    "--set",
    "evaluation.likelihood=16",
)


PROGRAM = """
import os, sys
from quantkit.library_settings import REPRODUCIBLE
os.environ.update(REPRODUCIBLE)  # before torch is imported, as the command line does
from quantkit.cli.main import main
from support.quick_builds import shorten_searches
shorten_searches(setattr)
main(sys.argv[1:])
"""


def build(place: Path, name: str, threads: int, *more: str) -> Path:
    """A demo-like build with short searches, in a process of its own."""
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "build",
        "tiny-v3-awq4",
        *ARGUMENTS,
        "--set",
        f"output.path={name}",
    ]
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": folders}
    subprocess.run([*command, *more], cwd=place, env=environment, check=True, capture_output=True)
    return place / name


def files(folder: Path) -> dict[str, bytes]:
    """Every hashed file and the manifest itself."""
    actual = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    del actual["quantkit/timings.json"]
    return actual


def test_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    """One thread with all experts in memory, against two threads with waves of one slice."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    first = build(tmp_path / "x", "artifact", 1)
    second = build(tmp_path / "y", "artifact", 2, "--set", "memory=968MB")
    one, two = files(first), files(second)
    assert json.loads((second / "quantkit/timings.json").read_text())["threads"] == 2
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
def test_threads_change_no_byte_of_error_feedback(tmp_path: Path) -> None:
    """Rounding gptq on every linear, with the original model's inputs: factors, corrections,
    refinement.
    """
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    learned = (
        "quantize.method=awq",
        "quantize.rounding=gptq",
        "rules=all-linear",
        "propagate=both",
    )
    changes = [word for change in learned for word in ("--set", change)]
    one, two = (
        files(build(tmp_path / place, "artifact", threads, *changes))
        for place, threads in (("x", 1), ("y", 2))
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
def test_shard_size_changes_no_tensor(tmp_path: Path) -> None:
    """Many shards and an index hold the tensors of one file."""
    one = build(tmp_path, "one", 2, "--set", "rules=all-linear")
    many = build(
        tmp_path, "many", 2, "--set", "rules=all-linear", "--set", "output.shard_bytes=300kB"
    )
    shards = sorted(many.glob("model-*.safetensors"))
    assert len(shards) > 5
    index = json.loads((many / "model.safetensors.index.json").read_text())
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(index["weight_map"]) == set(together)
    for name, tensor in load_file(one / "model.safetensors").items():
        assert tensor.equal(together[name]), name


@pytest.mark.parametrize("threads", [1, 2])
def test_command_line_makes_library_sums_reproducible(threads: int) -> None:
    """A product of few rows depends on the number of threads unless MKL is configured before it
    loads.
    """
    code = (
        "import os, hashlib; from quantkit.library_settings import REPRODUCIBLE; "
        "os.environ.update(REPRODUCIBLE); import torch;g = torch.Generator().manual_seed(0); x = "
        "torch.randn(7, 256, generator=g);w = torch.randn(512, 256, generator=g); "
        "print(hashlib.sha256((x @ w.T).numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    again = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, check=True, capture_output=True, text=True
    )
    assert done.stdout == again.stdout
