"""Artifacts of a folder side by side: key figures, which of them nobody beats in size and KL, and what is broken.

KL compares only between artifacts of one source measured on one text, so each such group has a front of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity
from quantkit.artifact.layout import EVIDENCE_FOLDER, MANIFEST
from quantkit.artifact.read_report import read_sealed_report
from quantkit.errors import ArtifactError, UsageError
from quantkit.figures import FigureDefinition, list_headline_figures
from quantkit.io.suggestions import format_unknown_name
from quantkit.report import format_numbers
from quantkit.report.gates import read_figure
from quantkit.report.tables import Table

DEPTH = 3  # folders below the one that is listed
BUILDING, SCRATCH = ".building", ".scratch"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One artifact; `fault` says why it has no figures."""

    name: str  # its folder below the one that is listed
    fidelity: Fidelity | None = None
    fault: str = ""
    front: bool = False  # none in its group is both smaller and closer to the source

    def values(self) -> dict[str, object]:
        """The key figures under the names of the columns; None where there is none."""
        if self.fidelity is None:
            return {"name": self.name, "status": "broken", "fault": self.fault}
        artifact = self.fidelity.artifact
        return {
            "name": self.name,
            "status": self.fidelity.status,
            "source": self.fidelity.source.model,
            "format": artifact.format,
            **{row.run_column: row.read(self.fidelity).value for row in list_run_columns()},
            "tasks": {row.task: row.artifact for row in self.fidelity.benchmarks},
            "n": {row.task: row.n for row in self.fidelity.benchmarks},
            "recovery": {
                row.task: row.recovery.value for row in self.fidelity.benchmarks if row.recovery
            },
            "front": self.front,
            "fault": "",
        }


TEXT_COLUMNS = ("name", "status", "source", "format")


def list_run_columns() -> tuple[FigureDefinition, ...]:
    """Return the figures that are columns of `quantkit runs`."""
    return tuple(row for row in list_headline_figures() if row.run_column)


