"""Math and code benchmarks through lm-eval, on a model that is already in memory.

lm-eval makes the prompts, applies the filters and scores math; it never runs code. Completions of code tasks are
collected first and judged together in the sandbox afterwards. lm-eval's `evaluate` is called below its
`simple_evaluate`, which would seed three global generators, call git and pip, and write to standard error.

A model that decodes greedily in float32 gives the same answers whatever the batch, but for exact ties.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined, TemplateError

from quantkit.errors import EvaluationError
from quantkit.evaluate import sandbox as jails
from quantkit.evaluate.samples import ItemResult
from quantkit.evaluate.tasks import DATA_VARIABLE, CodeRules, Task, rendered

if TYPE_CHECKING:
    from quantkit.evaluate.generation import Answer, LocalModel

BATCH_SIZE = 64
"""Rows decoded together; a large model on a small machine wants fewer."""

_INVALID = "[invalid]"  # what lm-eval's regex filter makes of a text without a match
_FEWSHOT_SEED = 1234  # lm-eval's own; the tasks that ship with quantkit draw nothing
_NOT_RUN = "not run: "
_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)  # as lm-eval's: code, not HTML


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One task under one filter, in shares from 0 to 1.

    score and standard_error are None when the task was not run, and `not_run` says why; n_tokens is the mean length
    of an answer; the first filter of a task is its score (`is_primary`).
    """

    task: str
    domain: str
    filter: str
    is_primary: bool
    n: int
    score: float | None
    standard_error: float | None
    truncated: float
    unparsed: float
    n_tokens: float
    not_run: str


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    sandbox: jails.Sandbox | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ItemResult]:
    """Answer and score every item of `tasks` (see tasks.load), or the first `limit` of each.

    model: a transformers causal LM on the device and in the dtype it is to be judged in; tokenizer: its own, which
    alone decides on BOS. `progress` is called with (answers complete, answers in all). Without a `sandbox` the best
    one is looked for when there is code to run. Nothing is printed. EvaluationError when a task cannot be run.
    """
    if not tasks:
        return []
    if limit is not None and limit < 1:
        raise EvaluationError(f"evaluation.limit: expected 1 or more items, found {limit}")
    answers, samples = _answer(model, tokenizer, tasks, limit, batch_size, progress)
    jail = sandbox
    items: list[ItemResult] = []
    for task in tasks:
        found = [_item(task, sample, answers[task.name, sample["doc_id"]]) for sample in samples[task.name]]
        if task.code is not None:
            jail = jail or jails.probe()
            found = _judged(found, samples[task.name], task.code, jail)
        items += found
    return items


def scores(items: Sequence[ItemResult]) -> list[TaskScore]:
    """One score per task and filter, in the order of the items."""
    groups: dict[tuple[str, str], list[ItemResult]] = {}
    for item in items:
        groups.setdefault((item.task, item.filter), []).append(item)
    seen: set[str] = set()
    found = []
    for (task, _), group in groups.items():
        found.append(_score(group, is_primary=task not in seen))
        seen.add(task)
    return found


def _score(group: Sequence[ItemResult], *, is_primary: bool) -> TaskScore:
    n = len(group)
    known = [item.score for item in group if item.score is not None]
    complete = len(known) == n
    mean = sum(known) / n if complete else None
    spread = sum((score - mean) ** 2 for score in known) if mean is not None else 0.0
    outcomes = [item.outcome for item in group if item.score is None]
    return TaskScore(
        task=group[0].task, domain=group[0].domain, filter=group[0].filter, is_primary=is_primary, n=n, score=mean,
        standard_error=sqrt(spread / (n - 1) / n) if complete and n > 1 else None,
        truncated=sum(item.truncated for item in group) / n, unparsed=sum(not item.parsed for item in group) / n,
        n_tokens=sum(item.n_tokens for item in group) / n,
        not_run=outcomes[0].removeprefix(_NOT_RUN) if outcomes else "",
    )  # fmt: skip


