"""Results of `quantkit eval`: results.json and the Parquet files next to it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import stdev

from quantkit.artifact.fidelity_schema import BenchmarkResult
from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate import (
    answer_store,
    broken_answers,
    item_results,
    lm_eval_tasks,
    source_comparison,
    statistics,
    task_runner,
)
from quantkit.evaluate.item_results import ItemPair, ItemResult
from quantkit.evaluate.lm_eval_tasks import LoadedTasks
from quantkit.evaluate.options import EvaluationOptions, describe_settings
from quantkit.evaluate.statistics import Interval
from quantkit.evaluate.target import EvaluationTarget
from quantkit.evaluate.tasks import Task
from quantkit.io.files import read_json, write_json

ANSWERS_FILE = "answers.sqlite"
RESULTS_FILE = "results.json"
ITEMS_FILE = "items.parquet"
PAIRS_FILE = "pairs.parquet"
SHARED_SETTINGS = ("seeds", "temperature", "top_p", "max_tokens", "chat", "think_end")
"""Settings that both sides of a comparison must share."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRuns:
    """Answered items: one run per seed over the same items, and `items` averaged over the seeds.

    `loaded` has the tasks that ran and, in `failed`, those that could not; `backend` is
    describe_backend's; `sandbox` is Sandbox.describe's, None if no task has code; `templates` is
    describe_isolation's.
    """

    runs: tuple[tuple[ItemResult, ...], ...]
    items: tuple[ItemResult, ...]
    loaded: LoadedTasks
    backend: Mapping[str, object]
    sandbox: Mapping[str, str] | None
    templates: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task under one filter: shares in 0 to 1 with a 95 % interval, tokens per answer.

    Score None: not judged.

    The field names are keys of results.json. variant: how answers were read; fault: why the task is
    not valid (`broken_answers`); seed_scores: the score of each seed, empty for one.
    """

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
    variant: str = "plain"
    fault: str = ""
    seed_scores: tuple[float, ...] = ()

    @property
    def noise(self) -> float | None:
        """Standard deviation of the score between seeds; None for fewer than two."""
        return stdev(self.seed_scores) if len(self.seed_scores) > 1 else None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Everything that is written and printed. not_run: task -> reason.

    Document: the content of results.json.
    """

    folder: Path
    task_results: tuple[TaskResult, ...]
    not_run: Mapping[str, str]
    comparison: tuple[BenchmarkResult, ...]
    document: Mapping[str, object]

    @property
    def missing(self) -> tuple[str, ...]:
        """Tasks that could not run, or whose programs could not be judged."""
        unscored = (row.task for row in self.task_results if row.score is None)
        return (*self.not_run, *dict.fromkeys(unscored))

    @property
    def faults(self) -> tuple[str, ...]:
        """Why tasks are not valid: too many answers are cut or have no result."""
        return tuple(dict.fromkeys(row.fault for row in self.task_results if row.fault))


def select_output_folder(name: str, output: Path | None, *, resume: bool) -> Path:
    """Return `output`, else `NAME.eval` next to a model's folder or in the working folder.

    An artifact's folder is sealed, so results never go into it. Raises UsageError if the folder has
    an evaluation already and `resume` is false.
    """
    is_folder = Path(name).is_dir()
    base = Path(name).resolve() if is_folder else Path(re.sub(r"[^\w.-]+", "_", name))
    folder = output or base.with_name(f"{base.name}.eval")
    if not resume and answer_store.has_answers(folder / ANSWERS_FILE):
        raise UsageError(
            f"{folder}: it holds an evaluation already; add --resume to continue it, or name "
            "another --output"
        )
    return folder


