"""lm-eval's tasks by name: the tasks of evals/, task sets, and any other task that lm-eval has.

Each task loads, or fails with a reason. Tasks of evals/ come first: their data may be local files,
and their code runs in the sandbox. lm-eval's own tasks read their data from the hub; those that
would run generated code outside the sandbox are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.evaluate import tasks
from quantkit.evaluate.task_schema import DATA_VARIABLE
from quantkit.evaluate.tasks import Task, open_task_data
from quantkit.io.files import is_file
from quantkit.io.templates import TemplateWorker
from quantkit.texts import task_files
from quantkit.texts.hub_data import bound_data_set, find_bound_fault

TASK_SETS: Mapping[str, tuple[str, ...]] = {
    "math": ("gsm8k", "minerva_math", "mgsm_native_cot_*"),
    "code": ("humaneval", "mbpp"),
    "general": (
        # STEM
        "mmlu_college_computer_science",
        "mmlu_college_mathematics",
        "mmlu_conceptual_physics",
        # humanities
        "mmlu_formal_logic",
        "mmlu_philosophy",
        "mmlu_world_religions",
        # social sciences
        "mmlu_econometrics",
        "mmlu_high_school_geography",
        "mmlu_sociology",
        # other
        "mmlu_clinical_knowledge",
        "mmlu_global_facts",
        "mmlu_marketing",
    ),
}
"""Task sets: names of tasks, or patterns of names."""

_FEWSHOT_SEED = 1234  # lm-eval's own; the tasks that ship with quantkit sample no examples
_LOGGERS = (
    "lm_eval",
    "huggingface_hub.utils._http",
    "datasets",
    "transformers.tokenization_utils_base",
)
_SHORTCUTS = {"mgsm": "mgsm_native_cot_*"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTasks:
    """Tasks that can run, for the report and as lm-eval has them; `failed`: name -> reason."""

    tasks: tuple[Task, ...]
    lm_eval_tasks: Mapping[str, Any]
    failed: Mapping[str, str]

    def iterate_tasks(self) -> Iterator[LoadedTasks]:
        """Yield the tasks one by one, so that a task that cannot run stops no other."""
        for task in self.tasks:
            lm_eval_task = {task.name: self.lm_eval_tasks[task.name]}
            yield LoadedTasks(tasks=(task,), lm_eval_tasks=lm_eval_task, failed={})


def expand_names(names: Sequence[str]) -> list[str]:
    """Replace task sets by their members; each name once."""
    members = [
        member for name in names for member in TASK_SETS.get(name, (_SHORTCUTS.get(name, name),))
    ]
    return list(dict.fromkeys(members))


@contextmanager
def open_lm_eval_tasks(
    own_tasks: Sequence[Task], names: Sequence[str] = ()
) -> Iterator[LoadedTasks]:
    """Load checked tasks (tasks.load_tasks) and lm-eval's own by name or pattern, silently.

    Nothing connects to a network unless data has to be fetched. lm-eval reads the data of its tasks
    while it loads them. Templates of task files are rendered in one process per task, which ends
    with this context.
    """
    from quantkit.evaluate.bounded_task import make_lm_eval_task  # imports lm-eval: seconds

    offline = not names and all(task.is_local for task in own_tasks)
    with _silence(offline=offline), open_task_data(own_tasks) as data, ExitStack() as workers:
        described: dict[str, Task] = {}
        loaded: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for task in own_tasks:
            worker = workers.enter_context(TemplateWorker())
            try:
                with nullcontext() if task.is_local else bound_data_set():
                    loaded[task.name] = make_lm_eval_task(task, data[task.name], worker)
            except EvaluationError as error:
                failed[task.name] = str(error)
            # lm-eval and datasets raise a dozen unrelated types
            except Exception as error:  # noqa: BLE001
                is_remote = not task.is_local
                failed[task.name] = _format_failure(task.name, error, hub=is_remote, own=True)
            else:
                described[task.name] = task
        for name in names:
            try:
                matching = _load_matching(_index_lm_eval(), name)
                described |= {
                    leaf: _describe_task(leaf, task)
                    for leaf, task in matching.items()
                    if leaf not in loaded
                }
            except EvaluationError as error:
                failed[name] = str(error)
            except Exception as error:  # noqa: BLE001  # the same
                failed[name] = _format_failure(name, error, hub=True, own=False)
            else:
                loaded = {**matching, **loaded}
        for lm_eval_task in loaded.values():
            lm_eval_task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        yield LoadedTasks(
            tasks=tuple(described.values()),
            lm_eval_tasks={name: loaded[name] for name in described},
            failed=failed,
        )


def split_names(
    names: Sequence[str], data_folder: Path | None = None, *, trusted: Sequence[str] = ()
) -> tuple[list[Task], list[str], dict[str, str]]:
    """Split names into tasks of evals/, names of lm-eval, and tasks of evals/ that fail.

    trusted: sha256 of Python files that tasks may run.
    """
    own_tasks, lm_eval_names, failed = list[Task](), list[str](), dict[str, str]()
    for name in expand_names(names):
        if not task_files.find_task_path(name).is_file() and not name.endswith(task_files.SUFFIX):
            lm_eval_names.append(name)
            continue
        try:
            own_tasks += tasks.load_tasks([name], data_folder, trusted=trusted)
        except EvaluationError as error:
            failed[name] = str(error)
    return own_tasks, lm_eval_names, failed


def is_known_task(name: str) -> bool:
    """Return whether a task of this name, or the file, exists."""
    if name.endswith(task_files.SUFFIX):
        return is_file(Path(name))
    return task_files.find_task_path(name).is_file() or bool(_index_lm_eval().match_tasks([name]))


@cache
def _index_lm_eval() -> Any:
    """Return lm-eval's index of its own thousands of tasks; it takes seconds to build."""
    from lm_eval.tasks import TaskManager  # seconds to import

    return TaskManager()


