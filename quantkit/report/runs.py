"""The artifacts of a folder: key figures, Pareto front of size and KL, broken artifacts.

KL is comparable only between artifacts of one source measured on one text, so each such group has
its own front.
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
from quantkit.report.table import Table
from quantkit.report.verdict import count_unproven, format_status

NOT_SHOWN = "bits_per_weight"
"""Figure that `runs` has in JSON and for sorting only: a line has 100 characters."""
DEPTH = 3  # levels of folders that are searched
BUILDING, SCRATCH = ".building", ".scratch"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One artifact; `fault` is the reason if it has no figures."""

    name: str  # path relative to the listed folder
    fidelity: Fidelity | None = None
    fault: str = ""
    front: bool = False  # on the Pareto front of its group

    def values(self) -> dict[str, object]:
        """Return the key figures by column name; None for a figure that was not measured."""
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
            "ci": {
                row.run_column: reading.ci
                for row in list_run_columns()
                if (reading := row.read(self.fidelity)).ci is not None
            },
            "engines": [row.engine for row in artifact.serving],
            "gates_not_proven": count_unproven(self.fidelity),
            "front": self.front,
            "fault": "",
        }


TEXT_COLUMNS = ("name", "status", "source", "format")


def list_run_columns() -> tuple[FigureDefinition, ...]:
    """Return the figures that are columns of `quantkit runs`."""
    return tuple(row for row in list_headline_figures() if row.run_column)


def read_runs(folder: Path) -> list[Run]:
    """Return every artifact up to DEPTH levels deep, by name; broken ones with their reason."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder of artifacts, found none; check the path")
    if (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: expected a folder of artifacts, found an artifact; name its parent folder"
        )
    runs = [_read_run(path, folder) for path in _iterate_candidates(folder, DEPTH)]
    return mark_front(sorted(runs, key=lambda run: run.name))


def sort_runs(runs: Sequence[Run], column: str, *, reverse: bool = False) -> list[Run]:
    """Sort by a column: the best first, then runs without the figure, then broken ones.

    Raises UsageError for an unknown column.
    """
    tasks, figures = list_tasks(runs), {row.run_column: row for row in list_run_columns()}
    columns = (*TEXT_COLUMNS, *figures, *tasks)
    if column not in columns:
        raise UsageError(f"--sort: {format_unknown_name('column', column, columns)}")

    def get_value(run: Run) -> object:
        values = run.values()
        scores = values.get("tasks")
        if column in tasks and isinstance(scores, dict):
            return scores.get(column)
        return values.get(column)

    rows = [(get_value(run), run) for run in runs]
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
    """Mark the Pareto front of each group: no other run is both smaller and closer to the
    source."""
    points: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        if (point := locate_run(run)) is not None:
            points.setdefault(find_group(run), []).append(point)
    return [
        replace(
            run,
            front=is_on_front(point, points[find_group(run)])
            if (point := locate_run(run))
            else False,
        )
        for run in runs
    ]


def is_on_front(point: tuple[int, float], others: Sequence[tuple[int, float]]) -> bool:
    """Return whether no other point is at least as small and as close, and better in one of
    both."""
    size, kl = point
    return not any(s <= size and k <= kl and (s, k) != point for s, k in others)


def list_tasks(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the benchmarks of all runs."""
    names = (row.task for run in runs if run.fidelity for row in run.fidelity.benchmarks)
    return tuple(dict.fromkeys(names))


def make_run_table(runs: Sequence[Run]) -> Table:
    """Return the runs with their figures; "*" marks the front."""
    sources = {find_group(run) for run in runs if run.fidelity}
    rows = tuple(_make_row(run) for run in runs if run.fidelity)
    headings = (f">{row.run_heading}" for row in list_run_columns() if row.key != NOT_SHOWN)
    columns = (" ", "name", "status", "format", ">smaller", *headings)
    note = "* Pareto front of size and mean KL among artifacts of one source and text."
    note += (
        f" {len(sources)} sources or texts: KL is not comparable between them."
        if len(sources) > 1
        else ""
    )
    return Table(title="Artifacts", columns=columns, rows=rows, note=note if rows else "")


