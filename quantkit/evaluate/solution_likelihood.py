"""Likelihood of gold solutions of benchmark items, teacher-forced in the streaming pass.

It measures the loss in math and code without generation. Prompts are lm-eval's, worked examples
included; the task's `gold` template gives the solution after the prompt. The streams carry both
after the fidelity text, so that a model that no machine could run whole has a figure for math and
code too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.artifact.fidelity_schema import Figure, LikelihoodResult
from quantkit.errors import EvaluationError
from quantkit.evaluate import lm_eval_tasks, statistics, tasks
from quantkit.evaluate.tasks import Task, make_template_error, render_field, render_target
from quantkit.evaluate.token_fidelity import StreamPair
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts import task_files
from quantkit.texts.corpora import Tokenizer, encode_continuation
from quantkit.texts.tokens import Tokens, TokenSequence, pack_tokens

ItemPrompt = tuple[int, str, dict[str, object]]
"""Number of an item, its prompt, and its columns."""

_UNSUPPORTED_KEYS = frozenset({"description", "gen_prefix"})
_SUPPORTED_FEWSHOT_KEYS = frozenset({"sampler", "samples"})


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldSolution:
    """The gold solution of one item: the last `n_tokens` of its sequence."""

    task: str
    doc_id: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class GoldSolutions:
    """Prompt and solution of each item as one sequence, longest first, and its item.

    `hashes`: task -> sha256 of its file and data; `failed`: task -> why it is not scored.
    """

    tokens: Tokens
    items: tuple[GoldSolution, ...] = ()
    hashes: Mapping[str, str]
    failed: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSolution:
    """Log-likelihood per token of one solution under both models, in nats."""

    solution: GoldSolution
    source: float
    artifact: float


def make_empty_solutions() -> GoldSolutions:
    """Return an empty set of solutions."""
    return GoldSolutions(tokens=pack_tokens([]), hashes={}, failed={})


def tokenize_solutions(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    items: int,
    length: int,
    trusted_code: Sequence[str] = (),
) -> GoldSolutions:
    """Tokenize prompt and gold solution of the first `items` of each task with gold.

    A task that cannot be read is left out with the reason: missing benchmark data does not stop a
    build.
    """
    sequences: list[tuple[GoldSolution, list[int]]] = []
    hashes, failed = dict[str, str](), dict[str, str]()
    for name in names if items else ():
        try:
            (task,) = tasks.load_tasks([name], trusted=trusted_code)
            if task.gold is None:
                continue
            sequences += _tokenize_task(task, task.gold, tokenizer, items, length)
            hashes[task.name] = task.sha256
        except EvaluationError as error:
            failed[tasks.get_task_name(name)] = str(error)
    # the sort is stable: equal lengths stay in the order of the tasks
    sequences.sort(key=lambda entry: -len(entry[1]))
    return GoldSolutions(
        tokens=pack_tokens([
            TokenSequence(domain=solution.task, ids=ids) for solution, ids in sequences
        ]),
        items=tuple(solution for solution, _ in sequences),
        hashes=hashes,
        failed=failed,
    )


def _tokenize_task(
    task: Task, gold: str, tokenizer: Tokenizer, items: int, length: int
) -> list[tuple[GoldSolution, list[int]]]:
    """Return one sequence per item; items whose solution alone is too long are left out."""
    with TemplateWorker() as worker:
        prompts = render_prompts(task, items, worker) or build_prompts_with_lm_eval(task, items)
        try:
            texts = [(doc_id, prompt, worker.render(gold, row)) for doc_id, prompt, row in prompts]
        except TemplateFault as fault:
            raise make_template_error(f"{task.name}: quantkit.gold", fault) from None
    sequences = []
    for doc_id, prompt, text in texts:
        ids, n_tokens = encode_continuation(tokenizer, prompt, text, length)
        if n_tokens:
            solution = GoldSolution(task=task.name, doc_id=doc_id, n_tokens=n_tokens)
            sequences.append((solution, ids))
    return sequences


def render_prompts(task: Task, items: int, worker: TemplateWorker) -> list[ItemPrompt]:
    """Render the prompts that lm-eval would build of a plain task with local data.

    None for any other.

    lm-eval and its imports take 130 MB, for which the recipe's `memory` has no room.
    """
    config, rows, examples = task.config, _read_local_rows(task, items), _read_examples(task)
    if rows is None or examples is None or task.python or _UNSUPPORTED_KEYS & config.keys():
        return []
    if not isinstance(config.get("doc_to_text"), str):
        return []
    delimiter = config.get("target_delimiter", " ")
    separator = config.get("fewshot_delimiter", "\n\n")
    prefix = "".join(
        f"{_render_prompt(task, row, worker)}{delimiter}"
        f"{_render_target(task, row, worker)}{separator}"
        for row in examples
    )
    return [
        (number, prefix + _render_prompt(task, row, worker), row) for number, row in enumerate(rows)
    ]


def _render_prompt(task: Task, row: Mapping[str, object], worker: TemplateWorker) -> str:
    """Return the question of a row."""
    template = str(task.config["doc_to_text"])
    return str(render_field(worker, f"{task.name}: doc_to_text", template, row))


def _render_target(task: Task, row: Mapping[str, object], worker: TemplateWorker) -> str:
    """Return the answer of a worked example; of several, the first."""
    template = str(task.config["doc_to_target"])
    target = render_target(worker, f"{task.name}: doc_to_target", template, row)
    return str(target[0] if isinstance(target, list) and target else target)


def _read_local_rows(task: Task, items: int) -> list[dict[str, object]] | None:
    """Read the first rows of the test split."""
    file = task.files.get(str(task.config.get("test_split")))
    return None if file is None else task_files.read_first_rows(file.path, file.rows, items)


def _read_examples(task: Task) -> list[dict[str, object]] | None:
    """Read the rows of the worked examples; None if lm-eval would select them in another way."""
    count, config = task.config.get("num_fewshot", 0), task.config.get("fewshot_config", {})
    if not count:
        return []
    if not isinstance(count, int) or not isinstance(config, dict):
        return None
    if config.get("sampler") != "first_n" or config.keys() - _SUPPORTED_FEWSHOT_KEYS:
        return None
    if isinstance(samples := config.get("samples"), list):
        return samples[:count]
    split = task.config.get("fewshot_split")
    file = None if split == task.config.get("test_split") else task.files.get(str(split))
    return None if file is None else task_files.read_first_rows(file.path, file.rows, count)


def build_prompts_with_lm_eval(task: Task, items: int) -> list[ItemPrompt]:
    """Build the prompts of any task with lm-eval."""
    with lm_eval_tasks.open_lm_eval_tasks([task]) as loaded:
        if loaded.failed:
            raise EvaluationError("; ".join(loaded.failed.values()))
        lm_eval_task = loaded.lm_eval_tasks[task.name]
        lm_eval_task.build_all_requests(limit=items)
        return [
            (request.doc_id, request.args[0], request.doc) for request in lm_eval_task.instances
        ]


def score_solutions(pair: StreamPair, items: Sequence[GoldSolution]) -> list[ScoredSolution]:
    """Compute the log-likelihood per token of every solution, sorted by task and item.

    The solutions' sequences are the last ones of the streams.
    """
    if not items:
        return []
    tokens = pair.reference.tokens
    ends = [start + length for start, length in zip(tokens.starts, tokens.lengths, strict=True)]
    # the row before a token predicts it
    rows = torch.cat([
        torch.arange(end - 1 - item.n_tokens, end - 1)
        for end, item in zip(ends[-len(items) :], items, strict=True)
    ])
    compared, counts = pair.compare(rows), [item.n_tokens for item in items]
    source_nll, artifact_nll = (
        compared.nll_source.split(counts),
        compared.nll_quantized.split(counts),
    )
    scored = [
        ScoredSolution(solution=item, source=-float(p.mean()), artifact=-float(q.mean()))
        for item, p, q in zip(items, source_nll, artifact_nll, strict=True)
    ]
    return sorted(scored, key=lambda entry: (entry.solution.task, entry.solution.doc_id))


def make_likelihood_rows(
    names: Sequence[str], solutions: GoldSolutions, scored: Sequence[ScoredSolution]
) -> tuple[LikelihoodResult, ...]:
    """Return one row per task, in the recipe's order; tasks without gold have none."""
    rows = []
    for name in map(tasks.get_task_name, names):
        entries = [entry for entry in scored if entry.solution.task == name]
        if name in solutions.failed:
            rows.append(
                LikelihoodResult(task=name, status="not run", reason=solutions.failed[name])
            )
        elif name in solutions.hashes and len(entries) < 2:
            reason = f"{len(entries)} solutions fit into a sequence, too few to compare"
            rows.append(
                LikelihoodResult(task=name, status="not run", reason=reason, n=len(entries))
            )
        elif name in solutions.hashes:
            rows.append(_make_row(name, entries, solutions.hashes[name]))
    return tuple(rows)