def _answer(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    limit: int | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[tuple[str, int], Answer], dict[str, list[dict[str, Any]]]]:
    """Every answer by (task, doc_id), and lm-eval's sample records by task."""
    with _quiet(offline=all(task.is_local for task in tasks)), rendered(tasks) as folder:
        from lm_eval.evaluator import evaluate  # seconds to import
        from lm_eval.tasks import TaskManager

        from quantkit.evaluate.generation import LocalModel

        language_model: LocalModel = LocalModel(model, tokenizer, batch_size, progress)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        try:
            loaded = manager.load([task.name for task in tasks])
        except Exception as fault:
            raise _unloadable(tasks, fault) from fault
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        try:
            results = evaluate(lm=language_model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
        except TemplateError as fault:
            raise _unloadable(tasks, fault) from fault
    return language_model.answers, results["samples"]


def _unloadable(tasks: Sequence[Task], fault: Exception) -> EvaluationError:
    """lm-eval and datasets raise a dozen unrelated types here; their text is the information."""
    said = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
    remote = [task.name for task in tasks if not task.is_local]
    advice = (
        f"{', '.join(remote)}: the data comes from the hub; connect, or set {DATA_VARIABLE} to a folder that has it"
        if remote else "correct the task's file"
    )  # fmt: skip
    names = ", ".join(task.name for task in tasks)
    return EvaluationError(f"evaluation tasks {names}: lm-eval cannot load them ({said}); {advice}")


def _item(task: Task, sample: Mapping[str, Any], answer: Answer) -> ItemResult:
    """lm-eval's record of one item under one filter; code tasks get their score from `_judged`."""
    filtered = str(sample["filtered_resps"][0])
    value = sample[sample["metrics"][0]] if task.code is None else None
    if value is not None and not isinstance(value, int | float):
        raise EvaluationError(f"{task.name}: metric {sample['metrics'][0]} gives no number per item; use another one")
    return ItemResult(
        task=task.name, domain=task.domain, filter=sample["filter"], doc_id=sample["doc_id"],
        doc_hash=sample["doc_hash"], prompt_hash=sample["prompt_hash"], target_hash=sample["target_hash"],
        prompt=sample["arguments"][0][0], target=str(sample["target"]), response=answer.text,
        score=None if value is None else float(value), outcome=filtered[:200], n_tokens=answer.n_tokens,
        truncated=answer.truncated, parsed=filtered != _INVALID,
    )  # fmt: skip


def _judged(
    items: Sequence[ItemResult], samples: Sequence[Mapping[str, Any]], rules: CodeRules, sandbox: jails.Sandbox
) -> list[ItemResult]:
    """The items of a code task with their programs run, or marked as not run."""
    programs = [
        program(item.task, rules, sample["doc"], item.response) for item, sample in zip(items, samples, strict=True)
    ]
    if sandbox.kind == "none":
        outcomes: list[jails.Outcome | None] = [None] * len(items)
    else:
        outcomes = [*jails.run_programs(programs, sandbox, rules.seconds)]
    judged = []
    for item, made, outcome in zip(items, programs, outcomes, strict=True):
        score = None if outcome is None else float(outcome.passed)
        text = f"{_NOT_RUN}{sandbox.reason}" if outcome is None else outcome.reason
        judged.append(replace(item, score=score, outcome=text, parsed=_is_python(made.source)))
    return judged


def program(name: str, rules: CodeRules, doc: Mapping[str, Any], completion: str) -> jails.Program:
    """The program that a completion of task `name` becomes, and its tests."""
    if rules.cut == "first_unindented_line":
        completion = first_unindented_line(completion)
    values = {**doc, "completion": completion}
    try:
        source, tests = (_TEMPLATES.from_string(text).render(values) for text in (rules.source, rules.tests))
    except TemplateError as fault:
        raise EvaluationError(f"{name}: quantkit.code: a template does not fit the data: {fault}") from None
    return jails.Program(source=source, tests=tests)


def first_unindented_line(text: str) -> str:
    """The text before the first line that starts with something else than a space; empty lines stay."""
    lines = text.split("\n")
    end = next((index for index, line in enumerate(lines) if line and not line.startswith((" ", "\t"))), len(lines))
    return "\n".join(lines[:end])


def _is_python(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in generated text is no concern of the reader
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@contextmanager
def _quiet(*, offline: bool) -> Iterator[None]:
    """lm-eval and datasets without logs and bars; without a socket, when nothing has to be fetched.

    datasets asks a server to count even a local file, with 3 s of timeout, unless its own constant says offline; the
    environment variables are read at import only.
    """
    import datasets  # seconds to import
    import lm_eval.api.task as lm_eval_task

    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level, was_offline, bar = logger.level, datasets.config.HF_HUB_OFFLINE, lm_eval_task.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = offline or was_offline
    lm_eval_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval_task.tqdm = bar
        datasets.config.HF_HUB_OFFLINE = was_offline
        if bars:
            datasets.enable_progress_bars()
