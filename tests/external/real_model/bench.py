"""Shared parts of the real-model benchmarks: model, texts, builds in separate processes, tables.

Each tool runs pinned to one core with one thread. CPU seconds are user and system time from the
loaded model to the last byte written; peak memory is that of the whole process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from external.real_model import texts
from rich.console import Console
from rich.table import Table

from quantkit.texts import corpora
from quantkit.texts.tokens import Tokens

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
PLACE = ROOT / "artifacts" / "real"
LOG_LINES = 30
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Build:
    """A quantkit build: a shipped recipe and its overrides."""

    name: str
    recipe: str
    changes: Mapping[str, str]

    @property
    def is_calibrated(self) -> bool:
        """Whether the build uses calibration text."""
        return self.changes.get("calibration") != "null"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU time, wall time (seconds) and peak memory (bytes) of a tool."""

    cpu_s: float
    wall_s: float
    peak_rss: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, its texts and the working folder."""

    model: Path
    sets: texts.Sets
    tokens: Path  # JSON token ids of the calibration text, the input of the other tools
    place: Path
    sequences: int | None = None  # of the calibration text; None: all
    windows: int | None = None  # of the fidelity text; None: all

    def load_text(self) -> Tokens:
        """Load the windows on which source and artifacts are compared."""
        tokenizer, corpus = (
            corpora.load_tokenizer(self.model),
            corpora.load_set(str(self.sets.fidelity), self.place),
        )
        return corpora.sample_sequences(corpus, tokenizer, self.windows, texts.LENGTH, 0)


def prepare_bench(model: Path, place: Path) -> Bench | None:
    """Cut the texts for the model.

    Print a message and return None if wikitext-2 is not available.
    """
    data = texts.find_wikitext()
    if data is None:
        print_line(
            "skipped: wikitext-2 is not on this machine (tests/external/real_model/texts.py lists "
            "the locations)"
        )
        return None
    place.mkdir(parents=True, exist_ok=True)
    model, place = model.resolve(), place.resolve()
    tokenizer = corpora.load_tokenizer(model)
    sets = texts.write_sets(data, tokenizer, place)
    corpus = corpora.load_set(str(sets.calibration), place)
    rows = corpora.sample_sequences(corpus, tokenizer, None, texts.LENGTH, 0)
    tokens = place / "calibration-tokens.json"
    tokens.write_text(
        json.dumps([rows.sequence(index).tolist() for index in range(rows.n_sequences)])
    )
    return Bench(model=model, sets=sets, tokens=tokens, place=place)


def make_overrides(bench: Bench, build: Build, *, measured: bool) -> dict[str, str]:
    """Return the overrides of the build's recipe; unmeasured builds run forward passes only to
    calibrate.
    """
    text = {f"{kind}.length": str(texts.LENGTH) for kind in ("calibration", "fidelity")}
    return {
        **text,
        "source.model": str(bench.model),
        "calibration.set": str(bench.sets.calibration),
        "calibration.sequences": json.dumps(bench.sequences),
        "fidelity.set": str(bench.sets.fidelity),
        "fidelity.windows": json.dumps(bench.windows),
        "gates": "{}",
        "output.path": str(get_artifact_path(bench, build, measured=measured)),
        "memory": "4GB",
        "compute.device": "cpu",
        **build.changes,
        **({} if measured else {"fidelity": "none"}),
    }


def get_artifact_path(bench: Bench, build: Build, *, measured: bool) -> Path:
    """Return the path of a build's artifact."""
    return (
        bench.place / f"quantkit-{build.name.replace(' ', '-')}{'' if measured else '-unmeasured'}"
    )


def build_artifact(bench: Bench, build: Build, *, measured: bool) -> Cost:
    """Build in a separate process. The artifact is written to `get_artifact_path(...)`."""
    folder = get_artifact_path(bench, build, measured=measured)
    recipe = ROOT / "recipes" / f"{build.recipe}.yaml"
    overrides = folder.with_name(f"{folder.name}.changes.json")
    overrides.write_text(
        json.dumps(drop_keys_of_replaced(make_overrides(bench, build, measured=measured))),
        encoding="utf-8",
    )
    cost = folder.with_name(f"{folder.name}.json")
    run_on_one_core(
        [sys.executable, str(HERE / "run_quantkit.py"), str(recipe), str(overrides), str(cost)],
        bench.place,
    )
    return read_cost(cost)


def drop_keys_of_replaced(keys: Mapping[str, str]) -> dict[str, str]:
    """Drop keys inside a section that is replaced itself: `calibration: null` drops
    `calibration.set`.
    """
    return {
        key: value
        for key, value in keys.items()
        if key.partition(".")[0] not in keys or "." not in key
    }


def read_cost(path: Path) -> Cost:
    """Read the file written by peers/cost.py."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Cost(cpu_s=values["cpu_s"], wall_s=values["wall_s"], peak_rss=values["peak_rss"])


def run_on_one_core(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command in a folder, on one core with one thread.

    Exit with its last lines on failure.
    """
    core = max(os.sched_getaffinity(0))
    process = subprocess.run(
        ["taskset", "--cpu-list", str(core), *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if process.returncode != 0:
        lines = process.stdout.replace("\r", "\n").splitlines()
        sys.exit(
            "\n".join([*lines[-LOG_LINES:], f"{' '.join(command)}: exit code {process.returncode}"])
        )


def count_weight_bytes(folder: Path) -> int:
    """Return the total size of a folder's safetensors files in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def hash_weights(folder: Path) -> str:
    """Return the sha256 of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with right-aligned numbers."""
    table = Table(*columns, title=title, title_justify="left", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def print_line(line: str) -> None:
    """Print a line to stdout and flush it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