def _make_row(name: str, entries: Sequence[ScoredSolution], sha256: str) -> LikelihoodResult:
    source = [entry.source for entry in entries]
    artifact = [entry.artifact for entry in entries]
    change = statistics.paired_difference(source, artifact)
    return LikelihoodResult(
        task=name,
        n=len(entries),
        tokens=sum(entry.solution.n_tokens for entry in entries),
        source=sum(source) / len(entries),
        artifact=sum(artifact) / len(entries),
        difference=Figure(
            value=change.mean,
            se=change.standard_error,
            ci=(change.interval.low, change.interval.high),
        ),
        data_sha256=sha256,
    )


def write_solutions(scored: Sequence[ScoredSolution], path: Path) -> None:
    """Write task, doc_id, tokens and log-likelihood per token of every solution as Parquet."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    solutions = [entry.solution for entry in scored]
    columns = {
        "task": arrow.array([solution.task for solution in solutions], arrow.string()),
        "doc_id": arrow.array([solution.doc_id for solution in solutions], arrow.int64()),
        "n_tokens": arrow.array([solution.n_tokens for solution in solutions], arrow.int64()),
        "source": arrow.array([entry.source for entry in scored], arrow.float64()),
        "artifact": arrow.array([entry.artifact for entry in scored], arrow.float64()),
    }
    parquet.write_table(arrow.table(columns), path)
