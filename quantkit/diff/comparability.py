"""What of two sides may be compared, and why the rest may not. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.artifact.fidelity_schema import BenchmarkResult, LikelihoodResult, TextSet
from quantkit.diff.sides import HASHES, ItemKey, Side

TaskResult = BenchmarkResult | LikelihoodResult
"""What a task gave: generated answers, or the likelihood of its gold solutions."""

BASELINE_NOISE = 1e-6
"""Nats by which the source's own losses may differ between two builds: another order of sums in float32."""


@dataclass(frozen=True, kw_only=True)
class Comparability:
    """source: whether errors, figures and answers may be compared at all; text: the distributions; tasks: each task.

    None where it may be, else one sentence why not.
    """

    source: str | None
    text: str | None
    tasks: Mapping[str, str]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What keeps the two from being compared in full."""
        return (
            (self.source,)
            if self.source
            else (*((self.text,) if self.text else ()), *self.tasks.values())
        )


def assess_comparability(a: Side, b: Side) -> Comparability:
    """Whether the two were made from one source and measured on one text and on the same items."""
    return Comparability(source=_source(a, b), text=_text(a, b), tasks=_tasks(a, b))


def is_same_text(first: TextSet | None, second: TextSet | None) -> bool:
    """Whether the same tokens were cut from the same file."""
    parts = ("sha256", "sequences", "length", "tokens", "seed")
    return (
        first is not None
        and second is not None
        and all(getattr(first, p) == getattr(second, p) for p in parts)
    )


def compute_baseline_gap(a: Side, b: Side) -> float:
    """The largest difference of the source's own losses between the two builds, in nats; 0 where they are not known."""
    if a.tokens is None or b.tokens is None or len(a.tokens.kl) != len(b.tokens.kl):
        return 0.0
    pairs = zip(a.tokens.nll_source, b.tokens.nll_source, strict=True)
    return max((abs(first - second) for first, second in pairs), default=0.0)


def _source(a: Side, b: Side) -> str | None:
    first, second = a.fidelity.source, b.fidelity.source
    if first.hash == second.hash and (a.source_files or b.source_files) == (
        b.source_files or a.source_files
    ):
        return None
    told = [
        f"{side.name} was made from {side.fidelity.source.model}"
        + (f" at {side.fidelity.source.revision}" if side.fidelity.source.revision else "")
        + f" ({_brief(side)})"
        for side in (a, b)
    ]
    return f"{told[0]}, {told[1]}: figures against different sources do not compare"


def _brief(side: Side) -> str:
    """Something of the source's hashes that tells it apart."""
    files = side.source_files or {}
    return ", ".join(
        digest[:12] for digest in (side.fidelity.source.hash, *list(files.values())[:1]) if digest
    )


def _text(a: Side, b: Side) -> str | None:
    first, second = a.fidelity.measured_on, b.fidelity.measured_on
    if first is None or second is None or is_same_text(first, second):
        return None
    told = [
        f"{side.name} was measured on {text.set} ({text.sha256[:12]}, {text.sequences:,} x {text.length:,} tokens)"
        for side, text in ((a, first), (b, second))
    ]
    return f"{told[0]}, {told[1]}: distributions on different text do not compare"


def _tasks(a: Side, b: Side) -> dict[str, str]:
    """Tasks whose data or items differ, each with the reason."""
    found: dict[str, str] = {}
    rows: list[tuple[TaskResult, TaskResult]] = []
    for first, second in (
        (a.fidelity.benchmarks, b.fidelity.benchmarks),
        (a.fidelity.likelihood, b.fidelity.likelihood),
    ):
        other_rows: dict[str, TaskResult] = {row.task: row for row in second}
        rows += [(row, other_rows[row.task]) for row in first if row.task in other_rows]
    for row, other in rows:
        if (
            row.task not in found
            and row.status == other.status == "ok"
            and row.data_sha256 != other.data_sha256
        ):
            found[row.task] = (
                f"{row.task}: {a.name} was asked other data ({row.data_sha256[:12]}) than {b.name} "
                f"({other.data_sha256[:12]}): the scores do not compare"
            )
    for key, name in _changed_items(a, b):
        task, _, item = key
        if task not in found:
            found[task] = (
                f"{task}: {_WORDS[name]} of item {item} is not the same in {a.name} and {b.name} ({name} differs): the "
                "scores do not compare"
            )
    return found


_WORDS = dict(zip(HASHES, ("the item itself", "the prompt", "the expected answer"), strict=True))


def _changed_items(a: Side, b: Side) -> list[tuple[ItemKey, str]]:
    """Items that both were asked and that are not the same, with the hash that says so: the prompt first."""
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
