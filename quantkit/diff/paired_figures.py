"""Figures of two sides beside each other, paired token by token and item by item. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import exp, isfinite
from typing import Literal

from quantkit.artifact import fidelity_schema
from quantkit.artifact.fidelity_schema import Figure
from quantkit.diff.comparability import Comparability, is_same_text
from quantkit.diff.diff_schema import (
    BenchmarkDiff,
    DistributionDiff,
    ErrorShift,
    FlippedItem,
    LikelihoodDiff,
)
from quantkit.diff.sides import ItemKey, Side, TokenFigures
from quantkit.evaluate import statistics
from quantkit.figures import ALL_TEXT, FigureDefinition, find_figure, list_figures

RECOVERY = 0.98
"""Of A's score B must keep for "as good", as benchmarks of an artifact against its source."""

ALL_TASKS = "all tasks"
Resolution = Literal["better", "worse", "not resolved", ""]


# ------------------------------------------------------------------------------- distributions


def pair_distributions(a: Side, b: Side, allowed: Comparability) -> tuple[DistributionDiff, ...]:
    """Return every figure of the table on every domain that both sides have.

    A figure with a `Pairing` gets a difference over the same tokens with its 95 % interval if both
    sides kept their tokens.
    """
    if allowed.source or allowed.text:
        return ()
    second = {row.domain: row for row in b.fidelity.distribution}
    figures = [row for row in list_figures() if row.scope == "domain" and row.diff_label]
    rows: list[DistributionDiff] = []
    for first in a.fidelity.distribution:
        other = second.get(first.domain)
        has_same_size = other is not None and other.tokens == first.tokens
        positions = _list_positions(a.tokens, b.tokens, first) if has_same_size else []
        for figure in figures:
            values = [
                figure.read(a.fidelity, first.domain).value,
                figure.read(b.fidelity, first.domain).value if other else None,
            ]
            if values == [None, None]:
                continue
            difference = _pair_tokens(figure, a.tokens, b.tokens, positions)
            rows.append(
                DistributionDiff(
                    domain=first.domain,
                    tokens=first.tokens,
                    figure=figure.key,
                    a=values[0],
                    b=values[1],
                    difference=difference,
                    resolved=_resolve(figure, difference),
                )
            )
    return tuple(rows)


def is_pairable(a: TokenFigures, b: TokenFigures) -> bool:
    """Return whether both hold the same tokens of the same domains in the same order."""
    return list(a.domains) == list(b.domains)


def _list_positions(
    a: TokenFigures | None, b: TokenFigures | None, row: fidelity_schema.DistributionResult
) -> list[int]:
    """Return the positions of a domain's tokens; none if the row counts another number of them."""
    if a is None or b is None or not is_pairable(a, b):
        return []
    positions = [n for n, name in enumerate(a.domains) if row.domain in (ALL_TEXT, name)]
    return positions if 2 <= len(positions) == row.tokens else []


def _pair_tokens(
    figure: FigureDefinition,
    a: TokenFigures | None,
    b: TokenFigures | None,
    positions: Sequence[int],
) -> Figure | None:
    """Return B - A of a figure over the same tokens (B / A for a ratio); None if it is not paired."""
    pairing = figure.pairing
    if pairing is None or a is None or b is None or not positions:
        return None
    columns = [pairing.column(tokens) for tokens in (a, b)]
    first, second = ([column[n] for n in positions] for column in columns)
    if pairing.statistic == "share":
        lost = sum(bool(one) and not two for one, two in zip(first, second, strict=True))
        gained = sum(bool(two) and not one for one, two in zip(first, second, strict=True))
        shares = statistics.paired_proportions_interval(lost, gained, len(positions))
        return Figure(value=(gained - lost) / len(positions), ci=(shares.low, shares.high))
    mean = _pair_means(list(map(float, first)), list(map(float, second)))
    if mean.value is None:
        return None
    if pairing.statistic == "ratio":
        return Figure(value=exp(mean.value), ci=(_exp_bound(mean, 0), _exp_bound(mean, 1)))
    return mean


def _pair_means(first: Sequence[float], second: Sequence[float]) -> Figure:
    """Return the paired mean difference; value None if a token is not finite."""
    if not all(map(isfinite, (*first, *second))):
        return Figure(value=None)
    paired = statistics.paired_difference(first, second)
    return Figure(
        value=paired.mean,
        se=paired.standard_error,
        ci=(paired.interval.low, paired.interval.high),
    )


def _exp_bound(figure: Figure, end: int) -> float | None:
    bound = figure.ci[end] if figure.ci else None
    return None if bound is None else exp(bound)


def _resolve(figure: FigureDefinition | None, difference: Figure | None) -> Resolution:
    """Return in which direction the interval excludes "no change"; "" without an interval."""
    low, high = (difference.ci if difference else None) or (None, None)
    if figure is None or low is None or high is None:
        return ""
    is_ratio = figure.pairing is not None and figure.pairing.statistic == "ratio"
    no_change = 1.0 if is_ratio else 0.0
    if low <= no_change <= high:
        return "not resolved"
    return "better" if (low > no_change) == (figure.direction == "higher") else "worse"


