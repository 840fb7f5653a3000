"""Benchmarks through lm-eval: `run` on a model that is already in memory, `ask` on any backend.

lm-eval makes the prompts, applies the filters and scores math; it never runs code. Completions of code tasks are
collected first and judged together in the sandbox afterwards. lm-eval's `evaluate` is called below its
`simple_evaluate`, which would seed three global generators, call git and pip, and write to standard error.

A model that decodes greedily in float32 gives the same answers whatever the batch, but for exact ties.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from quantkit.errors import EvaluationError, UnsuitedError
from quantkit.evaluate import answer_store, harness
from quantkit.evaluate.harness import Opened
from quantkit.evaluate.samples import ItemResult
from quantkit.evaluate.sandbox import sandbox as jails
from quantkit.evaluate.tasks import TEMPLATES, CodeRules, Task

if TYPE_CHECKING:
    from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, LMEvalAdapter

BATCH_SIZE = 64
"""Rows decoded together; a large model on a small machine wants fewer."""

_INVALID = "[invalid]"  # what lm-eval's regex filter makes of a text without a match
_NOT_RUN = "not run: "


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
    answers: Path | None = None,
) -> list[ItemResult]:
    """Answer and score every item of `tasks` (see tasks.load), or the first `limit` of each.

    model: a transformers causal LM on the device and in the dtype it is to be judged in; tokenizer: its own, which
    alone decides on BOS. `progress` is called with (answers complete, answers in all). Without a `sandbox` the best
    one is looked for when there is code to run. `answers` is a file that keeps them for a run that takes this one up.
    Nothing is printed. EvaluationError when a task cannot be run, QuantkitError when an answer cannot be stored.
    """
    if not tasks:
        return []
    if limit is not None and limit < 1:
        raise EvaluationError(f"evaluation.limit: expected 1 or more items, found {limit}")
    with harness.opened(tasks) as opened, answer_store.open_answer_store(answers) as book:
        from quantkit.evaluate.generation import LocalModel
        from quantkit.evaluate.lm_eval_adapter import LMEvalAdapter

        if opened.failed:
            raise EvaluationError("\n".join(opened.failed.values()))
        recorder = LMEvalAdapter(LocalModel(model, tokenizer, batch_size), book, "", progress)
        return ask(recorder, opened, limit=limit, sandbox=sandbox)


def ask(
    recorder: LMEvalAdapter,
    opened: Opened,
    *,
    limit: int | None = None,
    chat: bool = False,
    sandbox: jails.Sandbox | None = None,
) -> list[ItemResult]:
    """Every item of the opened tasks, answered by a backend behind its recorder and scored. See `run`.

    chat: prompts become conversations, worked examples turns of them.
    """
    from lm_eval.evaluator import evaluate  # seconds to import

    try:
        results = evaluate(
            lm=recorder,
            task_dict={"tasks": dict(opened.loaded), "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except TemplateError as fault:
        names = ", ".join(task.name for task in opened.tasks)
        raise EvaluationError(
            f"evaluation tasks {names}: {fault}; correct the task's file"
        ) from fault
    jail = sandbox
    items: list[ItemResult] = []
    for task in opened.tasks:
        samples = results["samples"][task.name]
        found = [
            _item(task, sample, recorder.answers.get((task.name, sample["doc_id"])))
            for sample in samples
        ]
        if task.code is not None:
            jail = jail or jails.probe()
            found = _judged(found, samples, task.code, jail)
        items += found
    return items


def jail_for(tasks: Sequence[Task]) -> jails.Sandbox:
    """The best sandbox where a task has code to run; none is looked for otherwise."""
    return jails.probe() if any(task.code for task in tasks) else jails.Sandbox(kind="none")


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


def _item(task: Task, sample: Mapping[str, Any], answer: GeneratedAnswer | None) -> ItemResult:
    """lm-eval's record of one item under one filter; code tasks get their score from `_judged`.

    Without an answer the item compared likelihoods: the response is the continuation that was the most likely.
    """
    filtered = str(sample["filtered_resps"][0])
    value = sample[sample["metrics"][0]] if task.code is None else None
    if value is not None and not isinstance(value, int | float):
        raise UnsuitedError(
            f"{task.name}: metric {sample['metrics'][0]} gives no number per item; use another one"
        )
    if answer is None:
        likelihoods = [responses[0][0] for responses in sample["resps"]]
        filtered = response = str(sample["arguments"][likelihoods.index(max(likelihoods))][1])
    else:
        response = answer.text
    return ItemResult(
        task=task.name, domain=task.domain, filter=sample["filter"], doc_id=sample["doc_id"],
        doc_hash=sample["doc_hash"], prompt_hash=sample["prompt_hash"], target_hash=sample["target_hash"],
        prompt=sample["arguments"][0][0], target=str(sample["target"]), response=response,
        score=None if value is None else float(value), outcome=filtered[:200],
        n_tokens=answer.n_tokens if answer else 0, truncated=answer.truncated if answer else False,
        parsed=filtered != _INVALID,
    )  # fmt: skip


def _judged(
    items: Sequence[ItemResult],
    samples: Sequence[Mapping[str, Any]],
    rules: CodeRules,
    sandbox: jails.Sandbox,
) -> list[ItemResult]:
    """The items of a code task with their programs run, or marked as not run."""
    programs = [
        program(item.task, rules, sample["doc"], item.response)
        for item, sample in zip(items, samples, strict=True)
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
        source, tests = (
            TEMPLATES.from_string(text).render(values) for text in (rules.source, rules.tests)
        )
    except TemplateError as fault:
        raise EvaluationError(
            f"{name}: quantkit.code: a template does not fit the data: {fault}"
        ) from None
    return jails.Program(source=source, tests=tests)


def first_unindented_line(text: str) -> str:
    """The text before the first line that starts with something else than a space; empty lines stay."""
    lines = text.split("\n")
    end = next(
        (index for index, line in enumerate(lines) if line and not line.startswith((" ", "\t"))),
        len(lines),
    )
    return "\n".join(lines[:end])


def _is_python(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # an invalid escape in generated text is no concern of the reader
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
