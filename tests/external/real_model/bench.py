"""What the benchmarks on the real model share: the model, its text, builds in processes of their own, and tables.

Every tool runs on one core, pinned, with one thread. CPU seconds are user and system time between loading a model and
the last byte written; peak memory is that of the whole process.
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

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
PLACE = ROOT / "artifacts" / "real"
LOG_LINES = 30
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Build:
    """A way for quantkit to make an artifact: a recipe that ships, and what is changed in it."""

    name: str
    recipe: str
    changes: Mapping[str, str]

    @property
    def calibrated(self) -> bool:
        """Whether it learns from text."""
        return self.changes.get("calibration") != "null"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a tool needed."""

    cpu_s: float
    wall_s: float
    peak_rss: int


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, its text and the folder in which everything is made."""

    model: Path
    sets: texts.Sets
    tokens: Path  # the calibration text as every other tool gets it
    place: Path

    def text(self) -> corpora.Tokens:
        """The windows on which source and artifacts are compared."""
        tokenizer, corpus = (
            corpora.load_tokenizer(self.model),
            corpora.load_set(str(self.sets.fidelity), self.place),
        )
        return corpora.sample_sequences(corpus, tokenizer, None, texts.LENGTH, 0)


def prepare_bench(model: Path, place: Path) -> Bench | None:
    """Cut the text for the model; None, after saying so, on a machine without wikitext-2."""
    data = texts.find_wikitext()
    if data is None:
        print_line(
            "skipped: wikitext-2 is not on this machine (tests/external/real_model/texts.py says where it is looked for)"
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
    """What is changed in the build's recipe; unmeasured there is no forward pass but for calibration."""
    text = {f"{kind}.length": str(texts.LENGTH) for kind in ("calibration", "fidelity")}
    return {
        **text,
        "source.model": str(bench.model),
        "calibration.set": str(bench.sets.calibration),
        "calibration.sequences": "null",
        "fidelity.set": str(bench.sets.fidelity),
        "fidelity.windows": "null",
        "gates": "{}",
        "output.path": str(get_artifact_path(bench, build, measured=measured)),
        "memory": "4GB",
        "compute.device": "cpu",
        **build.changes,
        **({} if measured else {"fidelity": "none"}),
    }


def get_artifact_path(bench: Bench, build: Build, *, measured: bool) -> Path:
    """Where a build's artifact goes."""
    return (
        bench.place / f"quantkit-{build.name.replace(' ', '-')}{'' if measured else '-unmeasured'}"
    )


def build_artifact(bench: Bench, build: Build, *, measured: bool) -> Cost:
    """Build in a process of its own; the artifact lies at `artifact(...)` afterwards."""
    folder = get_artifact_path(bench, build, measured=measured)
    recipe, told = ROOT / "recipes" / f"{build.recipe}.yaml", folder.with_suffix(".changes.json")
    told.write_text(
        json.dumps(drop_keys_of_replaced(make_overrides(bench, build, measured=measured))),
        encoding="utf-8",
    )
    cost = folder.with_suffix(".json")
    run_on_one_core(
        [sys.executable, str(HERE / "run_quantkit.py"), str(recipe), str(told), str(cost)],
        bench.place,
    )
    return read_cost(cost)


def drop_keys_of_replaced(keys: Mapping[str, str]) -> dict[str, str]:
    """Keys without those inside one that is itself replaced: `calibration: null` leaves no `calibration.set`."""
    return {
        key: value
        for key, value in keys.items()
        if key.partition(".")[0] not in keys or "." not in key
    }


def read_cost(path: Path) -> Cost:
    """What peers/cost.py wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return Cost(cpu_s=values["cpu_s"], wall_s=values["wall_s"], peak_rss=values["peak_rss"])


def run_on_one_core(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command in a folder, on one core with one thread; on failure its last lines are the message."""
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "--cpu-list", str(core), *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = done.stdout.replace("\r", "\n").splitlines()
        sys.exit(
            "\n".join([*lines[-LOG_LINES:], f"{' '.join(command)}: exit code {done.returncode}"])
        )


def count_weight_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def hash_weights(folder: Path) -> str:
    """sha256 of a folder's weights."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, numbers to the right."""
    shown = Table(*columns, title=title, title_justify="left", box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row)
    Console(width=140).print(shown)


def print_line(line: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
