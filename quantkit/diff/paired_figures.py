"""Answers, solutions and errors of two sides, paired item by item. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from quantkit.artifact.fidelity_schema import Figure
from quantkit.diff.comparability import Comparability, is_same_text
from quantkit.diff.diff_schema import (
    BenchmarkDiff,
    ErrorShift,
    FlippedItem,
    LikelihoodDiff,
)
from quantkit.diff.paired_tokens import pair_means, resolve_change
from quantkit.diff.sides import ItemKey, Side
from quantkit.evaluate import statistics
from quantkit.figures import find_figure

RECOVERY = 0.98
"""Share of A's score that B must keep for "as good", as for an artifact against its source."""

ALL_TASKS = "all tasks"


# ------------------------------------------------------------------------------ gold solutions


def pair_likelihoods(a: Side, b: Side, allowed: Comparability) -> tuple[LikelihoodDiff, ...]:
    """Return the gold solutions of every task that both scored, paired if both kept the samples."""
    if allowed.source:
        return ()
    second = {row.task: row for row in b.fidelity.likelihood}
    rows = []
    for row in a.fidelity.likelihood:
        other = second.get(row.task)
        if other is None or row.task in allowed.tasks or "not run" in (row.status, other.status):
            continue
        pairs = _pair_solutions(a, b, row.task)
        difference = (
            pair_means([one for one, _ in pairs], [two for _, two in pairs])
            if len(pairs) > 1
            else None
        )
        rows.append(
            LikelihoodDiff(
                task=row.task,
                n=len(pairs) or row.n,
                source=row.source,
                a=row.artifact,
                b=other.artifact,
                difference=difference,
                resolved=resolve_change(find_figure("likelihood"), difference),
            )
        )
    return tuple(rows)


def _pair_solutions(a: Side, b: Side, task: str) -> list[tuple[float, float]]:
    """Return the likelihoods of the solutions that both sides split into the same number of
    tokens."""
    first, second = a.solutions or {}, b.solutions or {}
    return [
        (one.value, two.value)
        for key, one in first.items()
        if key[0] == task and (two := second.get(key)) and two.n_tokens == one.n_tokens
    ]


# ---------------------------------------------------------------------------------- benchmarks


def pair_benchmarks(a: Side, b: Side, allowed: Comparability) -> tuple[BenchmarkDiff, ...]:
    """Return every task that both ran, by filter, paired over their common items.

    Last come all tasks together, then tasks that cannot be paired.
    """
    if allowed.source:
        return ()
    keys = [key for key in list_common_items(a, b) if key[0] not in allowed.tasks]
    rows: list[BenchmarkDiff] = []
    for task, name in dict.fromkeys((task, name) for task, name, _ in keys):
        rows.append(_pair_task(task, name, a, b, [key for key in keys if key[:2] == (task, name)]))
    scoring = choose_filters(a, b)
    pooled = [key for key in keys if scoring.get(key[0]) == key[1]]
    if len({task for task, _, _ in pooled}) > 1:
        rows.append(_pair_task(ALL_TASKS, "", a, b, pooled))
    paired = {row.task for row in rows}
    return (*rows, *_list_unpaired(a, b, paired | allowed.tasks.keys()))


def choose_filters(a: Side, b: Side) -> dict[str, str]:
    """Map each task to its scoring filter: the report's, else the first in the samples."""
    first_filters: dict[str, str] = {}
    for task, name, _ in (*(a.items or {}), *(b.items or {})):
        first_filters.setdefault(task, name)
    pairs = {(task, name) for task, name, _ in a.items or {}}
    reported = {row.task: row.metric for row in a.fidelity.benchmarks}
    return {
        task: reported[task] if (task, reported.get(task)) in pairs else name
        for task, name in first_filters.items()
    }


def list_common_items(a: Side, b: Side) -> list[ItemKey]:
    """Return the items that both sides have scored, in A's order."""
    first, second = a.items or {}, b.items or {}
    return [
        key for key, item in first.items() if item.answer and key in second and second[key].answer
    ]


def _list_scores(side: Side, keys: Iterable[ItemKey]) -> list[float]:
    items = side.items or {}
    return [answer.score for key in keys if (answer := items[key].answer)]


def _pair_task(task: str, name: str, a: Side, b: Side, keys: Sequence[ItemKey]) -> BenchmarkDiff:
    """Return the paired scores of a task's items under one filter."""
    if len(keys) < 2:
        return BenchmarkDiff(
            task=task, filter=name, n=len(keys), verdict=f"{len(keys)} items are too few to compare"
        )
    comparison = statistics.compare_scores(_list_scores(a, keys), _list_scores(b, keys), RECOVERY)
    source = [answer.score for key in keys if (answer := (a.items or {})[key].source)]
    difference = comparison.difference
    return BenchmarkDiff(
        task=task,
        filter=name,
        n=comparison.n,
        source=sum(source) / len(source) if len(source) == len(keys) else None,
        a=comparison.baseline,
        b=comparison.candidate,
        delta_pp=Figure(
            value=100 * difference.mean,
            se=100 * difference.standard_error,
            ci=(100 * difference.interval.low, 100 * difference.interval.high),
        ),
        lost=comparison.lost,
        gained=comparison.gained,
        mcnemar_p=comparison.p_value,
        verdict=_format_verdict(comparison),
    )


