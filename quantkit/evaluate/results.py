"""What an evaluation leaves behind: results.json and Parquet files, and the tables that are printed of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from quantkit.artifact.fidelity_schema import BenchmarkResult
from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate import answer_store, benchmarks, compare, harness, samples, statistics
from quantkit.evaluate.evaluation import (
    JOURNAL,
    Asked,
    Setup,
    Subject,
    run_evaluation,
    run_source,
    settings,
    source_of,
)
from quantkit.evaluate.samples import ItemPair, ItemResult
from quantkit.evaluate.statistics import Interval
from quantkit.evaluate.tasks import Task
from quantkit.io.files import read_json, write_json
from quantkit.progress import ProgressCallback

RESULTS_FILE = "results.json"
ITEMS_FILE = "items.parquet"
PAIRS_FILE = "pairs.parquet"
SHARED_SETTINGS = ("seeds", "temperature", "top_p", "max_tokens", "chat", "think_end")
"""Settings that both sides of a comparison must share."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task under one filter: shares in 0 to 1 with a 95 % interval, tokens per answer; score None: not judged."""

    task: str
    domain: str
    filter: str
    n: int
    score: float | None
    interval: Interval | None
    truncated: float
    unparsed: float
    n_tokens: float
    not_run: str
    task_sha256: str
    items_sha256: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Everything that is written and shown."""

    folder: Path
    scores: tuple[TaskResult, ...]
    not_run: Mapping[str, str]
    rows: tuple[BenchmarkResult, ...]
    told: Mapping[str, object]

    @property
    def missing(self) -> tuple[str, ...]:
        """Tasks without a score: those that could not be asked, and those whose programs could not be run."""
        return (*self.not_run, *dict.fromkeys(row.task for row in self.scores if row.score is None))


def evaluate(
    who: Subject,
    names: Sequence[str],
    setup: Setup,
    folder: Path,
    *,
    source: str | None = None,
    baseline: Path | None = None,
    tell: ProgressCallback,
) -> EvaluationResult:
    """Ask, compare and write. source: "" compares with the source the manifest names, else the model of that name.

    baseline: the folder of an earlier evaluation to compare with. What both sides were asked is checked item by item.
    """
    earlier = read_baseline(baseline, names, setup) if baseline is not None else None
    origin = source_of(who, source) if source is not None else None
    asked = run_evaluation(who, names, setup, folder / JOURNAL, tell)
    if origin is not None:
        earlier = run_source(origin, names, setup, tell)
    return write_results(
        folder,
        who,
        setup,
        asked,
        earlier,
        origin.name if origin else baseline.name if baseline else "",
    )


def select_output_folder(name: str, given: Path | None, *, resume: bool) -> Path:
    """Where results go: the folder given, else `NAME.eval` beside a folder, or here for a model from elsewhere.

    UsageError when an evaluation is there that is not to be resumed.
    """
    beside = Path(name).resolve() if Path(name).is_dir() else Path(re.sub(r"[^\w.-]+", "_", name))
    folder = given or beside.with_name(f"{beside.name}.eval")
    if not resume and answer_store.has_answers(folder / JOURNAL):
        raise UsageError(
            f"{folder}: it holds an evaluation already; add --resume to go on with it, or name another --output"
        )
    return folder


def write_results(
    folder: Path,
    who: Subject,
    setup: Setup,
    asked: Asked,
    source: Sequence[ItemResult] | None,
    against: str,
) -> EvaluationResult:
    """Parquet per item, per seed where there are several, pairs where there is a baseline, and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    samples.to_parquet(asked.items, folder / ITEMS_FILE)
    if len(asked.runs) > 1:
        for seed, run in enumerate(asked.runs):
            samples.to_parquet(run, folder / f"seed-{seed}.parquet")
    pairs: list[ItemPair] = []
    if source is not None:
        theirs, mine = {item.key for item in source}, {item.key for item in asked.items}
        common = [
            [item for item in side if item.key in theirs & mine] for side in (source, asked.items)
        ]
        if not common[0]:
            raise EvaluationError(f"{against}: no item in common; what was asked lies in {folder}")
        pairs = samples.pair(*common)
        samples.pairs_to_parquet(pairs, folder / PAIRS_FILE)
    rows = tuple(
        compare.row(task, pairs, compare.DEFAULT_RECOVERY) for task in asked.opened.tasks if pairs
    )
    scores = summarize_tasks(asked)
    told = {
        "version": 1,
        "evaluated": {"name": who.name, "kind": who.kind, "sha256": who.hash},
        "backend": dict(asked.backend),
        "settings": settings(setup),
        "tasks": [task_result_to_json(each) for each in scores],
        "not_run": dict(asked.opened.failed),
        "against": against or None,
        "comparison": [row.model_dump(mode="json") for row in rows],
        "versions": {name: version(name) for name in ("quantkit", "lm_eval")},
    }
    write_json(folder / RESULTS_FILE, told)
    return EvaluationResult(
        folder=folder, scores=scores, not_run=asked.opened.failed, rows=rows, told=told
    )


