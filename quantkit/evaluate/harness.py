"""lm-eval's tasks by name: those of evals/, task sets, and whatever else lm-eval knows; each loads or says why not.

Tasks of evals/ come first: their data may be local files, and their code runs in the sandbox. lm-eval's own tasks bring
their data from the hub, and those that would run generated code outside the sandbox are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.evaluate import tasks
from quantkit.evaluate.tasks import DATA_VARIABLE, Task, render_tasks
from quantkit.io.files import is_file
from quantkit.texts import task_files

SETS: Mapping[str, tuple[str, ...]] = {
    "math": ("gsm8k", "minerva_math", "mgsm_native_cot_*"),
    "code": ("humaneval", "mbpp"),
    "general": (
        "mmlu_college_computer_science", "mmlu_college_mathematics", "mmlu_conceptual_physics",  # STEM
        "mmlu_formal_logic", "mmlu_philosophy", "mmlu_world_religions",  # humanities
        "mmlu_econometrics", "mmlu_high_school_geography", "mmlu_sociology",  # social sciences
        "mmlu_clinical_knowledge", "mmlu_global_facts", "mmlu_marketing",  # other
    ),
}  # fmt: skip
"""Task sets: names, or patterns of names, of tasks."""

_FEWSHOT_SEED = 1234  # lm-eval's own; the tasks that ship with quantkit draw nothing
_LOGGERS = (
    "lm_eval",
    "huggingface_hub.utils._http",
    "datasets",
    "transformers.tokenization_utils_base",
)
_SHORTCUTS = {"mgsm": "mgsm_native_cot_*"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """Tasks that can be asked: `tasks` for the report, `loaded` as lm-eval has them; `failed`: name -> why not."""

    tasks: tuple[Task, ...]
    loaded: Mapping[str, Any]
    failed: Mapping[str, str]

    def single(self) -> Iterator[Opened]:
        """The tasks one by one: what keeps one from being asked stops no other."""
        for task in self.tasks:
            yield Opened(tasks=(task,), loaded={task.name: self.loaded[task.name]}, failed={})


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How answers are written. Temperature 0 is greedy; max_tokens None leaves the limit to the task.

    chat: prompts become conversations by the model's chat template; think_end: see Recorder.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    chat: bool = False
    think_end: str = ""

    def apply(self, opened: Opened, seed: int) -> None:
        """Put these settings in front of the tasks' own."""
        changes: dict[str, object] = {}
        if self.temperature:
            changes |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "seed": seed,
            }
        if self.max_tokens is not None:
            changes["max_gen_toks"] = self.max_tokens
        for task in opened.loaded.values():
            if changes and task.OUTPUT_TYPE == "generate_until":
                task.set_config(
                    "generation_kwargs", {**(task.config.generation_kwargs or {}), **changes}
                )


def expanded(names: Sequence[str]) -> list[str]:
    """Names with the sets replaced by what is in them, each once."""
    members = [member for name in names for member in SETS.get(name, (_SHORTCUTS.get(name, name),))]
    return list(dict.fromkeys(members))


@contextmanager
def opened(own: Sequence[Task], names: Sequence[str] = ()) -> Iterator[Opened]:
    """Load checked tasks (see tasks.load) and lm-eval's own by name or pattern, quietly.

    Without a socket, when nothing has to be fetched. lm-eval reads the data of its tasks while it loads them.
    """
    with (
        _quiet(offline=not names and all(task.is_local for task in own)),
        render_tasks(own) as folder,
    ):
        found: dict[str, Task] = {}
        loaded: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for task in own:
            try:
                loaded |= _managed(_index(folder), task.name)
            except Exception as fault:  # noqa: BLE001  # lm-eval and datasets raise a dozen unrelated types
                failed[task.name] = _unloadable(task.name, fault, hub=not task.is_local, local=True)
            else:
                found[task.name] = task
        for name in names:
            try:
                theirs = _managed(_collection(), name)
                found |= {
                    leaf: _described(leaf, task)
                    for leaf, task in theirs.items()
                    if leaf not in loaded
                }
            except EvaluationError as fault:
                failed[name] = str(fault)
            except Exception as fault:  # noqa: BLE001
                failed[name] = _unloadable(name, fault, hub=True, local=False)
            else:
                loaded = {**theirs, **loaded}
        for each in loaded.values():
            each.set_fewshot_seed(seed=_FEWSHOT_SEED)
        yield Opened(
            tasks=tuple(found.values()),
            loaded={name: loaded[name] for name in found},
            failed=failed,
        )