def _load_matching(manager: Any, name: str) -> dict[str, Any]:
    """Load lm-eval's tasks of a name or pattern."""
    matching = manager.match_tasks([name])
    if not matching:
        known = [*task_files.list_task_names(), *TASK_SETS, *manager.all_tasks]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise EvaluationError(f"{name}: no such task; {hint}`lm-eval ls tasks` lists lm-eval's own")
    loaded: dict[str, Any] = manager.load(matching)["tasks"]
    unsafe = [leaf for leaf, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise EvaluationError(
            f"{unsafe[0]}: lm-eval would run generated code outside the sandbox; use humaneval or "
            "mbpp, or write a task with quantkit.code (evals/README.md)"
        )
    return loaded


def _describe_task(name: str, task: Any) -> Task:
    """Describe a task of lm-eval's own for the report."""
    config = task.dump_config()
    text = json.dumps(config, sort_keys=True, default=str)
    prefixes = {
        task_set: tuple(member.partition("*")[0] for member in members)
        for task_set, members in TASK_SETS.items()
    }
    domain = next((key for key, starts in prefixes.items() if name.startswith(starts)), "other")
    return Task(
        name=name,
        domain=domain,
        config={"filter_list": [{"name": entry.name} for entry in task._filters]},
        files={},
        hub={"path": str(config.get("dataset_path"))},
        code=None,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _format_failure(name: str, error: Exception, *, hub: bool, own: bool) -> str:
    """Return one sentence with the text of lm-eval or datasets. own: the task is one of evals/."""
    bound = find_bound_fault(error)
    text = f"{type(error).__name__}: {error}" if bound is None else str(bound)
    message = " ".join(text.split())[:300]
    if isinstance(error, ModuleNotFoundError | AssertionError) and "lm-eval[math]" in message:
        return f"{name}: packages that compare its answers are missing; install quantkit[math]"
    advice = "correct the task's file"
    if hub:
        folder_hint = f", or set {DATA_VARIABLE} to a folder that has it" if own else ""
        advice = f"{name}: the data comes from the hub; connect{folder_hint}"
    return f"evaluation tasks {name}: lm-eval cannot load them ({message}); {advice}"


@contextmanager
def _silence(*, offline: bool) -> Iterator[None]:
    """Silence lm-eval and datasets; `offline` keeps datasets from the network.

    datasets asks a server to count even a local file, with 3 s of timeout, unless its own constant
    says offline; the environment variables are read at import only.
    """
    import datasets  # seconds to import
    import lm_eval.api.task as lm_eval_task

    loggers, bars = [*map(logging.getLogger, _LOGGERS)], datasets.is_progress_bar_enabled()
    levels = [logger.level for logger in loggers]
    was_offline, tqdm = datasets.config.HF_HUB_OFFLINE, lm_eval_task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = offline or was_offline
    lm_eval_task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval_task.tqdm = tqdm
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.enable_progress_bars()
