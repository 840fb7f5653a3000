"""Gates: whether an artifact satisfies the bounds of its recipe. Pure.

The table of figures says how each figure is read; the bounds of a benchmark are judged here.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity, GateResult
from quantkit.figure_readers import NOT_FINITE, NOT_MEASURED, Reading
from quantkit.figures import find_figure, is_size
from quantkit.recipe.schema import Gate
from quantkit.report import format_numbers
from quantkit.verify.check_report import compute_status


def judge_gates(gates: Mapping[str, Gate], fidelity: Fidelity) -> list[GateResult]:
    """Return one result per bound, in the order of the recipe.

    A figure that is not finite misses every bound; a figure that was not measured has ok None.
    """
    tasks = {row.task: row for row in fidelity.benchmarks}
    results: list[GateResult] = []
    for figure, gate in gates.items():
        results += _judge_task(figure, gate, tasks.get(figure))
        if gate.max is None and gate.min is None:
            continue
        reading = read_figure(figure, fidelity)
        value = reading.value
        if gate.max is not None:
            is_kept = value is not None and value <= gate.max
            results.append(
                _make_result(figure, f"<= {_format_bound(figure, gate.max)}", reading, is_kept)
            )
        if gate.min is not None:
            is_kept = value is not None and value >= gate.min
            results.append(
                _make_result(figure, f">= {_format_bound(figure, gate.min)}", reading, is_kept)
            )
    return results


def apply_gates(gates: Mapping[str, Gate], fidelity: Fidelity) -> Fidelity:
    """Return the report with its gates and its status filled in."""
    results = judge_gates(gates, fidelity)
    return fidelity.model_copy(
        update={
            "gates": tuple(results),
            "status": compute_status([result.ok for result in results]),
        }
    )


def read_figure(figure: str, fidelity: Fidelity) -> Reading:
    """Return a figure by its key in a gate, "kl_mean" or "kl_mean@math"."""
    key, _, part = figure.partition("@")
    definition = find_figure(key)
    return (
        definition.read(fidelity, part) if definition else Reading(value=None, reason=NOT_MEASURED)
    )


def _format_bound(figure: str, bound: float) -> str:
    return format_numbers.format_size(round(bound)) if is_size(figure) else f"{bound:g}"


def _make_result(figure: str, bound: str, reading: Reading, is_kept: bool) -> GateResult:
    if reading.value is not None:
        return GateResult(
            figure=figure, bound=bound, value=reading.value, ok=is_kept, reason=reading.reason
        )
    ok = False if reading.reason == NOT_FINITE else None
    return GateResult(figure=figure, bound=bound, value=None, ok=ok, reason=reading.reason)


# ------------------------------------------------------------------------------- bounds of a task


def _judge_task(task: str, gate: Gate, row: BenchmarkResult | None) -> list[GateResult]:
    """Judge the bounds of a benchmark that the gate sets."""
    if row is None or row.status == "not run":
        row, absent = None, f"not run: {row.reason}" if row else "not run"
    else:
        absent = NOT_MEASURED
    results = []
    if gate.min_recovery is not None:
        results.append(_judge_recovery(task, gate.min_recovery, row, absent))
    if gate.margin_pp is not None:
        results.append(_judge_margin(task, gate.margin_pp, row, absent))
    if gate.max_lost is not None:
        lost = float(row.lost) if row and row.lost is not None else None
        reading = (
            Reading(value=None, reason="the source scores 0: nothing can be lost")
            if row is not None and row.source == 0
            else Reading(value=lost, reason=absent if lost is None else "")
        )
        is_kept = lost is not None and lost <= gate.max_lost
        results.append(_make_result(f"{task}.lost", f"<= {gate.max_lost}", reading, is_kept))
    if gate.min_score is not None:
        score = row.artifact if row else None
        reading = Reading(value=score, reason=absent if score is None else "")
        is_kept = score is not None and score >= gate.min_score
        results.append(_make_result(f"{task}.score", f">= {gate.min_score:g}", reading, is_kept))
    rates = (("truncated", gate.max_truncated_pp), ("unparsed", gate.max_unparsed_pp))
    return results + [
        _judge_rise(task, name, limit, row, absent) for name, limit in rates if limit is not None
    ]


def _judge_recovery(
    task: str, min_recovery: float, row: BenchmarkResult | None, absent: str
) -> GateResult:
    """Judge the artifact's score as a share of the source's."""
    value = row.recovery.value if row and row.recovery else None
    reason = "the source scores 0: no information" if value is None else ""
    reading = Reading(value=value, reason=absent if row is None else reason)
    is_kept = value is not None and value >= min_recovery
    return _make_result(f"{task}.recovery", f">= {min_recovery:g}", reading, is_kept)


def _judge_rise(
    task: str, name: str, limit: float, row: BenchmarkResult | None, absent: str
) -> GateResult:
    """Judge the rise, in points, of the share of answers that were cut or that had no result."""
    before, after = (getattr(row, name) if row else None) or (None, None)
    rise = None if before is None or after is None else 100 * (after - before)
    reading = Reading(value=rise, reason=absent if rise is None else "")
    is_kept = rise is not None and rise <= limit
    return _make_result(f"{task}.{name}_pp", f"<= {limit:g}", reading, is_kept)


def _judge_margin(task: str, margin: float, row: BenchmarkResult | None, absent: str) -> GateResult:
    """Judge non-inferiority: the paired interval must lie above -margin percentage points."""
    figure, bound = f"{task}.delta_pp.low", f"> {-margin:g}" if margin else "> 0"
    if row and row.source == row.artifact == 0:
        reading = Reading(value=None, reason="both score 0: no information")
        return _make_result(figure, bound, reading, False)
    low, high = (row.delta_pp.ci if row and row.delta_pp else None) or (None, None)
    if row is None or low is None or high is None:
        return _make_result(figure, bound, Reading(value=None, reason=absent), False)
    is_open = low <= -margin <= high
    reason = (
        f"not resolved: {row.n:,} items cannot exclude a loss of {margin:g} points"
        if is_open
        else ""
    )
    return _make_result(figure, bound, Reading(value=low, reason=reason), low > -margin)