# ---------------------------------------------------------------------------------------------------- gold solutions


def pair_likelihoods(a: Side, b: Side, allowed: Comparability) -> tuple[LikelihoodDiff, ...]:
    """Gold solutions of every task that both scored, paired where both kept the solutions' figures."""
    if allowed.source:
        return ()
    second = {row.task: row for row in b.fidelity.likelihood}
    rows = []
    for row in a.fidelity.likelihood:
        other = second.get(row.task)
        if other is None or row.task in allowed.tasks or "not run" in (row.status, other.status):
            continue
        pairs = _paired_solutions(a, b, row.task)
        found = (
            _pair_means([one for one, _ in pairs], [two for _, two in pairs])
            if len(pairs) > 1
            else None
        )
        rows.append(
            LikelihoodDiff(
                task=row.task, n=len(pairs) or row.n, source=row.source, a=row.artifact, b=other.artifact,
                difference=found, resolved=_resolve(find_figure("likelihood"), found),
            )
        )  # fmt: skip
    return tuple(rows)


def _paired_solutions(a: Side, b: Side, task: str) -> list[tuple[float, float]]:
    """The same solutions, cut into as many tokens, under both."""
    first, second = a.solutions or {}, b.solutions or {}
    return [
        (one.value, two.value)
        for key, one in first.items()
        if key[0] == task and (two := second.get(key)) and two.n_tokens == one.n_tokens
    ]


# --------------------------------------------------------------------------------------------------------- benchmarks


def pair_benchmarks(a: Side, b: Side, allowed: Comparability) -> tuple[BenchmarkDiff, ...]:
    """Every task that both ran, under every filter, paired over the items both were asked; last all tasks together."""
    if allowed.source:
        return ()
    keys = [key for key in list_common_items(a, b) if key[0] not in allowed.tasks]
    rows: list[BenchmarkDiff] = []
    for task, name in dict.fromkeys((task, name) for task, name, _ in keys):
        mine = [key for key in keys if key[:2] == (task, name)]
        rows.append(_paired_row(task, name, a, b, mine))
    scored = choose_filters(a, b)
    pooled = [key for key in keys if scored.get(key[0]) == key[1]]
    if len({task for task, _, _ in pooled}) > 1:
        rows.append(_paired_row(ALL_TASKS, "", a, b, pooled))
    return (*rows, *_unpaired(a, b, {row.task for row in rows} | allowed.tasks.keys()))


def choose_filters(a: Side, b: Side) -> dict[str, str]:
    """Task -> the filter it is scored by: the report's, else the first in the samples."""
    found: dict[str, str] = {}
    for task, name, _ in (*(a.items or {}), *(b.items or {})):
        found.setdefault(task, name)
    known = {(task, name) for task, name, _ in a.items or {}}
    told = {row.task: row.metric for row in a.fidelity.benchmarks}
    return {
        task: told[task] if (task, told.get(task)) in known else name
        for task, name in found.items()
    }


def list_common_items(a: Side, b: Side) -> list[ItemKey]:
    """Items that both were asked and that both could be scored on, in A's order."""
    first, second = a.items or {}, b.items or {}
    return [
        key for key, item in first.items() if item.answer and key in second and second[key].answer
    ]


def _scores(side: Side, keys: Iterable[ItemKey]) -> list[float]:
    items = side.items or {}
    return [answer.score for key in keys if (answer := items[key].answer)]


def _paired_row(task: str, name: str, a: Side, b: Side, keys: Sequence[ItemKey]) -> BenchmarkDiff:
    """One line of the table."""
    if len(keys) < 2:
        return BenchmarkDiff(
            task=task, filter=name, n=len(keys), verdict=f"{len(keys)} items are too few to compare"
        )
    found = statistics.compare_scores(_scores(a, keys), _scores(b, keys), RECOVERY)
    source = [answer.score for key in keys if (answer := (a.items or {})[key].source)]
    interval = found.difference.interval
    return BenchmarkDiff(
        task=task,
        filter=name,
        n=found.n,
        source=sum(source) / len(source) if len(source) == len(keys) else None,
        a=found.baseline,
        b=found.candidate,
        delta_pp=Figure(
            value=100 * found.difference.mean,
            se=100 * found.difference.standard_error,
            ci=(100 * interval.low, 100 * interval.high),
        ),
        lost=found.lost,
        gained=found.gained,
        mcnemar_p=found.p_value,
        verdict=_verdict(found),
    )


def _verdict(found: statistics.Comparison) -> str:
    """In words: which way the interval points, or what it excludes."""
    interval = found.difference.interval
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return (
        f"as good: a loss of {100 * (1 - RECOVERY):.0f} % is excluded"
        if found.verdict == "pass"
        else found.text
    )


