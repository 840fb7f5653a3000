"""Per-item results as Parquet files: samples of an artifact, cached results of a source.

All files have one schema; the same items give the same bytes with the same version of pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantkit.errors import EvaluationError
from quantkit.io.files import write_atomic


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResult:
    """One item of one task under one filter. The field names are columns of the Parquet files.

    score: None if the item could not be scored (no sandbox); outcome: the text that the filter
    extracted, or how the program ended; n_tokens: generated tokens; truncated: the limit ended the
    answer; parsed: an answer could be extracted, or the program is Python. The three hashes are
    lm-eval's.
    """

    task: str
    domain: str
    filter: str
    doc_id: int
    doc_hash: str
    prompt_hash: str
    target_hash: str
    prompt: str
    target: str
    response: str
    score: float | None
    outcome: str
    n_tokens: int
    truncated: bool
    parsed: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """The key on which two runs are joined."""
        return self.task, self.filter, self.doc_id


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemPair:
    """One item answered by the source and by the artifact; same prompt, same target."""

    baseline: ItemResult
    candidate: ItemResult

    @property
    def first_divergence(self) -> int | None:
        """Index of the first character at which the answers differ; None if they are equal."""
        first, second = self.baseline.response, self.candidate.response
        return None if first == second else len(os.path.commonprefix([first, second]))


_TYPES = {
    "task": "string",
    "domain": "string",
    "filter": "string",
    "doc_id": "int64",
    "doc_hash": "string",
    "prompt_hash": "string",
    "target_hash": "string",
    "prompt": "string",
    "target": "string",
    "response": "string",
    "score": "float64",
    "outcome": "string",
    "n_tokens": "int64",
    "truncated": "bool",
    "parsed": "bool",
}
_SHARED_COLUMNS = (
    "task",
    "domain",
    "filter",
    "doc_id",
    "doc_hash",
    "prompt_hash",
    "target_hash",
    "prompt",
    "target",
)
_OWN_COLUMNS = ("response", "score", "outcome", "n_tokens", "truncated", "parsed")


def pair_items(baseline: Sequence[ItemResult], candidate: Sequence[ItemResult]) -> list[ItemPair]:
    """Join two runs item by item.

    Raises EvaluationError unless both runs have the same items with the same prompts.
    """
    baselines = {item.key: item for item in baseline}
    candidates = {item.key: item for item in candidate}
    if baselines.keys() != candidates.keys():
        task, filter_name, doc_id = min(baselines.keys() ^ candidates.keys())
        raise EvaluationError(
            f"{task}: item {doc_id} ({filter_name}) was answered by one model only; run both with "
            "the same tasks and limit"
        )
    pairs = [ItemPair(baseline=item, candidate=candidates[key]) for key, item in baselines.items()]
    for pair in pairs:
        for name in ("doc_hash", "prompt_hash", "target_hash"):
            if getattr(pair.baseline, name) != getattr(pair.candidate, name):
                raise EvaluationError(
                    f"{pair.baseline.task}: item {pair.baseline.doc_id}: {name} differs between "
                    "the two models; run both with the same task, data and chat template"
                )
    return pairs


def average_runs(runs: Sequence[Sequence[ItemResult]]) -> list[ItemResult]:
    """Average one run per seed into one item per question; seeds are not independent.

    score: the mean, None if a seed has none; response: the first seed's; truncated: any of them
    was; parsed: all of them were.
    """
    first_run, *other_runs = runs
    if not other_runs:
        return list(first_run)
    runs_by_key = [{item.key: item for item in run} for run in runs]
    averaged = []
    for item in first_run:
        answers = [run[item.key] for run in runs_by_key]
        n = len(answers)
        scores = [answer.score for answer in answers if answer.score is not None]
        is_complete = len(scores) == n
        averaged.append(
            replace(
                item,
                score=sum(scores) / n if is_complete else None,
                outcome=f"mean of {n} answers" if is_complete else item.outcome,
                n_tokens=round(sum(answer.n_tokens for answer in answers) / n),
                truncated=any(answer.truncated for answer in answers),
                parsed=all(answer.parsed for answer in answers),
            )
        )
    return averaged


def write_items(items: Sequence[ItemResult], path: Path) -> None:
    """Write the items of one run, in their order.

    The file is written under another name and renamed.
    """
    _write_parquet([asdict(item) for item in items], _TYPES, path)


def write_pairs(pairs: Sequence[ItemPair], path: Path) -> None:
    """Write both runs side by side: shared columns, then base_*, then quant_*, then
    first_divergence.
    """
    types = {name: _TYPES[name] for name in _SHARED_COLUMNS}
    types |= {f"base_{name}": _TYPES[name] for name in _OWN_COLUMNS}
    types |= {f"quant_{name}": _TYPES[name] for name in _OWN_COLUMNS}
    types["first_divergence"] = "int64"
    _write_parquet([_make_pair_row(pair) for pair in pairs], types, path)


def read_items(path: Path) -> list[ItemResult]:
    """Read the items that `write_items` wrote. Raises EvaluationError for any other file."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise EvaluationError(
            f"{path}: expected a Parquet file of items, found: {str(error)[:200]}; "
            "evaluate the model again"
        ) from None
    if rows and rows[0].keys() != _TYPES.keys():
        raise EvaluationError(
            f"{path}: expected columns {', '.join(_TYPES)}, found {', '.join(rows[0])}; "
            "evaluate the model again"
        )
    return [ItemResult(**row) for row in rows]


def compute_cache_key(
    source_hash: str,
    task_hashes: Mapping[str, str],
    limit: int | None,
    compute: str,
    versions: Mapping[str, str],
) -> str:
    """Return the cache key of a run's items: a hash of everything that can change an answer.

    task_hashes: task name -> Task.sha256; compute: dtype and device; versions: of the packages that
    decode and score (torch, transformers, lm-eval, the sandbox's Python).
    """
    parts = {
        "schema": list(_TYPES),
        "source": source_hash,
        "tasks": dict(task_hashes),
        "limit": limit,
        "dtype": compute,
        "versions": dict(versions),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_cached_items(folder: Path, key: str) -> list[ItemResult] | None:
    """Return the items stored under `key`; None if there are none, or if the file is damaged."""
    path = folder / f"{key}.parquet"
    if not path.is_file():
        return None
    try:
        return read_items(path)
    except EvaluationError:
        return None


def write_cached_items(folder: Path, key: str, items: Sequence[ItemResult]) -> None:
    """Store items under `key`; two processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_items(items, folder / f"{key}.parquet")


def _make_pair_row(pair: ItemPair) -> dict[str, object]:
    baseline, candidate = asdict(pair.baseline), asdict(pair.candidate)
    row = {name: baseline[name] for name in _SHARED_COLUMNS}
    row |= {f"base_{name}": baseline[name] for name in _OWN_COLUMNS}
    row |= {f"quant_{name}": candidate[name] for name in _OWN_COLUMNS}
    return {**row, "first_divergence": pair.first_divergence}


def _write_parquet(
    rows: Sequence[Mapping[str, object]], types: Mapping[str, str], path: Path
) -> None:
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in types.items()])
    columns = {name: [row[name] for row in rows] for name in types}
    content = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns, schema=schema), content, compression="zstd")
    write_atomic(path, content.getvalue().to_pybytes())
