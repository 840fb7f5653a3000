"""The samples of an artifact: histogram of KL per token, and benchmark items with changed answers.

Read from quantkit/samples/*.parquet; a sample that was not taken is None or empty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from quantkit.artifact.layout import BENCHMARK_SAMPLES, TOKEN_SAMPLES
from quantkit.errors import ArtifactError

MOST_ROWS = 50_000_000
MOST_BYTES = 1_000_000_000
"""Limits of samples; 300 benchmark items take 1 MB, 70,000 tokens 2 MB."""

FLOOR = -9.0  # log10 of a KL that float32 logits cannot distinguish from 0
BINS_PER_DECADE = 4


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Tokens per bin of log10(KL) by domain. The first bin includes all smaller values."""

    start: float
    step: float
    counts: Mapping[str, tuple[int, ...]]
    not_finite: int

    @property
    def bins(self) -> int:
        """Number of bins of every domain."""
        return max(map(len, self.counts.values()), default=0)

    @property
    def tokens(self) -> int:
        """Number of tokens in all bins."""
        return sum(map(sum, self.counts.values()))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to an item, with its score and extracted result."""

    text: str
    score: float
    outcome: str
    n_tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class ChangedItem:
    """An item whose score differs between source and artifact."""

    task: str
    item: int
    prompt: str
    target: str
    source: Answer
    artifact: Answer

    @property
    def lost(self) -> bool:
        """Whether the artifact scores less than the source."""
        return self.artifact.score < self.source.score

    @property
    def divergence(self) -> int:
        """Position of the first difference of the answers; the length of both if they are equal."""
        return find_divergence(self.source.text, self.artifact.text)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Content of the page that is not in fidelity.json."""

    histogram: Histogram | None = None
    changed: tuple[ChangedItem, ...] = ()  # regressions first
    reworded: int = 0  # items with other answers and the same score
    items: int = 0


def find_divergence(first: str, second: str) -> int:
    """Return the position of the first difference; the length of both if they are equal."""
    return len(os.path.commonprefix([first, second]))


def read_samples(artifact: Path, filters: Mapping[str, str]) -> Samples:
    """Read the samples of an artifact's folder; `filters` maps tasks to their scoring filters.

    Raises ArtifactError for a damaged file.
    """
    histogram = (
        _make_histogram(artifact / TOKEN_SAMPLES) if (artifact / TOKEN_SAMPLES).is_file() else None
    )
    if not (artifact / BENCHMARK_SAMPLES).is_file():
        return Samples(histogram=histogram)
    names = ["task", "filter", "doc_id", "prompt", "target"]
    names += [
        f"{side}_{name}" for side in ("base", "quant") for name in ("response", "score", "outcome")
    ]
    names += [f"{side}_{name}" for side in ("base", "quant") for name in ("n_tokens", "truncated")]
    rows: list[dict[str, Any]] = read_columns(artifact / BENCHMARK_SAMPLES, names).to_pylist()
    first_filters = {
        row["task"]: row["filter"] for row in reversed(rows)
    }  # the first filter of a task
    pairs = {(row["task"], row["filter"]) for row in rows}
    scoring = {
        task: name if (task, name := filters.get(task, "")) in pairs else first
        for task, first in first_filters.items()
    }
    by_filter = [row for row in rows if row["filter"] == scoring[row["task"]]]
    scored = [
        row for row in by_filter if row["base_score"] is not None and row["quant_score"] is not None
    ]
    same = [row for row in scored if row["base_score"] == row["quant_score"]]
    changed = [_make_changed_item(row) for row in scored if row["base_score"] != row["quant_score"]]
    return Samples(
        histogram=histogram,
        changed=tuple(sorted(changed, key=lambda item: (not item.lost, item.task, item.item))),
        reworded=sum(row["base_response"] != row["quant_response"] for row in same),
        items=len(scored),
    )