def write_results(
    folder: Path,
    target: EvaluationTarget,
    options: EvaluationOptions,
    runs: EvaluationRuns,
    baseline: Sequence[ItemResult] | None,
    baseline_name: str,
) -> EvaluationResult:
    """Write items, items per seed, pairs with a baseline, and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    item_results.write_items(runs.items, folder / ITEMS_FILE)
    if len(runs.runs) > 1:
        for seed, run in enumerate(runs.runs):
            item_results.write_items(run, folder / f"seed-{seed}.parquet")
    pairs: list[ItemPair] = []
    if baseline is not None:
        pairs = pair_common_items(baseline, runs.items)
        if not pairs:
            raise EvaluationError(
                f"{baseline_name}: no item in common; the answers are kept in {folder}"
            )
        item_results.write_pairs(pairs, folder / PAIRS_FILE)
    comparison = tuple(
        source_comparison.make_benchmark_row(task, pairs, source_comparison.DEFAULT_RECOVERY)
        for task in runs.loaded.tasks
        if pairs
    )
    task_results = summarize_tasks(runs, chat=options.decoding.chat)
    not_run = runs.loaded.failed
    document = {
        "version": 1,
        "evaluated": {"name": target.name, "kind": target.kind, "sha256": target.hash},
        "backend": dict(runs.backend),
        "sandbox": runs.sandbox,
        "templates": runs.templates,
        "settings": describe_settings(options),
        "tasks": [task_result_to_json(row) for row in task_results],
        "not_run": dict(not_run),
        "against": baseline_name or None,
        "comparison": [row.model_dump(mode="json") for row in comparison],
        "versions": {name: version(name) for name in ("quantkit", "lm_eval")},
    }
    write_json(folder / RESULTS_FILE, document)
    return EvaluationResult(
        folder=folder,
        task_results=task_results,
        not_run=not_run,
        comparison=comparison,
        document=document,
    )


def pair_common_items(
    baseline: Sequence[ItemResult], candidate: Sequence[ItemResult]
) -> list[ItemPair]:
    """Pair the items that both evaluations have."""
    common = {item.key for item in baseline} & {item.key for item in candidate}
    return item_results.pair_items(
        [item for item in baseline if item.key in common],
        [item for item in candidate if item.key in common],
    )


def read_baseline(
    folder: Path, names: Sequence[str], options: EvaluationOptions
) -> list[ItemResult]:
    """Read the items of an earlier evaluation.

    Raises EvaluationError if its settings differ or if it has none of the tasks `names`, UsageError
    if there is no folder.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--baseline: {folder}: expected the folder of an evaluation, found none; check the "
            "path"
        )
    recorded = read_json(folder / RESULTS_FILE, EvaluationError).get("settings")
    settings = describe_settings(options)
    for name in SHARED_SETTINGS:
        value = recorded.get(name) if isinstance(recorded, dict) else None
        if value != settings[name]:
            raise EvaluationError(
                f"{folder}: {name}: expected {settings[name]!r} as in this evaluation, found "
                f"{value!r}; evaluate both with the same settings"
            )
    items = item_results.read_items(folder / ITEMS_FILE)
    tasks, lm_eval_names, _ = lm_eval_tasks.split_names(names, trusted=options.trusted_code)
    baseline_tasks = dict.fromkeys(item.task for item in items)
    if tasks and not lm_eval_names and not {task.name for task in tasks} & baseline_tasks.keys():
        raise EvaluationError(
            f"{folder}: expected one of the tasks {', '.join(task.name for task in tasks)}, found "
            f"{', '.join(baseline_tasks)}; name one of its tasks with --tasks"
        )
    return items


def summarize_tasks(runs: EvaluationRuns, *, chat: bool = False) -> tuple[TaskResult, ...]:
    """Return one row per task and filter: score and interval over items, rates over all answers."""
    tasks = {task.name: task for task in runs.loaded.tasks}
    answers = [item for run in runs.runs for item in run]
    rates = {(row.task, row.filter): row for row in task_runner.aggregate_scores(answers)}
    groups: dict[tuple[str, str], list[ItemResult]] = {}
    for item in runs.items:
        groups.setdefault((item.task, item.filter), []).append(item)
    rows = (
        summarize_task(tasks[key[0]], items, rates[key], chat=chat) for key, items in groups.items()
    )
    return tuple(
        replace(row, seed_scores=score_seeds(runs.runs, row.task, row.filter)) for row in rows
    )


def score_seeds(
    runs: Sequence[Sequence[ItemResult]], task: str, filter_name: str
) -> tuple[float, ...]:
    """Return the mean score of each seed; empty for one seed and for items without a score."""
    scores = [
        [item.score for item in run if (item.task, item.filter) == (task, filter_name)]
        for run in runs
    ]
    known = [[score for score in seed if score is not None] for seed in scores]
    if len(runs) < 2 or known != scores:
        return ()
    return tuple(sum(seed) / len(seed) for seed in known)


def summarize_task(
    task: Task, items: Sequence[ItemResult], rates: task_runner.TaskScore, *, chat: bool = False
) -> TaskResult:
    """Return the row of one task and filter."""
    scores = [item.score for item in items if item.score is not None]
    is_complete = len(scores) == len(items)
    hashes = "".join(f"{item.doc_hash} {item.prompt_hash} {item.target_hash}\n" for item in items)
    return TaskResult(
        task=task.name,
        domain=task.domain,
        filter=items[0].filter,
        n=len(items),
        score=sum(scores) / len(scores) if is_complete else None,
        interval=statistics.mean_interval(scores) if is_complete else None,
        truncated=rates.truncated,
        unparsed=rates.unparsed,
        n_tokens=rates.n_tokens,
        not_run=rates.not_run,
        task_sha256=task.sha256,
        items_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        variant=task_runner.describe_variant(task, chat=chat),
        fault=broken_answers.describe_broken(
            task.name, rates.n, {"model": (rates.truncated, rates.unparsed)}
        )
        if rates.is_primary  # other filters read answers more strictly
        else "",
    )


def task_result_to_json(row: TaskResult) -> dict[str, object]:
    """Return a row as results.json has it."""
    limits = [row.interval.low, row.interval.high] if row.interval else None
    fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
    return {**fields, "interval": limits, "noise": row.noise}
