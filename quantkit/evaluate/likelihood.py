"""Gold solutions of benchmark items, teacher-forced in the streaming pass: what math and code lose, without generating.

Prompts are lm-eval's, worked examples included; what follows them in a right answer is the task's `gold`. The streams
carry both behind the fidelity text, so that a model no machine here could run whole has a figure for math and code too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError

from quantkit.artifact.fidelity_schema import Figure, LikelihoodResult
from quantkit.errors import EvaluationError
from quantkit.evaluate import harness, statistics, tasks
from quantkit.evaluate.distribution import Sides
from quantkit.evaluate.tasks import TEMPLATES, Task
from quantkit.texts import task_files
from quantkit.texts.corpora import Tokenizer, Tokens, encode_continuation, pack_tokens

Prompt = tuple[int, str, dict[str, object]]
"""Number of an item, its prompt, and its columns."""

_SPECIAL = frozenset({
    "description",
    "process_docs",
    "doc_to_choice",
    "use_prompt",
    "gen_prefix",
    "custom_dataset",
})


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """The gold solution of one item: the last `n_tokens` of its sequence."""

    task: str
    doc_id: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Solutions:
    """What is scored: prompt and solution of each item, longest sequence first, with one of `items` per sequence.

    `hashes`: task -> sha256 of its file and data; `failed`: task -> why it is not scored.
    """

    tokens: Tokens
    items: tuple[Solution, ...] = ()
    hashes: Mapping[str, str]
    failed: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Log-likelihood per token of one solution under both models, nats."""

    solution: Solution
    source: float
    artifact: float


def none() -> Solutions:
    """Nothing to score."""
    return Solutions(tokens=pack_tokens([]), hashes={}, failed={})


def tokenize(names: Sequence[str], tokenizer: Tokenizer, *, items: int, length: int) -> Solutions:
    """Prompts and gold solutions of the first `items` of each task that has gold, in at most `length` tokens each.

    A task that cannot be read is left out with the reason: a build does not end for want of a benchmark's data.
    """
    found: list[tuple[Solution, list[int]]] = []
    hashes, failed = dict[str, str](), dict[str, str]()
    for name in names if items else ():
        try:
            (task,) = tasks.load_tasks([name])
            if task.gold is None:
                continue
            found += _sequences(task, task.gold, tokenizer, items, length)
            hashes[task.name] = task.sha256
        except EvaluationError as error:
            failed[tasks.get_task_name(name)] = str(error)
    found.sort(
        key=lambda entry: -len(entry[1])
    )  # stable: equal lengths stay in the order of the tasks
    rows = [(solution.task, ids) for solution, ids in found]
    items_ = tuple(solution for solution, _ in found)
    return Solutions(tokens=pack_tokens(rows), items=items_, hashes=hashes, failed=failed)


def _sequences(
    task: Task, gold: str, tokenizer: Tokenizer, items: int, length: int
) -> list[tuple[Solution, list[int]]]:
    """One sequence per item; items whose solution alone is too long are left out."""
    found = []
    try:
        texts = written(task, items) or asked(task, items)
        pairs = [
            (doc_id, prompt, TEMPLATES.from_string(gold).render(row))
            for doc_id, prompt, row in texts
        ]
    except TemplateError as fault:
        raise EvaluationError(f"{task.name}: {fault}; correct the task's file") from fault
    for doc_id, prompt, solution in pairs:
        ids, own = encode_continuation(tokenizer, prompt, solution, length)
        if own:
            found.append((Solution(task=task.name, doc_id=doc_id, n_tokens=own), ids))
    return found


def written(task: Task, items: int) -> list[Prompt]:
    """The prompts that lm-eval would make of a plain task with local data; none for any other.

    Made here, because lm-eval and what it imports hold 130 MB that the recipe's `memory` has no room for.
    """
    plain, data, shots = task.config, _local(task, items), _shots(task)
    if (
        data is None
        or shots is None
        or not isinstance(plain.get("doc_to_text"), str)
        or _SPECIAL & plain.keys()
    ):
        return []
    ask, answer = (
        TEMPLATES.from_string(str(plain[key])) for key in ("doc_to_text", "doc_to_target")
    )
    delimiter, gap = plain.get("target_delimiter", " "), plain.get("fewshot_delimiter", "\n\n")
    front = "".join(f"{ask.render(row)}{delimiter}{answer.render(row)}{gap}" for row in shots)
    return [(number, front + ask.render(row), row) for number, row in enumerate(data)]


