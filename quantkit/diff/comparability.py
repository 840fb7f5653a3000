"""Comparability of two sides: which parts can be compared, and the reason for each that cannot.
Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.artifact.fidelity_schema import BenchmarkResult, LikelihoodResult, TextSet
from quantkit.diff.sides import HASHES, ItemKey, Side

TaskResult = BenchmarkResult | LikelihoodResult
"""Result of a task: generated answers, or the likelihood of its gold solutions."""

BASELINE_NOISE = 1e-6
"""Nats by which the source's losses may differ between two builds: float32 summation order."""


@dataclass(frozen=True, kw_only=True)
class Comparability:
    """Reasons against a comparison, one sentence each; None for a comparable part.

    source: errors, figures and answers; text: the distributions; tasks: the tasks that differ.
    """

    source: str | None
    text: str | None
    tasks: Mapping[str, str]

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons."""
        return (
            (self.source,)
            if self.source
            else (*((self.text,) if self.text else ()), *self.tasks.values())
        )


def assess_comparability(a: Side, b: Side) -> Comparability:
    """Check that both have the same source, fidelity text and benchmark items."""
    return Comparability(
        source=_compare_sources(a, b), text=_compare_texts(a, b), tasks=_compare_tasks(a, b)
    )


def is_same_text(first: TextSet | None, second: TextSet | None) -> bool:
    """Return whether both texts are the same tokens of the same file."""
    parts = ("sha256", "sequences", "length", "tokens", "seed")
    return (
        first is not None
        and second is not None
        and all(getattr(first, p) == getattr(second, p) for p in parts)
    )


def compute_baseline_gap(a: Side, b: Side) -> float:
    """Return the largest difference of the source's losses between the two builds.

    In nats; 0 if the tokens of a side are unknown.
    """
    if a.tokens is None or b.tokens is None or len(a.tokens.kl) != len(b.tokens.kl):
        return 0.0
    pairs = zip(a.tokens.nll_source, b.tokens.nll_source, strict=True)
    return max((abs(first - second) for first, second in pairs), default=0.0)


def _compare_sources(a: Side, b: Side) -> str | None:
    """Return why the sources differ; None if they are the same."""
    first, second = a.fidelity.source, b.fidelity.source
    files = a.source_files or b.source_files, b.source_files or a.source_files
    if first.hash == second.hash and files[0] == files[1]:
        return None
    origins = [
        f"{side.name} was made from {side.fidelity.source.model}"
        + (f" at {side.fidelity.source.revision}" if side.fidelity.source.revision else "")
        + f" ({_format_hashes(side)})"
        for side in (a, b)
    ]
    return f"{origins[0]}, {origins[1]}: figures against different sources are not comparable"


def _format_hashes(side: Side) -> str:
    """Return the start of the source's hashes."""
    files = side.source_files or {}
    return ", ".join(
        digest[:12] for digest in (side.fidelity.source.hash, *list(files.values())[:1]) if digest
    )


def _compare_texts(a: Side, b: Side) -> str | None:
    """Return why the fidelity texts differ; None if they are the same or absent."""
    first, second = a.fidelity.measured_on, b.fidelity.measured_on
    if first is None or second is None or is_same_text(first, second):
        return None
    texts = [
        f"{side.name} was measured on {text.set} ({text.sha256[:12]}, "
        f"{text.sequences:,} x {text.length:,} tokens)"
        for side, text in ((a, first), (b, second))
    ]
    return f"{texts[0]}, {texts[1]}: distributions on different texts are not comparable"


def _compare_tasks(a: Side, b: Side) -> dict[str, str]:
    """Return the tasks whose data or items differ, each with the reason."""
    reasons: dict[str, str] = {}
    rows: list[tuple[TaskResult, TaskResult]] = []
    for first, second in (
        (a.fidelity.benchmarks, b.fidelity.benchmarks),
        (a.fidelity.likelihood, b.fidelity.likelihood),
    ):
        other_rows: dict[str, TaskResult] = {row.task: row for row in second}
        rows += [(row, other_rows[row.task]) for row in first if row.task in other_rows]
    for row, other in rows:
        has_run = row.status == other.status == "ok"
        if row.task not in reasons and has_run and row.data_sha256 != other.data_sha256:
            reasons[row.task] = (
                f"{row.task}: {a.name} was tested on other data ({row.data_sha256[:12]}) than "
                f"{b.name} ({other.data_sha256[:12]}): the scores are not comparable"
            )
    for key, name in _list_changed_items(a, b):
        task, _, item = key
        if task not in reasons:
            reasons[task] = (
                f"{task}: {_WORDS[name]} of item {item} differs between {a.name} and {b.name} "
                f"({name} differs): the scores are not comparable"
            )
    return reasons


_WORDS = dict(zip(HASHES, ("the item itself", "the prompt", "the expected answer"), strict=True))


def _list_changed_items(a: Side, b: Side) -> list[tuple[ItemKey, str]]:
    """Return the items that both sides have with different content, and the hash that differs.

    A different prompt is named first.
    """
    first, second = a.items or {}, b.items or {}
    order = ("prompt_hash", "doc_hash", "target_hash")
    return [
        (
            key,
            next(
                name
                for name in order
                if item.hashes[HASHES.index(name)] != other.hashes[HASHES.index(name)]
            ),
        )
        for key, item in first.items()
        if (other := second.get(key)) is not None and other.hashes != item.hashes
    ]
