"""Run benchmark tasks with lm-eval and score every item.

`run_tasks` runs them on a model in memory, `run_loaded_tasks` on any backend. lm-eval builds the
prompts, applies the filters and scores math; it never runs code. Completions of code tasks are
collected first and judged together in the sandbox. lm-eval's `evaluate` is called directly, because
its `simple_evaluate` would seed three global generators, call git and pip, and write to standard
error.

A model that decodes greedily in float32 gives the same answers for any batch size, except for exact
ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError, UnsuitedError
from quantkit.evaluate import answer_store, lm_eval_tasks, sandbox
from quantkit.evaluate.chat_answers import VARIANTS, ChatAnswer, is_python, make_completion
from quantkit.evaluate.item_results import ItemResult
from quantkit.evaluate.lm_eval_tasks import LoadedTasks
from quantkit.evaluate.task_schema import CodeRules
from quantkit.evaluate.tasks import Task, make_template_error
from quantkit.io.templates import TemplateFault, TemplateWorker

if TYPE_CHECKING:
    from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, LMEvalAdapter

BATCH_SIZE = 64
"""Rows decoded together; a large model on a small machine needs fewer."""

_INVALID = "[invalid]"  # the result of lm-eval's regex filter for a text without a match
_NOT_RUN = "not run: "
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a completion in the source of a program


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """Score of one task under one filter, as shares from 0 to 1.

    score and standard_error are None if the task was not run, for the reason in `not_run`; n_tokens
    is the mean length of an answer; the first filter of a task gives its score (`is_primary`).
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


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    jail: sandbox.Sandbox | None = None,
    progress: Callable[[int, int], None] | None = None,
    answers: Path | None = None,
) -> list[ItemResult]:
    """Run and score every item of `tasks` (see tasks.load_tasks), or the first `limit` of each.

    Args:
        model: a transformers causal LM on the device and in the dtype to evaluate it in.
        tokenizer: its own tokenizer, which alone decides on BOS.
        jail: where programs run; without one the best sandbox is probed if there is code to run.
        progress: called with (answers complete, answers in total).
        answers: a file that keeps the answers for a run that resumes this one.

    Nothing is printed. Raises EvaluationError if a task cannot run, QuantkitError if an answer
    cannot be stored.
    """
    if not tasks:
        return []
    if limit is not None and limit < 1:
        raise EvaluationError(f"evaluation.limit: expected 1 or more items, found {limit}")
    with (
        lm_eval_tasks.open_lm_eval_tasks(tasks) as loaded,
        answer_store.open_answer_store(answers) as store,
    ):
        # both import lm-eval, which takes seconds
        from quantkit.evaluate.lm_eval_adapter import LMEvalAdapter
        from quantkit.evaluate.transformers_backend import TransformersBackend

        if loaded.failed:
            raise EvaluationError("\n".join(loaded.failed.values()))
        backend = TransformersBackend(model, tokenizer, batch_size)
        adapter = LMEvalAdapter(backend, store, "", progress)
        return run_loaded_tasks(adapter, loaded, limit=limit, jail=jail)


