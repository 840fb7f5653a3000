"""What an artifact's samples add to its report: how KL is spread over the tokens, and the items that changed.

Read from quantkit/samples/*.parquet alone; a sample that was not taken is None or empty.
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
"""Of samples; 300 benchmark items have a megabyte, 70,000 tokens two."""

FLOOR = -9.0  # log10 of a KL that float32 logits cannot tell from 0
BINS_PER_DECADE = 4


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Tokens per bin of log10(KL), domain by domain. The first bin also holds everything below it."""

    start: float
    step: float
    counts: Mapping[str, tuple[int, ...]]
    not_finite: int

    @property
    def bins(self) -> int:
        """Bins of every domain."""
        return max(map(len, self.counts.values()), default=0)

    @property
    def tokens(self) -> int:
        """Tokens in all bins."""
        return sum(map(sum, self.counts.values()))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model said to one item, and what came of it."""

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
        """The artifact scores less than the source."""
        return self.artifact.score < self.source.score

    @property
    def divergence(self) -> int:
        """The first character at which the answers differ; the length of both when they are equal."""
        return find_divergence(self.source.text, self.artifact.text)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """All that the report shows beyond fidelity.json."""

    histogram: Histogram | None = None
    changed: tuple[ChangedItem, ...] = ()  # regressions first
    reworded: int = 0  # items whose answers differ and whose outcome does not
    items: int = 0


def find_divergence(first: str, second: str) -> int:
    """The first character at which two texts differ; the length of both when they are equal."""
    return len(os.path.commonprefix([first, second]))


def read_samples(artifact: Path, filters: Mapping[str, str]) -> Samples:
    """The samples in an artifact's folder; `filters`: task -> the filter it is scored by.

    Raises ArtifactError for a file that is not what quantkit wrote.
    """
    histogram = (
        _histogram(artifact / TOKEN_SAMPLES) if (artifact / TOKEN_SAMPLES).is_file() else None
    )
    if not (artifact / BENCHMARK_SAMPLES).is_file():
        return Samples(histogram=histogram)
    names = ["task", "filter", "doc_id", "prompt", "target"]
    names += [
        f"{who}_{name}" for who in ("base", "quant") for name in ("response", "score", "outcome")
    ]
    names += [f"{who}_{name}" for who in ("base", "quant") for name in ("n_tokens", "truncated")]
    rows: list[dict[str, Any]] = read_columns(artifact / BENCHMARK_SAMPLES, names).to_pylist()
    present = {row["task"]: row["filter"] for row in reversed(rows)}  # its first filter
    known = {(row["task"], row["filter"]) for row in rows}
    chosen = {
        task: name if (task, name := filters.get(task, "")) in known else present[task]
        for task in present
    }
    mine = [row for row in rows if row["filter"] == chosen[row["task"]]]
    scored = [
        row for row in mine if row["base_score"] is not None and row["quant_score"] is not None
    ]
    same = [row for row in scored if row["base_score"] == row["quant_score"]]
    changed = [_changed(row) for row in scored if row["base_score"] != row["quant_score"]]
    return Samples(
        histogram=histogram,
        changed=tuple(sorted(changed, key=lambda item: (not item.lost, item.task, item.item))),
        reworded=sum(row["base_response"] != row["quant_response"] for row in same),
        items=len(scored),
    )


def _histogram(path: Path) -> Histogram:
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
        picked = finite & np.array([name == domain for name in domains])
        counts[domain] = tuple(int(n) for n in np.bincount(place[picked], minlength=bins))
    return Histogram(
        start=FLOOR, step=1 / BINS_PER_DECADE, counts=counts, not_finite=int((~finite).sum())
    )


def _changed(row: Mapping[str, Any]) -> ChangedItem:
    return ChangedItem(
        task=row["task"],
        item=row["doc_id"],
        prompt=row["prompt"],
        target=row["target"],
        source=parse_answer(row, "base"),
        artifact=parse_answer(row, "quant"),
    )


def parse_answer(row: Mapping[str, Any], who: str) -> Answer:
    """One side of a row of benchmarks.parquet: `who` is base or quant."""
    return Answer(
        text=row[f"{who}_response"],
        score=row[f"{who}_score"],
        outcome=row[f"{who}_outcome"],
        n_tokens=row[f"{who}_n_tokens"],
        truncated=row[f"{who}_truncated"],
    )


def read_columns(path: Path, columns: Sequence[str]) -> Any:
    """The columns of a Parquet file as an Arrow table; ArtifactError when it is something else.

    A few bytes can stand for a billion rows, and one text for a million of them: both are counted before anything is
    written out.
    """
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, read_dictionary=list(columns)) as file:
            told = file.metadata
            stored = sum(
                told.row_group(number).total_byte_size for number in range(told.num_row_groups)
            )
            if told.num_rows > MOST_ROWS or stored > MOST_BYTES:
                raise _too_large(path, f"{told.num_rows:,} rows of {stored / 1e9:.1f} GB")
            table = file.read(columns=list(columns)).select(list(columns))
        if (texts := sum(_text_bytes(column) for column in table.columns)) > MOST_BYTES:
            raise _too_large(path, f"texts of {texts / 1e9:.1f} GB")
        whole = arrow.table({name: _written_out(table[name]) for name in columns})
        whole.validate(full=True)  # texts are UTF-8
        return whole
    except (OSError, KeyError, ValueError, arrow.ArrowException) as fault:
        raise ArtifactError(
            f"{path}: expected samples with the columns {', '.join(columns)}, found: {str(fault)[:200]}; pull or "
            "build the artifact again"
        ) from None


def _too_large(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected samples of at most {MOST_ROWS:,} rows and {MOST_BYTES / 1e9:.0f} GB, found {found}; do not "
        "use this artifact"
    )


def _text_bytes(column: Any) -> int:
    """Bytes that the texts of a dictionary-encoded column have when each row has its own; 0 for other columns."""
    import pyarrow as arrow
    import pyarrow.compute as compute

    if not arrow.types.is_dictionary(column.type):
        return 0
    total = 0
    for piece in column.chunks:
        lengths = compute.binary_length(piece.dictionary).cast("int64")
        total += compute.sum(lengths.take(piece.indices)).as_py() or 0
    return total


def _written_out(column: Any) -> Any:
    """A column without its dictionary."""
    import pyarrow as arrow

    return column.cast(column.type.value_type) if arrow.types.is_dictionary(column.type) else column
