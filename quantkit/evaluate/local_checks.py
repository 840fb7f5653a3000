"""Checks of a plan on the machine that has the model: transformers' model, token ids, room on the
disk, benchmarks that cannot run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantkit.build.disk_space import describe_disk_shortage
from quantkit.errors import ArtifactError, EvaluationError, UntrustedCode
from quantkit.evaluate import source_comparison, task_runner, tasks
from quantkit.plan.check_model import check_model, check_token_ids
from quantkit.plan.measurements import count_solutions
from quantkit.plan.plan import Plan, TextUse, plan_build_memory
from quantkit.plan.read_texts import read_texts
from quantkit.plan.sources import resolve_compute


def check_local(plans: Sequence[Plan], folder: Path) -> tuple[Plan, ...]:
    """Return the plans of a model in `folder` with warnings about a build on this machine.

    Raises the errors that would end the build.
    """
    check_model(plans[0])
    texts = read_texts(plans[0].recipe, folder)
    check_token_ids(plans[0], texts.largest_ids)
    plans = [count_tokens(plan, texts.tokens) for plan in plans]
    notes = [*texts.notes, *describe_benchmarks(plans[0])]
    if shortage := describe_disk_shortage(plans):
        notes.append(shortage)
    return add_warnings(plans, notes)


def count_tokens(plan: Plan, counts: Mapping[TextUse, int]) -> Plan:
    """Return the plan with the counted tokens of its texts, and the scratch disk that they need.

    Nothing changes for a text that was not tokenized.
    """
    if not counts:
        return plan
    solutions = {use: count_solutions(plan, use) for use in counts}
    tokens = {**plan.tokens, **{use: n + solutions[use] for use, n in counts.items()}}
    memory = plan_build_memory(
        plan.recipe,
        plan.layout,
        plan.decisions,
        budget_bytes=plan.memory.budget_bytes,
        tokens=tokens,
        hidden_bytes=resolve_compute(plan.recipe).hidden_bytes,
    )
    return replace(plan, tokens=tokens, text_tokens=dict(counts), memory=memory)


def check_before_build(
    plans: Sequence[Plan], largest_ids: Sequence[int], trusted_code: Sequence[str] | None
) -> tuple[Plan, ...]:
    """Return the plans with their warnings; raises the errors that would end the build later.

    largest_ids: the largest token id of each text. trusted_code: None without benchmarks.
    """
    check_model(plans[0])
    check_token_ids(plans[0], largest_ids)
    if shortage := describe_disk_shortage(plans):
        raise ArtifactError(shortage)
    if trusted_code is None:
        return tuple(plans)
    return add_warnings(plans, describe_benchmarks(plans[0], trusted_code))


def add_warnings(plans: Sequence[Plan], notes: Sequence[str]) -> tuple[Plan, ...]:
    """Return the plans with more warnings."""
    return tuple(replace(plan, warnings=(*plan.warnings, *notes)) for plan in plans)


def describe_benchmarks(plan: Plan, trusted_code: Sequence[str] = ()) -> tuple[str, ...]:
    """Return why the benchmarks of a recipe would not run on this machine."""
    names = plan.recipe.evaluation.tasks
    if not names:
        return ()
    reason = source_comparison.find_memory_reason(plan, resolve_compute(plan.recipe))
    if not reason:
        try:
            task_runner.probe_sandbox_for(tasks.load_tasks(names, trusted=trusted_code))
        except UntrustedCode as error:
            return (str(error),)
        except EvaluationError as error:
            reason = str(error)
    return (f"benchmarks will not run: {reason}",) if reason else ()
