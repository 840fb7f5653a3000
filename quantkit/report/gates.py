"""Gates: whether an artifact satisfies the bounds of its recipe. Pure.

The table of figures says how each figure is read; the bounds of a benchmark are judged here.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.artifact.fidelity_schema import (
    UNPROVEN,
    BenchmarkResult,
    Fidelity,
    GateResult,
    Outcome,
)
from quantkit.evaluate.statistics import wilson_interval
from quantkit.figure_readers import NOT_FINITE, NOT_MEASURED, Reading
from quantkit.figures import find_figure, is_size
from quantkit.recipe.schema import Gate
from quantkit.report import format_numbers
from quantkit.verify.check_report import compute_status

WHOLE = 1e-6
"""Distance from a whole number of items that rounding of a score explains."""


def judge_gates(gates: Mapping[str, Gate], fidelity: Fidelity) -> list[GateResult]:
    """Return one result per bound, in the order of the recipe.

    A figure that is not finite misses every bound; a figure that was not measured has ok None. A
    figure within its bound whose interval crosses it is kept, not proven, or missed if the gate
    says `proven`.
    """
    tasks = {row.task: row for row in fidelity.benchmarks}
    results: list[GateResult] = []
    for figure, gate in gates.items():
        judged = _judge_task(figure, gate, tasks.get(figure))
        reading = read_figure(figure, fidelity)
        if gate.max is not None:
            bound = f"<= {_format_bound(figure, gate.max)}"
            judged.append(judge_upper(figure, bound, reading, gate.max))
        if gate.min is not None:
            bound = f">= {_format_bound(figure, gate.min)}"
            judged.append(judge_lower(figure, bound, reading, gate.min))
        results += [require_proof(result) if gate.proven else result for result in judged]
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


def judge_upper(figure: str, bound: str, reading: Reading, limit: float) -> GateResult:
    """Judge an upper bound by the figure and by the upper end of its interval."""
    high = reading.ci[1] if reading.ci else None
    is_proven = reading.ci is None or (high is not None and high <= limit)
    is_kept = reading.value is not None and reading.value <= limit
    room = None if reading.value is None else limit - reading.value
    return _make_result(figure, bound, reading, is_kept=is_kept, is_proven=is_proven, headroom=room)


def judge_lower(figure: str, bound: str, reading: Reading, limit: float) -> GateResult:
    """Judge a lower bound by the figure and by the lower end of its interval."""
    low = reading.ci[0] if reading.ci else None
    is_proven = reading.ci is None or (low is not None and low >= limit)
    is_kept = reading.value is not None and reading.value >= limit
    room = None if reading.value is None else reading.value - limit
    return _make_result(figure, bound, reading, is_kept=is_kept, is_proven=is_proven, headroom=room)


def _make_result(
    figure: str,
    bound: str,
    reading: Reading,
    *,
    is_kept: bool,
    headroom: float | None,
    is_proven: bool = True,
) -> GateResult:
    """Return the result of a bound; is_kept counts for a figure with a value only.

    headroom: from the value to the bound, negative beyond it; None without a value.
    """
    outcome: Outcome = "missed"
    if reading.value is None and reading.reason != NOT_FINITE:
        outcome = "not judged"
    elif reading.value is not None and is_kept:
        outcome = "kept" if is_proven else UNPROVEN
    return GateResult(
        figure=figure,
        bound=bound,
        value=reading.value,
        ok=None if outcome == "not judged" else outcome != "missed",
        reason=reading.reason,
        n=reading.n,
        ci=reading.ci,
        outcome=outcome,
        headroom=headroom,
    )


def require_proof(result: GateResult) -> GateResult:
    """Return a result that is kept but not proven as missed."""
    if not result.is_unproven:
        return result
    reason = "; ".join(filter(None, ["not proven: its interval crosses the bound", result.reason]))
    return result.model_copy(update={"ok": False, "outcome": "missed", "reason": reason})


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
    n = row.n if row else None
    if gate.max_lost is not None:
        lost = float(row.lost) if row and row.lost is not None else None
        reading = (
            Reading(value=None, reason="the source scores 0: nothing can be lost")
            if row is not None and row.source == 0
            else Reading(value=lost, n=n, reason=absent if lost is None else "")
        )
        is_kept = reading.value is not None and reading.value <= gate.max_lost
        room = None if reading.value is None else gate.max_lost - reading.value
        bound = f"<= {gate.max_lost}"
        results.append(_make_result(f"{task}.lost", bound, reading, is_kept=is_kept, headroom=room))
    if gate.min_score is not None:
        score = row.artifact if row else None
        ci = _find_score_interval(row) if row else None
        reading = Reading(value=score, n=n, ci=ci, reason=absent if score is None else "")
        bound = f">= {gate.min_score:g}"
        results.append(judge_lower(f"{task}.score", bound, reading, gate.min_score))
    rates = (("truncated", gate.max_truncated_pp), ("unparsed", gate.max_unparsed_pp))
    results += [
        _judge_rise(task, name, limit, row, absent) for name, limit in rates if limit is not None
    ]
    return [_fail_broken(result, row.fault) for result in results] if row and row.fault else results


def _fail_broken(result: GateResult, fault: str) -> GateResult:
    """Return a bound of a task that is not valid as missed."""
    reason = "; ".join(filter(None, [f"not valid: {fault}", result.reason]))
    return result.model_copy(update={"ok": False, "outcome": "missed", "reason": reason})


def _find_score_interval(row: BenchmarkResult) -> tuple[float, float] | None:
    """Return Wilson's interval of the artifact's score if it is a share of the items."""
    if row.artifact is None or not row.n:
        return None
    correct = row.artifact * row.n
    if abs(correct - round(correct)) > WHOLE:  # means of several answers per item
        return None
    interval = wilson_interval(round(correct), row.n)
    return interval.low, interval.high


def _judge_recovery(
    task: str, min_recovery: float, row: BenchmarkResult | None, absent: str
) -> GateResult:
    """Judge the artifact's score as a share of the source's."""
    figure = row.recovery if row and row.recovery else None
    value = figure.value if figure else None
    reason = "the source scores 0: no information" if value is None else ""
    reading = Reading(
        value=value,
        n=row.n if row else None,
        ci=figure.ci if figure else None,
        reason=absent if row is None else reason,
    )
    return judge_lower(f"{task}.recovery", f">= {min_recovery:g}", reading, min_recovery)


def _judge_rise(
    task: str, name: str, limit: float, row: BenchmarkResult | None, absent: str
) -> GateResult:
    """Judge the rise, in points, of the share of answers that were cut or that had no result."""
    before, after = (getattr(row, name) if row else None) or (None, None)
    rise = None if before is None or after is None else 100 * (after - before)
    reading = Reading(value=rise, n=row.n if row else None, reason=absent if rise is None else "")
    is_kept = rise is not None and rise <= limit
    room = None if rise is None else limit - rise
    bound = f"<= {limit:g}"
    return _make_result(f"{task}.{name}_pp", bound, reading, is_kept=is_kept, headroom=room)


def _judge_margin(task: str, margin: float, row: BenchmarkResult | None, absent: str) -> GateResult:
    """Judge non-inferiority: the paired interval must lie above -margin percentage points."""
    figure, bound = f"{task}.delta_pp.low", f"> {-margin:g}" if margin else "> 0"
    if row and row.source == row.artifact == 0:
        reading = Reading(value=None, reason="both score 0: no information")
        return _make_result(figure, bound, reading, is_kept=False, headroom=None)
    low, high = (row.delta_pp.ci if row and row.delta_pp else None) or (None, None)
    if row is None or low is None or high is None:
        reading = Reading(value=None, reason=absent)
        return _make_result(figure, bound, reading, is_kept=False, headroom=None)
    is_open = low <= -margin <= high
    reason = (
        f"not resolved: {row.n:,} items cannot exclude a loss of {margin:g} points"
        if is_open
        else ""
    )
    reading = Reading(value=low, n=row.n, ci=(low, high), reason=reason)
    room = low + margin
    return _make_result(figure, bound, reading, is_kept=low > -margin, headroom=room)
