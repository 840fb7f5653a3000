"""Benchmarks of a build: source and artifact (read from its files) on the same items.

The source's answers are cached under everything that can change them, so that the second artifact
of a model costs one run. A task that cannot run becomes a row of the report with its reason and
never stops the build.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from quantkit.artifact.fidelity_schema import BenchmarkResult, Figure
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import allows_remote_code
from quantkit.errors import EvaluationError
from quantkit.evaluate import broken_answers, item_results, statistics, task_runner, tasks
from quantkit.evaluate.item_results import ItemPair, ItemResult
from quantkit.evaluate.sandbox import Sandbox
from quantkit.evaluate.tasks import Task
from quantkit.io import user_cache
from quantkit.io.templates import describe_isolation
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.plan.memory import BASE_BYTES, WHOLE_MODEL_COPIES, count_parameters
from quantkit.plan.plan import Plan
from quantkit.plan.sources import ResolvedCompute
from quantkit.progress import Progress, ProgressCallback
from quantkit.texts.corpora import load_tokenizer

BASELINES = "baselines"
"""The folder of the user's cache that keeps the source's answers."""

DEFAULT_RECOVERY = 0.98
"""The share of the source's score that a task must keep for "pass" if the recipe sets no gate."""


@dataclass(frozen=True, kw_only=True)
class SourceComparison:
    """One row per task, and both answers of every item of the tasks that ran.

    conditions: what confined programs and templates, for the report's versions.
    """

    rows: tuple[BenchmarkResult, ...]
    pairs: tuple[ItemPair, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComparisonContext:
    """The tasks and settings with which both models run.

    answers_folder: keeps the answers of an interrupted run.
    """

    plan: Plan
    compute: ResolvedCompute
    tasks: tuple[Task, ...]
    jail: Sandbox
    on_progress: ProgressCallback
    answers_folder: Path | None


def compare_with_source(
    plan: Plan,
    source: Checkpoint,
    folder: Path,
    compute: ResolvedCompute,
    *,
    evaluate: bool,
    on_progress: ProgressCallback,
    answers_folder: Path | None = None,
    trusted_code: Sequence[str] = (),
) -> SourceComparison:
    """Run the recipe's tasks on both models.

    A task that cannot run gets status "not run" and a reason.

    Answers are stored in `answers_folder`, from which an interrupted run continues. trusted_code:
    sha256 of Python files that tasks may run.
    """
    names = plan.recipe.evaluation.tasks
    if not names or not evaluate:
        return make_not_run_rows(names, "skipped by --skip-evaluation")
    if reason := find_memory_reason(plan, compute):
        return make_not_run_rows(names, reason)
    try:
        loaded = tasks.load_tasks(names, trusted=trusted_code)
        context = ComparisonContext(
            plan=plan,
            compute=compute,
            tasks=loaded,
            jail=task_runner.probe_sandbox_for(loaded),
            on_progress=on_progress,
            answers_folder=answers_folder,
        )
        baseline = get_source_items(context, source)
        artifact = Checkpoint.open(folder).split_experts(plan.layout.blocks)
        read = full_model.make_reader(artifact, plan.format_name, plan.schemes)
        candidate = run_model(context, "artifact", read, source)
    except EvaluationError as error:
        return make_not_run_rows(names, str(error))
    pairs = item_results.pair_items(baseline, candidate)
    min_recovery = {
        name: gate.min_recovery
        for name, gate in plan.recipe.gates.items()
        if gate.min_recovery is not None
    }
    return SourceComparison(
        rows=tuple(
            make_benchmark_row(task, pairs, min_recovery.get(task.name, DEFAULT_RECOVERY))
            for task in loaded
        ),
        pairs=tuple(pairs),
        conditions=describe_conditions(context),
    )


def find_memory_reason(plan: Plan, compute: ResolvedCompute) -> str:
    """Return why the whole model does not fit into memory; "" if it does."""
    parameter_bytes = compute.hidden_bytes * count_parameters(plan.layout)
    needed = BASE_BYTES + int(WHOLE_MODEL_COPIES * parameter_bytes)
    if needed <= plan.memory.budget_bytes:
        return ""
    return (
        f"the whole model needs {needed / 1e9:.0f} GB in {compute.dtype}, memory allows "
        f"{plan.memory.budget_bytes / 1e9:.0f} GB"
    )


def describe_conditions(context: ComparisonContext) -> dict[str, str]:
    """Return what confined programs, if a task has them, and templates."""
    conditions = {"templates": describe_isolation()}
    if any(task.code for task in context.tasks):
        conditions["sandbox"] = context.jail.summarize()
    return conditions


def make_not_run_rows(names: Sequence[str], reason: str) -> SourceComparison:
    """Return a row without figures for every task, with the reason."""
    task_names = map(tasks.get_task_name, names)
    return SourceComparison(
        rows=tuple(
            BenchmarkResult(task=name, status="not run", reason=reason) for name in task_names
        )
    )


def get_source_items(context: ComparisonContext, source: Checkpoint) -> list[ItemResult]:
    """Return the source's answers, from the cache if nothing that could change them has changed."""
    key = compute_baseline_key(
        source,
        context.tasks,
        context.plan.recipe.evaluation.limit,
        f"{context.compute.dtype} on {context.compute.device}",
        context.jail,
    )
    cache = user_cache.locate_folder(BASELINES)
    cached = item_results.read_cached_items(cache, key)
    if cached is not None:
        return cached
    items = run_model(context, "source", full_model.make_reader(source), source)
    item_results.write_cached_items(cache, key, items)
    return items


def compute_baseline_key(
    source: Checkpoint, loaded: Sequence[Task], limit: int | None, compute: str, jail: Sandbox
) -> str:
    """Return the cache key of a source's greedy answers. compute: as "float32 on cpu"."""
    versions = {name: version(name) for name in ("quantkit", "torch", "transformers", "lm_eval")}
    return item_results.compute_cache_key(
        source.compute_content_hash(),
        {task.name: task.sha256 for task in loaded},
        limit,
        compute,
        {**versions, "sandbox": jail.summarize()},
    )


def run_model(
    context: ComparisonContext, name: str, read: full_model.TensorReader, source: Checkpoint
) -> list[ItemResult]:
    """Load one whole model, run every item on it, and release it."""
    recipe, compute = context.plan.recipe, context.compute
    device, dtype = torch.device(compute.device), getattr(torch, compute.dtype)
    meta = make_meta_model(context.plan.source.config, device, dtype)
    model = full_model.make_model(meta, context.plan.layout, read)
    own_code = allows_remote_code(recipe.source.trust_remote_code, source.folder)
    answers = context.answers_folder / f"{name}.sqlite" if context.answers_folder else None
    try:
        return task_runner.run_tasks(
            model,
            load_tokenizer(source.folder, trust_remote_code=own_code),
            context.tasks,
            limit=recipe.evaluation.limit,
            batch_size=recipe.evaluation.batch_size,
            jail=context.jail,
            progress=lambda done, total: context.on_progress(
                Progress(stage=f"benchmarks, {name}", done=done, total=total)
            ),
            answers=answers,
        )
    finally:
        del model
        gc.collect()


def make_benchmark_row(
    task: Task, pairs: Sequence[ItemPair], smallest_recovery: float
) -> BenchmarkResult:
    """Return the row of one task, scored by its first filter.

    smallest_recovery: the share of the source's score that the artifact must keep.
    """
    key = (task.name, task.filters[0])
    task_pairs = [pair for pair in pairs if (pair.baseline.task, pair.baseline.filter) == key]
    sides = (
        [pair.baseline for pair in task_pairs],
        [pair.candidate for pair in task_pairs],
    )
    side_scores = [score for side in sides for score in task_runner.aggregate_scores(side)]
    has_unscored = any(item.score is None for side in sides for item in side)
    if has_unscored or len(task_pairs) < 2:
        reason = next((score.not_run for score in reversed(side_scores) if score.not_run), "")
        reason = reason or f"{len(task_pairs)} items are too few to compare"
        return BenchmarkResult(task=task.name, status="not run", reason=reason, n=len(task_pairs))
    source_scores, artifact_scores = ([item.score or 0.0 for item in side] for side in sides)
    rates = {
        side: (score.truncated, score.unparsed)
        for side, score in zip(("source", "artifact"), side_scores, strict=True)
    }
    comparison = statistics.compare_scores(source_scores, artifact_scores, smallest_recovery)
    return BenchmarkResult(
        task=task.name,
        metric=task.filters[0],
        n=comparison.n,
        source=comparison.baseline,
        artifact=comparison.candidate,
        delta_pp=to_percentage_points(comparison.difference),
        recovery=make_recovery_figure(comparison),
        lost=comparison.lost,
        gained=comparison.gained,
        mcnemar_p=comparison.p_value,
        verdict=comparison.text,
        required=comparison.smallest_recovery,
        truncated=(rates["source"][0], rates["artifact"][0]),
        unparsed=(rates["source"][1], rates["artifact"][1]),
        fault=broken_answers.describe_broken(task.name, len(task_pairs), rates),
        data_sha256=task.sha256,
    )


def to_percentage_points(difference: statistics.Difference) -> Figure:
    """Convert a difference of scores to percentage points."""
    interval = difference.interval
    return Figure(
        value=100 * difference.mean,
        se=100 * difference.standard_error,
        ci=(100 * interval.low, 100 * interval.high),
    )


def make_recovery_figure(comparison: statistics.Comparison) -> Figure | None:
    """Return recovery with its interval; None if the source scores zero."""
    interval = comparison.recovery_interval
    if comparison.recovery is None or interval is None:
        return None
    return Figure(value=comparison.recovery, ci=(interval.low, interval.high))
