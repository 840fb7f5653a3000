"""Source and artifact on the same benchmark items, the artifact as read back from its files.

The source's answers are kept in a cache under everything that can change them, so that the second artifact of a model
costs one run. Whatever keeps a task from running is a row of the report and never stops the artifact.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from quantkit.artifact.fidelity_schema import BenchmarkResult, Figure
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import allows_remote_code
from quantkit.errors import EvaluationError
from quantkit.evaluate import benchmarks, samples, statistics, tasks
from quantkit.evaluate.samples import ItemPair, ItemResult
from quantkit.evaluate.sandbox import sandbox
from quantkit.evaluate.tasks import Task
from quantkit.io import user_cache
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.plan.memory import BASE_BYTES
from quantkit.plan.plan import Plan
from quantkit.plan.sources import ResolvedCompute
from quantkit.progress import Progress, ProgressCallback
from quantkit.texts.corpora import load_tokenizer

BASELINES = "baselines"
"""The folder of the user's cache that keeps the source's answers."""

WHOLE_MODEL_COPIES = 1.7
"""Peak over size of a model that is assembled in memory: its largest stacked tensors exist twice for a moment."""

DEFAULT_RECOVERY = 0.98
"""The share of the source's score a task must keep for "pass" when the recipe sets no gate of its own."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row per task, and both answers of every item of the tasks that ran."""

    rows: tuple[BenchmarkResult, ...]
    pairs: tuple[ItemPair, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both models are asked, and in which way."""

    plan: Plan
    compute: ResolvedCompute
    tasks: tuple[Task, ...]
    jail: sandbox.Sandbox
    tell: ProgressCallback
    kept: Path | None  # folder of the answers that an interrupted run got


def compare(
    plan: Plan,
    source: Checkpoint,
    folder: Path,
    compute: ResolvedCompute,
    *,
    evaluate: bool,
    tell: ProgressCallback,
    kept: Path | None = None,
) -> Compared:
    """Run the recipe's tasks on both models; rows with status "not run" and a reason where that cannot be.

    Answers go to files in `kept`, where a run that was interrupted finds them again.
    """
    names = plan.recipe.evaluation.tasks
    if not names or not evaluate:
        return not_run(names, "skipped by --skip-evaluation")
    needed = BASE_BYTES + int(
        WHOLE_MODEL_COPIES * compute.hidden_bytes * full_model.count_parameters(plan.layout)
    )
    if needed > plan.memory.budget_bytes:
        return not_run(
            names,
            f"the whole model needs {needed / 1e9:.0f} GB in {compute.dtype}, memory allows "
            f"{plan.memory.budget_bytes / 1e9:.0f} GB",
        )
    try:
        loaded = tasks.load_tasks(names)
        jail = benchmarks.jail_for(loaded)
        job = Job(plan=plan, compute=compute, tasks=loaded, jail=jail, tell=tell, kept=kept)
        baseline = source_items(job, source)
        stored = full_model.make_reader(Checkpoint.open(folder), plan.format_name, plan.schemes)
        candidate = answers(job, "artifact", stored, source)
    except EvaluationError as error:
        return not_run(names, str(error))
    pairs = samples.pair(baseline, candidate)
    gates = plan.recipe.gates
    wanted = {
        name: gate.min_recovery for name, gate in gates.items() if gate.min_recovery is not None
    }
    return Compared(
        rows=tuple(row(task, pairs, wanted.get(task.name, DEFAULT_RECOVERY)) for task in loaded),
        pairs=tuple(pairs),
    )


def not_run(names: Sequence[str], reason: str) -> Compared:
    """Every task with the reason why it has no figures."""
    called = map(tasks.get_task_name, names)
    return Compared(
        rows=tuple(BenchmarkResult(task=name, status="not run", reason=reason) for name in called)
    )


def source_items(job: Job, source: Checkpoint) -> list[ItemResult]:
    """The source's answers, from the cache when nothing that could change them has changed."""
    where = f"{job.compute.dtype} on {job.compute.device}"
    key = baseline_key(source, job.tasks, job.plan.recipe.evaluation.limit, where, job.jail)
    cached = samples.read_cached(user_cache.locate_folder(BASELINES), key)
    if cached is not None:
        return cached
    items = answers(job, "source", full_model.make_reader(source), source)
    samples.write_cached(user_cache.locate_folder(BASELINES), key, items)
    return items


def baseline_key(
    source: Checkpoint, asked: Sequence[Task], limit: int | None, where: str, jail: sandbox.Sandbox
) -> str:
    """The name of a source's greedy answers in the cache. where: "float32 on cpu", what changes the sums."""
    versions = {name: version(name) for name in ("quantkit", "torch", "transformers", "lm_eval")}
    return samples.cache_key(
        source.content_hash(),
        {task.name: task.sha256 for task in asked},
        limit,
        where,
        {**versions, "sandbox": f"{jail.kind} {jail.python}"},
    )


def answers(
    job: Job, name: str, read: full_model.TensorReader, source: Checkpoint
) -> list[ItemResult]:
    """Load one model whole, let it answer every item, and let go of it."""
    device, dtype = torch.device(job.compute.device), getattr(torch, job.compute.dtype)
    model = full_model.make_model(
        make_meta_model(job.plan.source.config, device, dtype), job.plan.layout, read
    )
    try:
        return benchmarks.run(
            model,
            load_tokenizer(
                source.folder,
                own_code=allows_remote_code(
                    job.plan.recipe.source.trust_remote_code, source.folder
                ),
            ),
            job.tasks,
            limit=job.plan.recipe.evaluation.limit,
            batch_size=job.plan.recipe.evaluation.batch_size,
            sandbox=job.jail,
            progress=lambda done, total: job.tell(
                Progress(stage=f"benchmarks, {name}", done=done, total=total)
            ),
            answers=job.kept / f"{name}.sqlite" if job.kept else None,
        )
    finally:
        del model
        gc.collect()


def row(task: Task, pairs: Sequence[ItemPair], smallest_recovery: float) -> BenchmarkResult:
    """The row of one task, scored by its first filter; smallest_recovery: the share of the source's score to keep."""
    mine = [
        pair
        for pair in pairs
        if pair.baseline.task == task.name and pair.baseline.filter == task.filters[0]
    ]
    sides = [[pair.baseline for pair in mine], [pair.candidate for pair in mine]]
    told = [score for side in sides for score in benchmarks.scores(side)]
    unscored = [
        pair for pair in mine if pair.baseline.score is None or pair.candidate.score is None
    ]
    if unscored or len(mine) < 2:
        reason = next((score.not_run for score in reversed(told) if score.not_run), "")
        reason = reason or f"{len(mine)} items are too few to compare"
        return BenchmarkResult(task=task.name, status="not run", reason=reason, n=len(mine))
    found = statistics.compare_scores(
        [pair.baseline.score or 0.0 for pair in mine],
        [pair.candidate.score or 0.0 for pair in mine],
        smallest_recovery,
    )
    return BenchmarkResult(
        task=task.name,
        metric=task.filters[0],
        n=found.n,
        source=found.baseline,
        artifact=found.candidate,
        delta_pp=points(found.difference),
        recovery=share(found),
        lost=found.lost,
        gained=found.gained,
        mcnemar_p=found.p_value,
        verdict=found.text,
        truncated=(told[0].truncated, told[1].truncated),
        unparsed=(told[0].unparsed, told[1].unparsed),
        data_sha256=task.sha256,
    )


def points(difference: statistics.Difference) -> Figure:
    """A difference of scores in percentage points."""
    interval = difference.interval
    return Figure(
        value=100 * difference.mean,
        se=100 * difference.standard_error,
        ci=(100 * interval.low, 100 * interval.high),
    )


def share(found: statistics.Comparison) -> Figure | None:
    """Recovery with its interval; None when the source scores nothing."""
    if found.recovery is None or found.recovery_interval is None:
        return None
    return Figure(
        value=found.recovery, ci=(found.recovery_interval.low, found.recovery_interval.high)
    )