def read_baseline(folder: Path, names: Sequence[str], setup: Setup) -> list[ItemResult]:
    """The items of an earlier evaluation; EvaluationError when it was asked in another way, or nothing of `names`."""
    if not folder.is_dir():
        raise UsageError(
            f"--baseline: {folder}: expected the folder of an evaluation, found none; check the path"
        )
    told = read_json(folder / RESULTS_FILE, EvaluationError)
    theirs, mine = told.get("settings"), settings(setup)
    for name in SHARED_SETTINGS:
        found = theirs.get(name) if isinstance(theirs, dict) else None
        if found != mine[name]:
            raise EvaluationError(
                f"{folder}: {name}: expected {mine[name]!r} as here, found {found!r}; evaluate both in the same way"
            )
    items = samples.from_parquet(folder / ITEMS_FILE)
    own, others, _ = harness.split(names)
    asked = dict.fromkeys(item.task for item in items)
    if own and not others and not {task.name for task in own} & asked.keys():
        raise EvaluationError(
            f"{folder}: expected one of the tasks {', '.join(task.name for task in own)}, found {', '.join(asked)}; "
            "name a task that it has with --tasks"
        )
    return items


def summarize_tasks(asked: Asked) -> tuple[TaskResult, ...]:
    """A row per task and filter: score and interval over items, rates over all answers."""
    by_name = {task.name: task for task in asked.opened.tasks}
    rates = {
        (row.task, row.filter): row
        for row in benchmarks.scores([item for run in asked.runs for item in run])
    }
    groups: dict[tuple[str, str], list[ItemResult]] = {}
    for item in asked.items:
        groups.setdefault((item.task, item.filter), []).append(item)
    return tuple(
        summarize_task(by_name[name[0]], items, rates[name]) for name, items in groups.items()
    )


def summarize_task(
    task: Task, items: Sequence[ItemResult], rates: benchmarks.TaskScore
) -> TaskResult:
    """The row of one task and filter."""
    known = [item.score for item in items if item.score is not None]
    complete = len(known) == len(items)
    hashes = "".join(f"{item.doc_hash} {item.prompt_hash} {item.target_hash}\n" for item in items)
    return TaskResult(
        task=task.name, domain=task.domain, filter=items[0].filter, n=len(items),
        score=sum(known) / len(known) if complete else None,
        interval=statistics.mean_interval(known) if complete else None,
        truncated=rates.truncated, unparsed=rates.unparsed, n_tokens=rates.n_tokens, not_run=rates.not_run,
        task_sha256=task.sha256, items_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )  # fmt: skip


def task_result_to_json(row: TaskResult) -> dict[str, object]:
    """A row as results.json has it."""
    both = [row.interval.low, row.interval.high] if row.interval else None
    return {**{name: getattr(row, name) for name in row.__dataclass_fields__}, "interval": both}