def read_runs(folder: Path) -> list[Run]:
    """Every artifact in a folder and up to three below, sorted by name; what is broken is listed with its reason."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder of artifacts, found none; check the path")
    if (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: expected a folder of artifacts, found an artifact; name the folder that it is in"
        )
    found = [_run(path, folder) for path in _candidates(folder, DEPTH)]
    return mark_front(sorted(found, key=lambda run: run.name))


def sort_runs(runs: Sequence[Run], column: str, *, reverse: bool = False) -> list[Run]:
    """By a column: the best first, then those without that figure, then the broken; UsageError for an unknown one."""
    tasks, figures = list_tasks(runs), {row.run_column: row for row in list_run_columns()}
    columns = (*TEXT_COLUMNS, *figures, *tasks)
    if column not in columns:
        raise UsageError(f"--sort: {format_unknown_name('column', column, columns)}")

    def value(run: Run) -> object:
        values = run.values()
        known = values.get("tasks")
        return (
            known.get(column) if column in tasks and isinstance(known, dict) else values.get(column)
        )

    rows = [(value(run), run) for run in runs]
    numeric = [(float(v), run) for v, run in rows if isinstance(v, int | float)]
    is_higher_better = column in tasks or (
        column in figures and figures[column].direction == "higher"
    )
    numeric.sort(key=lambda row: row[0], reverse=is_higher_better is not reverse)
    words = sorted(
        ((v, run) for v, run in rows if isinstance(v, str)), key=lambda row: row[0], reverse=reverse
    )
    rest = [run for v, run in rows if v is None]
    return [
        *(r for _, r in numeric),
        *(r for _, r in words),
        *sorted(rest, key=lambda r: (bool(r.fault), r.name)),
    ]


def mark_front(runs: Sequence[Run]) -> list[Run]:
    """The runs with the front of each group marked: smaller, or closer to the source, than every other."""
    points: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        if (place := _place(run)) is not None:
            points.setdefault(_group(run), []).append(place)
    return [
        replace(
            run, front=is_on_front(place, points[_group(run)]) if (place := _place(run)) else False
        )
        for run in runs
    ]


def is_on_front(place: tuple[int, float], others: Sequence[tuple[int, float]]) -> bool:
    """Whether none of the others is at least as small and as close, and better in one of both (Pareto)."""
    size, kl = place
    return not any(s <= size and k <= kl and (s, k) != place for s, k in others)


def list_tasks(runs: Sequence[Run]) -> tuple[str, ...]:
    """Benchmarks of any of the runs."""
    names = (row.task for run in runs if run.fidelity for row in run.fidelity.benchmarks)
    return tuple(dict.fromkeys(names))


def make_run_table(runs: Sequence[Run]) -> Table:
    """The runs for a terminal; "*" marks the front."""
    sources = {_group(run) for run in runs if run.fidelity}
    rows = tuple(_row(run) for run in runs if run.fidelity)
    headings = (f">{row.run_heading}" for row in list_run_columns())
    columns = (" ", "name", "status", "format", *headings)
    note = "* nobody of the same source and text is both smaller and closer to it (size, mean KL)."
    note += (
        f" {len(sources)} sources or texts: their KL does not compare." if len(sources) > 1 else ""
    )
    return Table(title="Artifacts", columns=columns, rows=rows, note=note if rows else "")


def make_score_table(runs: Sequence[Run]) -> Table:
    """The artifacts' scores, benchmark by benchmark, each with its items and its share of its own source's score."""
    tasks, rows = list_tasks(runs), list[tuple[str, ...]]()
    for run in runs:
        told = {row.task: row for row in run.fidelity.benchmarks} if run.fidelity else {}
        if told:
            rows.append((run.name, *(_score(told.get(task)) for task in tasks)))
    columns = ("name", *(f">{task}" for task in tasks))
    mixed = [task for task in tasks if len(_asked(runs, task)) > 1]
    note = "score of so many items (share of its own source's score)."
    note += f" Other items, and so scores that do not compare: {', '.join(mixed)}." if mixed else ""
    return Table(title="Benchmarks", columns=columns, rows=tuple(rows), note=note if rows else "")


def _score(row: BenchmarkResult | None) -> str:
    """ "81.3 % of 300 (98.79 %)"."""
    if row is None or row.artifact is None:
        return format_numbers.MISSING
    kept = f" ({format_numbers.format_percent(row.recovery.value)})" if row.recovery else ""
    return f"{format_numbers.format_percent(row.artifact, 1)} of {row.n:,}{kept}"


def _asked(runs: Sequence[Run], task: str) -> set[tuple[str, int, str]]:
    """The different sets of items of a task: data, how many of it, and the filter that scores."""
    rows = (
        row for run in runs if run.fidelity for row in run.fidelity.benchmarks if row.task == task
    )
    return {(row.data_sha256, row.n, row.metric) for row in rows if row.artifact is not None}


def make_fault_table(runs: Sequence[Run]) -> Table:
    """What is no artifact, and why."""
    rows = tuple((run.name, run.fault) for run in runs if run.fidelity is None)
    return Table(title="Broken", columns=("name", "why"), rows=rows)


def _row(run: Run) -> tuple[str, ...]:
    fidelity = run.fidelity
    assert fidelity is not None  # the caller's
    figures = (
        format_numbers.format_value(row, row.read(fidelity).value) for row in list_run_columns()
    )
    return (
        "*" if run.front else " ",
        run.name,
        fidelity.status,
        fidelity.artifact.format,
        *figures,
    )


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that are artifacts, or began to be: not what lies inside them."""
    for path in sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()
    ):
        if path.name.endswith(SCRATCH):
            continue
        if (
            (path / EVIDENCE_FOLDER).is_dir()
            or path.name.endswith(BUILDING)
            or any(path.glob("*.safetensors"))
        ):
            yield path
        elif depth > 1:
            yield from _candidates(path, depth - 1)


def _run(path: Path, folder: Path) -> Run:
    name = path.relative_to(folder).as_posix()
    if path.name.endswith(BUILDING):
        return Run(name=name, fault="an interrupted build, or one under way")
    try:
        fidelity, manifest = read_sealed_report(path)
    except (ArtifactError, OSError) as fault:
        return Run(name=name, fault=str(fault).splitlines()[0].removeprefix(f"{path}: "))
    if manifest.get("status") != fidelity.status:
        told = json.dumps(manifest.get("status"))
        return Run(
            name=name,
            fault=f"{MANIFEST} says {told}, fidelity.json {fidelity.status}; pull or build it again",
        )
    return Run(name=name, fidelity=fidelity)


def _place(run: Run) -> tuple[int, float] | None:
    kl = read_figure("kl_mean", run.fidelity).value if run.fidelity else None
    return (run.fidelity.artifact.bytes_artifact, kl) if run.fidelity and kl is not None else None


def _group(run: Run) -> str:
    """What KL depends on beside the artifact: the source and the text."""
    if run.fidelity is None:
        return ""
    text = run.fidelity.measured_on
    return (
        f"{run.fidelity.source.hash} {text.sha256} {text.sequences} {text.length}"
        if text
        else run.fidelity.source.hash
    )
