"""`quantkit eval`: run tasks on a model with any backend; resume by item, compare item by item.

Results go next to the artifact's sealed folder: answers.sqlite, items.parquet, pairs.parquet if
there is a baseline, and results.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import EvaluationError, UnsuitedError, UsageError
from quantkit.evaluate import (
    answer_store,
    item_results,
    lm_eval_tasks,
    sandbox,
    source_comparison,
    task_runner,
)
from quantkit.evaluate.backends import describe_backend, open_backend, select_device_and_dtype
from quantkit.evaluate.chat_answers import read_number_answer
from quantkit.evaluate.item_results import ItemResult
from quantkit.evaluate.lm_eval_tasks import LoadedTasks
from quantkit.evaluate.options import Decoding, EvaluationOptions
from quantkit.evaluate.results import (
    ANSWERS_FILE,
    EvaluationResult,
    EvaluationRuns,
    read_baseline,
    write_results,
)
from quantkit.evaluate.target import EvaluationTarget, resolve_source
from quantkit.io import user_cache
from quantkit.io.templates import describe_isolation
from quantkit.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from quantkit.evaluate.lm_eval_adapter import Backend


def evaluate_target(
    target: EvaluationTarget,
    names: Sequence[str],
    options: EvaluationOptions,
    folder: Path,
    *,
    source: str | None = None,
    baseline: Path | None = None,
    on_progress: ProgressCallback,
) -> EvaluationResult:
    """Run the tasks, compare with a baseline if one is named, and write the results.

    source: the source model to compare with; "" is the one that the manifest names. baseline: the
    folder of an earlier evaluation to compare with. Prompts and targets of both sides are compared
    item by item.
    """
    baseline_items = read_baseline(baseline, names, options) if baseline is not None else None
    source_target = resolve_source(target, source) if source is not None else None
    runs = run_evaluation(target, names, options, folder / ANSWERS_FILE, on_progress)
    baseline_name = baseline.name if baseline else ""
    if source_target is not None:
        baseline_items = run_source(source_target, names, options, on_progress)
        baseline_name = source_target.name
    return write_results(folder, target, options, runs, baseline_items, baseline_name)


def run_evaluation(
    target: EvaluationTarget,
    names: Sequence[str],
    options: EvaluationOptions,
    answers_path: Path,
    on_progress: ProgressCallback,
) -> EvaluationRuns:
    """Run every item of the tasks once per seed.

    Answers are stored in `answers_path` as they arrive.

    Tasks that cannot run are in `loaded.failed` of the result. Raises EvaluationError if no task
    can run at all, UsageError if no task of these names exists.
    """
    options.check()
    tasks, lm_eval_names, failed = lm_eval_tasks.split_names(names, trusted=options.trusted_code)
    with lm_eval_tasks.open_lm_eval_tasks(tasks, lm_eval_names) as opened:
        loaded = replace(opened, failed={**failed, **opened.failed})
        if not loaded.tasks:
            is_known = bool(tasks) or any(map(lm_eval_tasks.is_known_task, loaded.failed))
            message = "\n".join(loaded.failed.values()) or "--tasks: expected a task, found none"
            raise EvaluationError(message) if is_known else UsageError(message)
        with (
            open_backend(target, options) as backend,
            answer_store.open_answer_store(answers_path) as answers,
        ):
            has_code = any(task.code for task in loaded.tasks)
            jail = sandbox.probe_sandbox() if has_code else None
            runs, failed = run_each_task(
                target, loaded, options, backend, answers, jail, on_progress
            )
    if not runs[0]:
        raise EvaluationError("\n".join(failed.values()))
    completed = tuple(task for task in loaded.tasks if task.name not in failed)
    return EvaluationRuns(
        runs=tuple(tuple(run) for run in runs),
        items=tuple(item_results.average_runs(runs)),
        loaded=replace(loaded, tasks=completed, failed=failed),
        backend=describe_backend(target, options),
        sandbox=None if jail is None else jail.describe(),
        templates=describe_isolation(),
    )


def run_each_task(
    target: EvaluationTarget,
    loaded: LoadedTasks,
    options: EvaluationOptions,
    backend: Backend,
    answers: answer_store.AnswerStore,
    jail: sandbox.Sandbox | None,
    on_progress: ProgressCallback,
) -> tuple[list[list[ItemResult]], dict[str, str]]:
    """Run task by task.

    Return the items of each seed's run, and the reason of each task that could not run.
    """
    from quantkit.evaluate.lm_eval_adapter import LMEvalAdapter  # seconds to import

    description = describe_backend(target, options)
    description.pop("endpoint", None)  # the same server may move to another address
    text = json.dumps(description, sort_keys=True, default=str)
    model_key = hashlib.sha256(text.encode()).hexdigest()
    runs: list[list[ItemResult]] = [[] for _ in range(options.seeds)]
    failed = dict(loaded.failed)
    for single in loaded.iterate_tasks():
        task = single.tasks[0].name
        task_runs = []
        try:
            for seed in range(options.seeds):
                options.decoding.apply(single, seed)
                stage = format_stage(target.name, task, seed, options.seeds)
                adapter = LMEvalAdapter(
                    backend,
                    answers,
                    model_key,
                    make_answer_callback(on_progress, stage),
                    options.decoding.think_end,
                    make_readers(single) if options.decoding.chat else None,
                )
                task_runs.append(
                    task_runner.run_loaded_tasks(
                        adapter,
                        single,
                        limit=options.limit,
                        chat=options.decoding.chat,
                        jail=jail,
                    )
                )
        except UnsuitedError as error:
            failed[task] = str(error)
        else:
            for run, items in zip(runs, task_runs, strict=True):
                run += items
    return runs, failed


def make_readers(loaded: LoadedTasks) -> dict[str, Callable[[str], str]]:
    """Return the readers of chat answers by task; none for tasks that take answers as they are."""
    return {task.name: read_number_answer for task in loaded.tasks if task.chat == "number"}


def format_stage(model: str, task: str, seed: int, seeds: int) -> str:
    """Return the name of a stage that progress reports show."""
    return f"{model}, {task}" + (f", seed {seed + 1} of {seeds}" if seeds > 1 else "")


def make_answer_callback(on_progress: ProgressCallback, stage: str) -> Callable[[int, int], None]:
    """Return a callback that reports numbers of answers as progress of a stage."""
    return lambda done, total: on_progress(Progress(stage=stage, done=done, total=total))


def run_source(
    target: EvaluationTarget,
    names: Sequence[str],
    options: EvaluationOptions,
    on_progress: ProgressCallback,
) -> list[ItemResult]:
    """Return a source's items, from the user's cache if the settings are those of a build.

    The answers of a run are stored in the cache as well, in a file of their own.
    """
    tasks, lm_eval_names, failed = lm_eval_tasks.split_names(names, trusted=options.trusted_code)
    is_cacheable = (
        options.decoding == Decoding()
        and options.seeds == 1
        and not (lm_eval_names or failed or options.native)
    )
    cache = user_cache.locate_folder(source_comparison.BASELINES)
    key = ""
    if is_cacheable and target.folder is not None:
        jail = task_runner.probe_sandbox_for(tasks)
        device, dtype = select_device_and_dtype(options)
        key = source_comparison.compute_baseline_key(
            Checkpoint.open(target.folder), tasks, options.limit, f"{dtype} on {device}", jail
        )
        cached = item_results.read_cached_items(cache, key)
        if cached is not None:
            return cached
    answers_path = cache / f"{target.hash[:16]}.sqlite"
    items = [*run_evaluation(target, names, options, answers_path, on_progress).items]
    if key:
        item_results.write_cached_items(cache, key, items)
    return items
