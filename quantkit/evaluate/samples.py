"""Per-item results as Parquet files: the samples of an artifact, and the cache of a source's results.

One schema, so that a file says what it is; the same items give the same bytes with the same pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantkit.errors import EvaluationError


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResult:
    """One item of one task under one filter.

    score is None when the item could not be scored (no sandbox); `outcome` says how the score came about: what the
    filter extracted, or how the program ended. n_tokens counts generated tokens; truncated: the limit ended the
    answer; parsed: an answer could be extracted, or the program is Python. The three hashes are lm-eval's.
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
        """What two runs are joined on."""
        return self.task, self.filter, self.doc_id


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemPair:
    """One item answered by the source and by the artifact; same prompt, same target."""

    baseline: ItemResult
    candidate: ItemResult

    @property
    def first_divergence(self) -> int | None:
        """The first character at which the answers differ; None when they are equal."""
        first, second = self.baseline.response, self.candidate.response
        return None if first == second else len(os.path.commonprefix([first, second]))


_TYPES = {
    "task": "string", "domain": "string", "filter": "string", "doc_id": "int64", "doc_hash": "string",
    "prompt_hash": "string", "target_hash": "string", "prompt": "string", "target": "string", "response": "string",
    "score": "float64", "outcome": "string", "n_tokens": "int64", "truncated": "bool", "parsed": "bool",
}  # fmt: skip
_SHARED = (
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
_OWN = ("response", "score", "outcome", "n_tokens", "truncated", "parsed")


def pair(baseline: Sequence[ItemResult], candidate: Sequence[ItemResult]) -> list[ItemPair]:
    """Join two runs item by item; EvaluationError unless both answered the same items from the same prompts."""
    first, second = {item.key: item for item in baseline}, {item.key: item for item in candidate}
    if first.keys() != second.keys():
        task, filter_, doc = sorted(first.keys() ^ second.keys())[0]
        raise EvaluationError(
            f"{task}: item {doc} ({filter_}) was answered by one model only; run both with the same tasks and limit"
        )
    for key, item in first.items():
        other = second[key]
        for name in ("doc_hash", "prompt_hash", "target_hash"):
            if getattr(item, name) != getattr(other, name):
                raise EvaluationError(
                    f"{item.task}: item {item.doc_id}: {name} differs between the two models; both must be run with "
                    "the same task, data and chat template"
                )
    return [ItemPair(baseline=item, candidate=second[key]) for key, item in first.items()]


def average(runs: Sequence[Sequence[ItemResult]]) -> list[ItemResult]:
    """One item per question from a run per seed, for statistics over items: the seeds of an item are not independent.

    The score is the mean, None when a seed has none; the response is the first seed's; truncated: one of them was cut;
    parsed: all of them were.
    """
    first, *others = runs
    if not others:
        return list(first)
    by_key = [{item.key: item for item in run} for run in runs]
    found = []
    for item in first:
        same = [run[item.key] for run in by_key]
        known = [one.score for one in same if one.score is not None]
        found.append(
            replace(
                item,
                score=sum(known) / len(same) if len(known) == len(same) else None,
                outcome=item.outcome if len(known) < len(same) else f"mean of {len(same)} answers",
                n_tokens=round(sum(one.n_tokens for one in same) / len(same)),
                truncated=any(one.truncated for one in same),
                parsed=all(one.parsed for one in same),
            )
        )
    return found


def to_parquet(items: Sequence[ItemResult], path: Path) -> None:
    """Write the items of one run, in their order; written beside and renamed."""
    _write([asdict(item) for item in items], _TYPES, path)


def pairs_to_parquet(pairs: Sequence[ItemPair], path: Path) -> None:
    """Write both runs side by side: shared columns, then base_*, then quant_*, then first_divergence."""
    types = {name: _TYPES[name] for name in _SHARED}
    types |= {f"base_{name}": _TYPES[name] for name in _OWN} | {
        f"quant_{name}": _TYPES[name] for name in _OWN
    }
    types["first_divergence"] = "int64"
    _write([_pair_row(both) for both in pairs], types, path)


def from_parquet(path: Path) -> list[ItemResult]:
    """The items that `to_parquet` wrote; EvaluationError when the file is something else."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as fault:
        raise EvaluationError(
            f"{path}: expected a Parquet file of items, found: {str(fault)[:200]}"
        ) from None
    if rows and rows[0].keys() != _TYPES.keys():
        raise EvaluationError(
            f"{path}: expected columns {', '.join(_TYPES)}, found {', '.join(rows[0])}"
        )
    return [ItemResult(**row) for row in rows]


def cache_key(
    source_hash: str,
    task_hashes: Mapping[str, str],
    limit: int | None,
    dtype: str,
    versions: Mapping[str, str],
) -> str:
    """The name under which a run's items may be used again: everything that can change an answer goes in.

    `task_hashes`: task name -> Task.sha256; `versions`: whatever decodes and scores (torch, transformers, lm-eval,
    the sandbox's Python).
    """
    parts = {
        "schema": list(_TYPES), "source": source_hash, "tasks": dict(task_hashes), "limit": limit, "dtype": dtype,
        "versions": dict(versions),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_cached(folder: Path, key: str) -> list[ItemResult] | None:
    """Items stored under `key`; None when there are none, or when the file is damaged (it is then made again)."""
    path = folder / f"{key}.parquet"
    if not path.is_file():
        return None
    try:
        return from_parquet(path)
    except EvaluationError:
        return None


def write_cached(folder: Path, key: str, items: Sequence[ItemResult]) -> None:
    """Store items under `key`; two processes may do so at once."""
    folder.mkdir(parents=True, exist_ok=True)
    to_parquet(items, folder / f"{key}.parquet")


def _pair_row(both: ItemPair) -> dict[str, object]:
    first, second = asdict(both.baseline), asdict(both.candidate)
    row = {name: first[name] for name in _SHARED}
    row |= {f"base_{name}": first[name] for name in _OWN} | {
        f"quant_{name}": second[name] for name in _OWN
    }
    return {**row, "first_divergence": both.first_divergence}


def _write(rows: Sequence[Mapping[str, object]], types: Mapping[str, str], path: Path) -> None:
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in types.items()])
    columns = {name: [row[name] for row in rows] for name in types}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        parquet.write_table(arrow.table(columns, schema=schema), part, compression="zstd")
        os.replace(part, path)
    except OSError as fault:
        part.unlink(missing_ok=True)
        raise EvaluationError(
            f"{path}: cannot be written: {fault}; choose another folder"
        ) from None
