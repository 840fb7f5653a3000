"""Whether the prompts of benchmarks appear in the calibration text of a build."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.artifact.fidelity_schema import TaskOverlap
from quantkit.errors import EvaluationError
from quantkit.evaluate import tasks
from quantkit.evaluate.tasks import Task, render_field
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts import task_files
from quantkit.texts.overlap import TextRuns, count_overlaps

MAX_ITEMS = 20_000
"""Items of a task that are checked."""
NO_LOCAL_DATA = "its data is not on this machine"
NO_TEMPLATE = "its prompts are not text of a template"


def check_overlaps(
    names: Sequence[str], texts: Sequence[str], trusted_code: Sequence[str] = ()
) -> tuple[TaskOverlap, ...]:
    """Count the prompts of each task that appear in `texts`, of the shipped tasks, too.

    names: tasks of the recipe; a task that cannot be checked has the reason. A shipped task that
    the recipe does not name and whose data is not on this machine is left out.
    """
    runs, rows = TextRuns(texts), list[TaskOverlap]()
    with TemplateWorker() as worker:
        for name in dict.fromkeys([*names, *task_files.list_task_names()]):
            row = _check_task(name, runs, worker, trusted_code)
            if row.items or name in names:
                rows.append(row)
    return tuple(rows)


def _check_task(
    name: str, runs: TextRuns, worker: TemplateWorker, trusted_code: Sequence[str]
) -> TaskOverlap:
    short = tasks.get_task_name(name)
    try:
        (task,) = tasks.load_tasks([name], trusted=trusted_code)
        prompts = _render_questions(task, worker)
    except EvaluationError as error:
        return TaskOverlap(task=short, reason=str(error))
    except TemplateFault as fault:
        return TaskOverlap(task=short, reason=str(fault))
    if isinstance(prompts, str):
        return TaskOverlap(task=short, reason=prompts)
    return TaskOverlap(task=short, items=len(prompts), overlapping=count_overlaps(runs, prompts))


def _render_questions(task: Task, worker: TemplateWorker) -> list[str] | str:
    """Return the question of every item, without worked examples; or why there are none."""
    file = task.files.get(str(task.config.get("test_split")))
    template = task.config.get("doc_to_text")
    if file is None:
        return NO_LOCAL_DATA
    if task.python or not isinstance(template, str):
        return NO_TEMPLATE
    rows = task_files.read_first_rows(file.path, file.rows, MAX_ITEMS)
    where = f"{task.name}: doc_to_text"
    return [str(render_field(worker, where, template, row)) for row in rows]