def make_score_table(runs: Sequence[Run]) -> Table:
    """Return the scores by benchmark, with the number of items and the recovery."""
    tasks, rows = list_tasks(runs), list[tuple[str, ...]]()
    for run in runs:
        results = {row.task: row for row in run.fidelity.benchmarks} if run.fidelity else {}
        if results:
            rows.append((run.name, *(_format_score(results.get(task)) for task in tasks)))
    columns = ("name", *(f">{task}" for task in tasks))
    mixed = [task for task in tasks if len(_list_item_sets(runs, task)) > 1]
    note = "Score on the number of items (recovery: share of the source's score)."
    note += f" Not comparable, because items differ: {', '.join(mixed)}." if mixed else ""
    return Table(title="Benchmarks", columns=columns, rows=tuple(rows), note=note if rows else "")


def _format_score(row: BenchmarkResult | None) -> str:
    """Return "81.3 % of 300 (98.79 %)"."""
    if row is None or row.artifact is None:
        return format_numbers.MISSING
    kept = f" ({format_numbers.format_percent(row.recovery.value)})" if row.recovery else ""
    return f"{format_numbers.format_percent(row.artifact, 1)} of {row.n:,}{kept}"


def _list_item_sets(runs: Sequence[Run], task: str) -> set[tuple[str, int, str]]:
    """Return the different sets of items of a task: data, number of items, scoring filter."""
    rows = (
        row for run in runs if run.fidelity for row in run.fidelity.benchmarks if row.task == task
    )
    return {(row.data_sha256, row.n, row.metric) for row in rows if row.artifact is not None}


def make_fault_table(runs: Sequence[Run]) -> Table:
    """Return the broken artifacts with their reasons."""
    rows = tuple((run.name, run.fault) for run in runs if run.fidelity is None)
    return Table(title="Broken", columns=("name", "reason"), rows=rows)


def _make_row(run: Run) -> tuple[str, ...]:
    fidelity = run.fidelity
    assert fidelity is not None  # checked by the caller
    sizes = fidelity.artifact
    figures = (
        format_numbers.format_value(row, row.read(fidelity).value)
        for row in list_run_columns()
        if row.key != NOT_SHOWN
    )
    return (
        "*" if run.front else " ",
        run.name,
        format_status(fidelity),
        fidelity.artifact.format,
        f"{sizes.bytes_source / sizes.bytes_artifact:.2f}x"
        if sizes.bytes_source and sizes.bytes_artifact
        else format_numbers.MISSING,
        *figures,
    )


def _iterate_candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of artifacts and of unfinished builds, not the folders inside them."""
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
            yield from _iterate_candidates(path, depth - 1)


def _read_run(path: Path, folder: Path) -> Run:
    name = path.relative_to(folder).as_posix()
    if path.name.endswith(BUILDING):
        return Run(name=name, fault="an interrupted build, or one in progress")
    try:
        fidelity, manifest = read_sealed_report(path)
    except (ArtifactError, OSError) as fault:
        return Run(name=name, fault=str(fault).splitlines()[0].removeprefix(f"{path}: "))
    if manifest.get("status") != fidelity.status:
        expected = json.dumps(manifest.get("status"))
        return Run(
            name=name,
            fault=f"{MANIFEST} says {expected}, fidelity.json {fidelity.status}; pull or "
            f"build it again",
        )
    return Run(name=name, fidelity=fidelity)


def locate_run(run: Run) -> tuple[int, float] | None:
    """Return size in bytes and mean KL of an artifact; None without KL."""
    kl = read_figure("kl_mean", run.fidelity).value if run.fidelity else None
    return (run.fidelity.artifact.bytes_artifact, kl) if run.fidelity and kl is not None else None


def find_group(run: Run) -> str:
    """Return what KL depends on besides the artifact: the source and the text."""
    if run.fidelity is None:
        return ""
    text = run.fidelity.measured_on
    return (
        f"{run.fidelity.source.hash} {text.sha256} {text.sequences} {text.length}"
        if text
        else run.fidelity.source.hash
    )