def _make_histogram(path: Path) -> Histogram:
    import numpy as np

    table = read_columns(path, ["domain", "kl"])
    kl = table["kl"].to_numpy().astype(np.float64)
    domains: Sequence[str] = table["domain"].to_pylist()
    finite = np.isfinite(kl)
    logs = np.log10(np.maximum(kl, 10**FLOOR), where=finite, out=np.full(len(kl), FLOOR))
    highest = float(logs[finite].max()) if finite.any() else FLOOR
    bins = max(1, ceil((highest - FLOOR) * BINS_PER_DECADE + 1e-9))
    place = np.minimum(((logs - FLOOR) * BINS_PER_DECADE).astype(int), bins - 1)
    counts = {}
    for domain in sorted(set(domains)):
        is_domain = finite & np.array([name == domain for name in domains])
        counts[domain] = tuple(int(n) for n in np.bincount(place[is_domain], minlength=bins))
    return Histogram(
        start=FLOOR, step=1 / BINS_PER_DECADE, counts=counts, not_finite=int((~finite).sum())
    )


def _make_changed_item(row: Mapping[str, Any]) -> ChangedItem:
    return ChangedItem(
        task=row["task"],
        item=row["doc_id"],
        prompt=row["prompt"],
        target=row["target"],
        source=parse_answer(row, "base"),
        artifact=parse_answer(row, "quant"),
    )


def parse_answer(row: Mapping[str, Any], side: str) -> Answer:
    """Return one side of a row of benchmarks.parquet; `side` is base or quant."""
    return Answer(
        text=row[f"{side}_response"],
        score=row[f"{side}_score"],
        outcome=row[f"{side}_outcome"],
        n_tokens=row[f"{side}_n_tokens"],
        truncated=row[f"{side}_truncated"],
    )


def read_columns(path: Path, columns: Sequence[str]) -> Any:
    """Read columns of a Parquet file as an Arrow table; raises ArtifactError for a damaged file.

    A few bytes can encode a billion rows, and one dictionary entry a million texts, so rows and
    text sizes are checked before the columns are decoded.
    """
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, read_dictionary=list(columns)) as file:
            metadata = file.metadata
            stored = sum(
                metadata.row_group(number).total_byte_size
                for number in range(metadata.num_row_groups)
            )
            if metadata.num_rows > MOST_ROWS or stored > MOST_BYTES:
                raise _make_size_error(path, f"{metadata.num_rows:,} rows of {stored / 1e9:.1f} GB")
            table = file.read(columns=list(columns)).select(list(columns))
        if (texts := sum(_count_text_bytes(column) for column in table.columns)) > MOST_BYTES:
            raise _make_size_error(path, f"texts of {texts / 1e9:.1f} GB")
        whole = arrow.table({name: _decode_dictionary(table[name]) for name in columns})
        whole.validate(full=True)  # texts are UTF-8
        return whole
    except (OSError, KeyError, ValueError, arrow.ArrowException) as fault:
        raise ArtifactError(
            f"{path}: expected samples with the columns {', '.join(columns)}, found: "
            f"{str(fault)[:200]}; pull or build the artifact again"
        ) from None


def has_column(path: Path, name: str) -> bool:
    """Return whether a Parquet file has a column; raises ArtifactError for a damaged file."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        return name in parquet.read_schema(path).names
    except (OSError, ValueError, arrow.ArrowException) as fault:
        raise ArtifactError(
            f"{path}: expected samples with the columns that `quantkit diff` reads, found: "
            f"{str(fault)[:200]}; pull or build the artifact again"
        ) from None


def _make_size_error(path: Path, size: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected samples of at most {MOST_ROWS:,} rows and {MOST_BYTES / 1e9:.0f} GB, "
        f"found {size}; do not use this artifact"
    )


def _count_text_bytes(column: Any) -> int:
    """Return the bytes of a dictionary-encoded column's texts once decoded; 0 for other columns."""
    import pyarrow as arrow
    import pyarrow.compute as compute

    if not arrow.types.is_dictionary(column.type):
        return 0
    total = 0
    for piece in column.chunks:
        lengths = compute.binary_length(piece.dictionary).cast("int64")
        total += compute.sum(lengths.take(piece.indices)).as_py() or 0
    return total


def _decode_dictionary(column: Any) -> Any:
    """Return a column without its dictionary."""
    import pyarrow as arrow

    return column.cast(column.type.value_type) if arrow.types.is_dictionary(column.type) else column