def run_loaded_tasks(
    adapter: LMEvalAdapter,
    loaded: LoadedTasks,
    *,
    limit: int | None = None,
    chat: bool = False,
    jail: sandbox.Sandbox | None = None,
) -> list[ItemResult]:
    """Run and score every item of the loaded tasks on the adapter's backend. See `run_tasks`.

    chat: prompts become conversations, with the worked examples as turns.
    """
    from lm_eval.evaluator import evaluate  # seconds to import

    if chat:
        set_chat_stops(loaded)
    results = evaluate(
        lm=adapter,
        task_dict={"tasks": dict(loaded.lm_eval_tasks), "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    items: list[ItemResult] = []
    for task in loaded.tasks:
        samples = results["samples"][task.name]
        task_items = [
            _make_item(task, sample, adapter.answers.get((task.name, sample["doc_id"])))
            for sample in samples
        ]
        if task.code is not None:
            jail = jail or sandbox.probe_sandbox()
            form = task.chat if chat else None
            task_items = _judge_programs(task_items, samples, task.code, jail, form)
        items += task_items
    return items


def set_chat_stops(loaded: LoadedTasks) -> None:
    """Remove stop strings of code tasks that begin a line: they end a completion, and are part of
    the program in a fence.

    Marks such as [DONE] stay. A conversation ends with the model's own end of turn.
    """
    for task in loaded.tasks:
        config = loaded.lm_eval_tasks[task.name].config
        if task.chat == "code" and config.generation_kwargs is not None:
            until = config.generation_kwargs.get("until") or []
            stops = [until] if isinstance(until, str) else until
            marks = [stop for stop in stops if not stop.startswith("\n")]
            settings = {**config.generation_kwargs, "until": marks}
            loaded.lm_eval_tasks[task.name].set_config("generation_kwargs", settings)


def describe_variant(task: Task, *, chat: bool) -> str:
    """Return how answers were read, for the results: "plain", or the name of a chat variant."""
    if not chat:
        return "plain"
    note = "" if "chat" in task.validated else "; not validated in this form"
    return VARIANTS[task.chat] + note


def probe_sandbox_for(tasks: Sequence[Task]) -> sandbox.Sandbox:
    """Return the best sandbox if a task has code to run; nothing is probed otherwise."""
    has_code = any(task.code for task in tasks)
    return sandbox.probe_sandbox() if has_code else sandbox.Sandbox(kind="none")


def aggregate_scores(items: Sequence[ItemResult]) -> list[TaskScore]:
    """Return one score per task and filter, in the order of the items."""
    groups: dict[tuple[str, str], list[ItemResult]] = {}
    for item in items:
        groups.setdefault((item.task, item.filter), []).append(item)
    first_filters: dict[str, str] = {}
    for task, name in groups:
        first_filters.setdefault(task, name)
    return [
        _aggregate_score(group, is_primary=first_filters[task] == name)
        for (task, name), group in groups.items()
    ]


def _aggregate_score(items: Sequence[ItemResult], *, is_primary: bool) -> TaskScore:
    n = len(items)
    scores = [item.score for item in items if item.score is not None]
    is_complete = len(scores) == n
    mean = sum(scores) / n if is_complete else None
    squares = sum((score - mean) ** 2 for score in scores) if mean is not None else 0.0
    outcomes = [item.outcome for item in items if item.score is None]
    return TaskScore(
        task=items[0].task,
        domain=items[0].domain,
        filter=items[0].filter,
        is_primary=is_primary,
        n=n,
        score=mean,
        standard_error=sqrt(squares / (n - 1) / n) if is_complete and n > 1 else None,
        truncated=sum(item.truncated for item in items) / n,
        unparsed=sum(not item.parsed for item in items) / n,
        n_tokens=sum(item.n_tokens for item in items) / n,
        not_run=outcomes[0].removeprefix(_NOT_RUN) if outcomes else "",
    )


def _make_item(task: Task, sample: Mapping[str, Any], answer: GeneratedAnswer | None) -> ItemResult:
    """Convert lm-eval's record of one item under one filter; `_judge_programs` scores code tasks.

    Without an answer the item compared likelihoods: the response is the most likely continuation.
    """
    filtered = str(sample["filtered_resps"][0])
    metric = sample["metrics"][0]
    value = sample[metric] if task.code is None else None
    if value is not None and not isinstance(value, int | float):
        raise UnsuitedError(
            f"{task.name}: metric {metric} gives no number per item; use another metric"
        )
    if answer is None:
        likelihoods = [responses[0][0] for responses in sample["resps"]]
        filtered = response = str(sample["arguments"][likelihoods.index(max(likelihoods))][1])
    else:
        response = answer.text
    return ItemResult(
        task=task.name,
        domain=task.domain,
        filter=sample["filter"],
        doc_id=sample["doc_id"],
        doc_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        target_hash=sample["target_hash"],
        prompt=sample["arguments"][0][0],
        target=str(sample["target"]),
        response=response,
        score=None if value is None else float(value),
        outcome=filtered[:200],
        n_tokens=answer.n_tokens if answer else 0,
        truncated=answer.truncated if answer else False,
        parsed=filtered != _INVALID,
    )


def _judge_programs(
    items: Sequence[ItemResult],
    samples: Sequence[Mapping[str, Any]],
    rules: CodeRules,
    jail: sandbox.Sandbox,
    chat: ChatAnswer | None,
) -> list[ItemResult]:
    """Return the items of a code task with their programs run, or marked as not run.

    chat: how answers of a conversation are read; None for continuations.
    """
    with TemplateWorker() as worker:
        programs = [
            build_program(worker, item.task, rules, sample["doc"], item.response, chat)
            for item, sample in zip(items, samples, strict=True)
        ]
    if jail.kind == "none":
        results: list[sandbox.ProgramResult | None] = [None] * len(items)
    else:
        results = [*sandbox.run_programs(programs, jail, rules.seconds)]
    judged = []
    for item, program, result in zip(items, programs, results, strict=True):
        score = None if result is None else float(result.passed)
        outcome = f"{_NOT_RUN}{jail.reason}" if result is None else result.reason
        parsed = is_python(program.source)
        judged.append(replace(item, score=score, outcome=outcome, parsed=parsed))
    return judged


def build_program(
    worker: TemplateWorker,
    name: str,
    rules: CodeRules,
    doc: Mapping[str, Any],
    completion: str,
    chat: ChatAnswer | None = None,
) -> sandbox.Program:
    """Build the program of a completion of task `name`, and its tests.

    chat: how an answer of a conversation is read; None for a continuation.
    """
    try:
        if chat == "code":
            head, _, _ = worker.render(rules.source, {**doc, "completion": _MARK}).partition(_MARK)
            completion = make_completion(completion, head)
        elif rules.cut == "first_unindented_line":
            completion = cut_at_unindented_line(completion)
        values = {**doc, "completion": completion}
        source, tests = (worker.render(text, values) for text in (rules.source, rules.tests))
    except TemplateFault as fault:
        raise make_template_error(f"{name}: quantkit.code", fault) from None
    return sandbox.Program(source=source, tests=tests)


def cut_at_unindented_line(text: str) -> str:
    """Return the text before the first line that starts with anything but a space.

    Empty lines stay.
    """
    lines = text.split("\n")
    end = next(
        (index for index, line in enumerate(lines) if line and not line.startswith((" ", "\t"))),
        len(lines),
    )
    return "\n".join(lines[:end])