def _local(task: Task, items: int) -> list[dict[str, object]] | None:
    """The first rows of the split that is scored."""
    file = task.files.get(str(task.config.get("test_split")))
    return None if file is None else task_files.read_first_rows(file.path, file.rows, items)


def _shots(task: Task) -> list[dict[str, object]] | None:
    """The rows of the worked examples, where it is plain which they are."""
    count, how = task.config.get("num_fewshot", 0), task.config.get("fewshot_config", {})
    if not count:
        return []
    if not isinstance(count, int) or not isinstance(how, dict) or how.get("sampler") != "first_n":
        return None
    if isinstance(samples := how.get("samples"), list):
        return samples[:count]
    split = task.config.get("fewshot_split")
    file = None if split == task.config.get("test_split") else task.files.get(str(split))
    return None if file is None else task_files.read_first_rows(file.path, file.rows, count)


def asked(task: Task, items: int) -> list[Prompt]:
    """The prompts of any task, by lm-eval."""
    with harness.opened([task]) as opened:
        if opened.failed:
            raise EvaluationError("; ".join(opened.failed.values()))
        loaded = opened.loaded[task.name]
        loaded.build_all_requests(limit=items)
        return [(each.doc_id, each.args[0], each.doc) for each in loaded.instances]


def score(both: Sides, items: Sequence[Solution]) -> list[Scored]:
    """Log-likelihood per token of every solution, whose sequences are the last of the streams; by task and item."""
    if not items:
        return []
    tokens = both.reference.tokens
    ends = [start + length for start, length in zip(tokens.starts, tokens.lengths, strict=True)][
        -len(items) :
    ]
    # the token at a row is predicted by the row before it
    rows = torch.cat([
        torch.arange(end - 1 - x.n_tokens, end - 1) for end, x in zip(ends, items, strict=True)
    ])
    compared, counts = both.compare(rows), [solution.n_tokens for solution in items]
    first, second = compared.nll_source.split(counts), compared.nll_quantized.split(counts)
    found = [
        Scored(solution=solution, source=-float(p.mean()), artifact=-float(q.mean()))
        for solution, p, q in zip(items, first, second, strict=True)
    ]
    return sorted(found, key=lambda scored: (scored.solution.task, scored.solution.doc_id))


def rows(
    names: Sequence[str], solutions: Solutions, scored: Sequence[Scored]
) -> tuple[LikelihoodResult, ...]:
    """One row per task, in the recipe's order; tasks without gold have none."""
    found = []
    for name in map(tasks.get_task_name, names):
        mine = [each for each in scored if each.solution.task == name]
        if name in solutions.failed:
            found.append(
                LikelihoodResult(task=name, status="not run", reason=solutions.failed[name])
            )
        elif name in solutions.hashes and len(mine) < 2:
            reason = f"{len(mine)} solutions fit into a sequence, too few to compare"
            found.append(LikelihoodResult(task=name, status="not run", reason=reason, n=len(mine)))
        elif name in solutions.hashes:
            found.append(_row(name, mine, solutions.hashes[name]))
    return tuple(found)


def _row(name: str, mine: Sequence[Scored], sha256: str) -> LikelihoodResult:
    first, second = [each.source for each in mine], [each.artifact for each in mine]
    change = statistics.paired_difference(first, second)
    return LikelihoodResult(
        task=name,
        n=len(mine),
        tokens=sum(each.solution.n_tokens for each in mine),
        source=sum(first) / len(mine),
        artifact=sum(second) / len(mine),
        difference=Figure(
            value=change.mean,
            se=change.standard_error,
            ci=(change.interval.low, change.interval.high),
        ),
        data_sha256=sha256,
    )


def to_parquet(scored: Sequence[Scored], path: Path) -> None:
    """Write every item: task, doc_id, tokens of the solution, log-likelihood per token under source and artifact."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    columns = {
        "task": arrow.array([each.solution.task for each in scored], arrow.string()),
        "doc_id": arrow.array([each.solution.doc_id for each in scored], arrow.int64()),
        "n_tokens": arrow.array([each.solution.n_tokens for each in scored], arrow.int64()),
        "source": arrow.array([each.source for each in scored], arrow.float64()),
        "artifact": arrow.array([each.artifact for each in scored], arrow.float64()),
    }
    parquet.write_table(arrow.table(columns), path)