def split(
    names: Sequence[str], data_folder: Path | None = None
) -> tuple[list[Task], list[str], dict[str, str]]:
    """Expanded names as tasks of evals/, names for lm-eval, and those of evals/ that do not load, with the reason."""
    own, theirs, failed = list[Task](), list[str](), dict[str, str]()
    for name in expanded(names):
        if not task_files.find_task_path(name).is_file() and not name.endswith(task_files.SUFFIX):
            theirs.append(name)
            continue
        try:
            own += tasks.load_tasks([name], data_folder)
        except EvaluationError as fault:
            failed[name] = str(fault)
    return own, theirs, failed


def known(name: str) -> bool:
    """Whether there is a task of this name, here or in lm-eval, or the file."""
    if name.endswith(task_files.SUFFIX):
        return is_file(Path(name))
    return task_files.find_task_path(name).is_file() or bool(_collection().match_tasks([name]))


def _index(folder: Path) -> Any:
    """lm-eval's index of the tasks in a folder."""
    from lm_eval.tasks import TaskManager  # seconds to import

    return TaskManager(include_path=str(folder), include_defaults=False)


@cache
def _collection() -> Any:
    """lm-eval's index of its own thousands of tasks; seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _managed(manager: Any, name: str) -> dict[str, Any]:
    """lm-eval's tasks of a name or pattern."""
    matching = manager.match_tasks([name])
    if not matching:
        near = difflib.get_close_matches(
            name, [*task_files.list_task_names(), *SETS, *manager.all_tasks], n=3
        )
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise EvaluationError(f"{name}: no such task; {hint}`lm-eval ls tasks` lists lm-eval's own")
    loaded: dict[str, Any] = manager.load(matching)["tasks"]
    unsafe = [leaf for leaf, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise EvaluationError(
            f"{unsafe[0]}: lm-eval would run generated code outside the sandbox; use humaneval or mbpp, or write a "
            "task with quantkit.code (evals/README.md)"
        )
    return loaded


def _described(name: str, task: Any) -> Task:
    """What the report needs to know of a task of lm-eval's own."""
    config = task.dump_config()
    words = json.dumps(config, sort_keys=True, default=str)
    domain = next(
        (
            known
            for known in SETS
            if name.startswith(tuple(m.partition("*")[0] for m in SETS[known]))
        ),
        "other",
    )
    return Task(
        name=name,
        domain=domain,
        config={"filter_list": [{"name": each.name} for each in task._filters]},
        files={},
        hub={"path": str(config.get("dataset_path"))},
        code=None,
        sha256=hashlib.sha256(words.encode()).hexdigest(),
    )


def _unloadable(name: str, fault: Exception, *, hub: bool, local: bool) -> str:
    """One sentence; lm-eval's and datasets' own text is the information."""
    said = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
    if isinstance(fault, ModuleNotFoundError | AssertionError) and "lm-eval[math]" in said:
        return (
            f"{name}: its answers are compared by packages that are missing; install quantkit[math]"
        )
    advice = "correct the task's file"
    if hub:
        place = f", or set {DATA_VARIABLE} to a folder that has it" if local else ""
        advice = f"{name}: the data comes from the hub; connect{place}"
    return f"evaluation tasks {name}: lm-eval cannot load them ({said}); {advice}"


@contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """lm-eval and datasets without logs and bars; without a socket, when nothing has to be fetched.

    datasets asks a server to count even a local file, with 3 s of timeout, unless its own constant says offline; the
    environment variables are read at import only.
    """
    import datasets  # seconds to import
    import lm_eval.api.task as lm_eval_task

    loggers, bars = [*map(logging.getLogger, _LOGGERS)], datasets.is_progress_bar_enabled()
    levels, was_offline, bar = (
        [each.level for each in loggers],
        datasets.config.HF_HUB_OFFLINE,
        lm_eval_task.tqdm,
    )
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = offline or was_offline
    lm_eval_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval_task.tqdm = bar
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.enable_progress_bars()