def _format_verdict(comparison: statistics.Comparison) -> str:
    """Return the direction that the interval resolves, or the differences that it excludes."""
    interval = comparison.difference.interval
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    if comparison.verdict == "pass":
        return f"as good: a loss of {100 * (1 - RECOVERY):.0f} % is excluded"
    return comparison.text


def _list_unpaired(a: Side, b: Side, done: set[str]) -> list[BenchmarkDiff]:
    """Return the tasks that cannot be paired: scores, and the reason."""
    first, second = ({row.task: row for row in side.fidelity.benchmarks} for side in (a, b))
    rows = []
    for task in dict.fromkeys((*first, *second)):
        if task in done:
            continue
        results = [by_task.get(task) for by_task in (first, second)]
        scores = [result.artifact if result else None for result in results]
        ran = [side.name for side, score in zip((a, b), scores, strict=True) if score is not None]
        if not ran:
            continue
        reason = (
            "not paired: no samples with fidelity.json"
            if len(ran) == 2
            else f"only {ran[0]} has results"
        )
        scored = [result for result in results if result and result.artifact is not None]
        n, source = {row.n for row in scored}, {row.source for row in scored}
        rows.append(
            BenchmarkDiff(
                task=task,
                n=n.pop() if len(n) == 1 else 0,
                source=source.pop() if len(source) == 1 else None,
                a=scores[0],
                b=scores[1],
                verdict=reason,
            )
        )
    return rows


def list_flips(a: Side, b: Side, allowed: Comparability) -> tuple[FlippedItem, ...]:
    """Return the items whose score differs, those that B lost first."""
    if allowed.source:
        return ()
    scoring, first, second = choose_filters(a, b), a.items or {}, b.items or {}
    flips = []
    for key in list_common_items(a, b):
        task, name, item = key
        one, two = first[key].answer, second[key].answer
        if (
            task in allowed.tasks
            or scoring[task] != name
            or one is None
            or two is None
            or one.score == two.score
        ):
            continue
        source = first[key].source
        flips.append(
            FlippedItem(
                task=task,
                item=item,
                prompt=first[key].prompt,
                target=first[key].target,
                source_score=source.score if source else None,
                a=one,
                b=two,
            )
        )
    return tuple(sorted(flips, key=lambda flip: (not flip.lost, flip.task, flip.item)))


def count_items(a: Side, b: Side, allowed: Comparability) -> tuple[int, int]:
    """Return the number of compared items, and of those with other answers and the same score."""
    if allowed.source:
        return 0, 0
    scoring, first, second = choose_filters(a, b), a.items or {}, b.items or {}
    keys = [
        key
        for key in list_common_items(a, b)
        if key[0] not in allowed.tasks and scoring[key[0]] == key[1]
    ]
    pairs = [
        (one, two) for key in keys if (one := first[key].answer) and (two := second[key].answer)
    ]
    return len(pairs), sum(one.score == two.score and one.text != two.text for one, two in pairs)


# --------------------------------------------------------------------------------------- errors


def compare_modules(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Return the error of every matrix that either side quantized, the largest shift first.

    A kept matrix has error 0. Output errors are measured over the calibration text, so they are
    compared only if both sides used the same one; else weight errors are.
    """
    if allowed.source:
        return ()
    first, second = ({m.name: m for m in side.fidelity.modules if m.method} for side in (a, b))
    has_same_text = "source" in (a.kind, b.kind) or is_same_text(
        a.fidelity.calibration, b.fidelity.calibration
    )
    shifts = []
    for name in {**first, **second}:
        pair = first.get(name), second.get(name)
        outputs = [0.0 if m is None else m.output_relative_error for m in pair]
        weights = [0.0 if m is None else m.relative_error for m in pair]
        by: Literal["outputs", "weights"] = (
            "outputs" if has_same_text and None not in outputs else "weights"
        )
        one, two = outputs if by == "outputs" else weights
        shifts.append(_make_shift(name, by, one, two))
    return _sort_by_size(shifts)


def compare_blocks(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Return the error of the hidden states after each block, in the order of the model."""
    first, second = (
        {row.block: row.relative_error for row in side.fidelity.blocks} for side in (a, b)
    )
    return _compare_by_block("hidden states", first, second, allowed)


def compare_routers(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Return the share of expert choices that agree with the source's, by layer."""
    first, second = ({row.block: row.agreement for row in side.fidelity.routers} for side in (a, b))
    return _compare_by_block("same experts", first, second, allowed)


def _compare_by_block(
    by: Literal["hidden states", "same experts"],
    a: Mapping[str, float | None],
    b: Mapping[str, float | None],
    allowed: Comparability,
) -> tuple[ErrorShift, ...]:
    """Return the values of the blocks that both have; nothing for different fidelity texts."""
    if allowed.source or allowed.text:
        return ()
    return tuple(_make_shift(name, by, value, b[name]) for name, value in a.items() if name in b)


def _make_shift(
    name: str,
    by: Literal["outputs", "weights", "hidden states", "same experts"],
    a: float | None,
    b: float | None,
) -> ErrorShift:
    return ErrorShift(name=name, by=by, a=a, b=b, shift=None if a is None or b is None else b - a)


def _sort_by_size(shifts: Iterable[ErrorShift]) -> tuple[ErrorShift, ...]:
    """Sort by absolute shift, the largest first and unknown ones last."""
    return tuple(
        sorted(shifts, key=lambda row: -abs(row.shift) if row.shift is not None else float("inf"))
    )