def _unpaired(a: Side, b: Side, told: set[str]) -> list[BenchmarkDiff]:
    """Tasks that cannot be paired: the scores, and why there is no more."""
    first, second = ({row.task: row for row in side.fidelity.benchmarks} for side in (a, b))
    rows = []
    for task in dict.fromkeys((*first, *second)):
        if task in told:
            continue
        scores = [
            rows_of[task].artifact if task in rows_of else None for rows_of in (first, second)
        ]
        ran = [side.name for side, score in zip((a, b), scores, strict=True) if score is not None]
        if not ran:
            continue
        why = (
            "not paired: no samples beside fidelity.json"
            if len(ran) == 2
            else f"only {ran[0]} was asked"
        )
        known = [
            rows_of[task]
            for rows_of in (first, second)
            if task in rows_of and rows_of[task].artifact is not None
        ]
        n, source = {row.n for row in known}, {row.source for row in known}
        rows.append(
            BenchmarkDiff(
                task=task, n=n.pop() if len(n) == 1 else 0, source=source.pop() if len(source) == 1 else None,
                a=scores[0], b=scores[1], verdict=why,
            )
        )  # fmt: skip
    return rows


def list_flips(a: Side, b: Side, allowed: Comparability) -> tuple[FlippedItem, ...]:
    """Items whose score differs, those that B lost first."""
    if allowed.source:
        return ()
    scored, first, second = choose_filters(a, b), a.items or {}, b.items or {}
    found = []
    for key in list_common_items(a, b):
        task, name, item = key
        one, two = first[key].answer, second[key].answer
        if (
            task in allowed.tasks
            or scored[task] != name
            or one is None
            or two is None
            or one.score == two.score
        ):
            continue
        source = first[key].source
        found.append(
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
    return tuple(sorted(found, key=lambda flip: (not flip.lost, flip.task, flip.item)))


def count_items(a: Side, b: Side, allowed: Comparability) -> tuple[int, int]:
    """Items compared under the filter that scores them, and how many of them have other words and the same score."""
    if allowed.source:
        return 0, 0
    scored, first, second = choose_filters(a, b), a.items or {}, b.items or {}
    keys = [
        key
        for key in list_common_items(a, b)
        if key[0] not in allowed.tasks and scored[key[0]] == key[1]
    ]
    pairs = [
        (one, two) for key in keys if (one := first[key].answer) and (two := second[key].answer)
    ]
    return len(pairs), sum(one.score == two.score and one.text != two.text for one, two in pairs)


# ------------------------------------------------------------------------------------------------------------- errors


def compare_modules(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Every matrix that either has quantized, the largest shift of its error first; what was kept has no error.

    Errors of outputs are those over the calibration text, so they compare where both learned from the same one.
    """
    if allowed.source:
        return ()
    first, second = ({m.name: m for m in side.fidelity.modules if m.method} for side in (a, b))
    same = "source" in (a.kind, b.kind) or is_same_text(
        a.fidelity.calibration, b.fidelity.calibration
    )
    found = []
    for name in {**first, **second}:
        pair = first.get(name), second.get(name)
        outputs = [0.0 if m is None else m.output_relative_error for m in pair]
        weights = [0.0 if m is None else m.relative_error for m in pair]
        by: Literal["outputs", "weights"] = "outputs" if same and None not in outputs else "weights"
        one, two = outputs if by == "outputs" else weights
        found.append(_shift(name, by, one, two))
    return _largest_first(found)


def compare_blocks(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Error of the hidden states after each block, in the order of the model."""
    first, second = (
        {row.block: row.relative_error for row in side.fidelity.blocks} for side in (a, b)
    )
    return _by_block("hidden states", first, second, allowed)


def compare_routers(a: Side, b: Side, allowed: Comparability) -> tuple[ErrorShift, ...]:
    """Share of expert choices that agree with the source's, layer by layer."""
    first, second = ({row.block: row.agreement for row in side.fidelity.routers} for side in (a, b))
    return _by_block("same experts", first, second, allowed)


def _by_block(
    by: Literal["hidden states", "same experts"],
    a: Mapping[str, float | None],
    b: Mapping[str, float | None],
    allowed: Comparability,
) -> tuple[ErrorShift, ...]:
    """What the fidelity text told of the blocks that both have; nothing where it was not the same."""
    if allowed.source or allowed.text:
        return ()
    return tuple(_shift(name, by, value, b[name]) for name, value in a.items() if name in b)


def _shift(
    name: str,
    by: Literal["outputs", "weights", "hidden states", "same experts"],
    a: float | None,
    b: float | None,
) -> ErrorShift:
    return ErrorShift(name=name, by=by, a=a, b=b, shift=None if a is None or b is None else b - a)


def _largest_first(found: Iterable[ErrorShift]) -> tuple[ErrorShift, ...]:
    return tuple(
        sorted(found, key=lambda row: -abs(row.shift) if row.shift is not None else float("inf"))
    )
