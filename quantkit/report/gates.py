"""Whether an artifact keeps what its recipe demands. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.report.schema import Benchmark, Distribution, Fidelity, GateResult, Status
from quantkit.schema import FIGURES, Gate

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"

_POOLED = tuple(name for name in FIGURES if name in Distribution.model_fields)


def known_figures(tasks: Sequence[str]) -> tuple[str, ...]:
    """What `gates` may name when these tasks are evaluated."""
    return (*FIGURES, *tasks)


def judge(gates: Mapping[str, Gate], fidelity: Fidelity) -> list[GateResult]:
    """One result per bound, in the order of the recipe. A figure that is not finite misses every bound."""
    tasks = {row.task: row for row in fidelity.benchmarks}
    results: list[GateResult] = []
    for figure, gate in gates.items():
        if gate.min_recovery is not None:
            results.append(_recovery(figure, gate.min_recovery, tasks.get(figure)))
        value, missing = _figure(figure, fidelity)
        if gate.max is not None:
            results.append(
                _bounded(figure, f"<= {gate.max:g}", value, missing, value is not None and value <= gate.max)
            )
        if gate.min is not None:
            results.append(
                _bounded(figure, f">= {gate.min:g}", value, missing, value is not None and value >= gate.min)
            )
    return results


def status(results: Sequence[GateResult]) -> Status:
    """rejected when a bound is missed; accepted when there are bounds and all are kept; otherwise not judged."""
    if any(result.ok is False for result in results):
        return "rejected"
    return "accepted" if results and all(result.ok for result in results) else "not judged"


def judged(gates: Mapping[str, Gate], fidelity: Fidelity) -> Fidelity:
    """The report with its gates and status filled in."""
    results = judge(gates, fidelity)
    return fidelity.model_copy(update={"gates": tuple(results), "status": status(results)})


def _figure(figure: str, fidelity: Fidelity) -> tuple[float | None, str]:
    """The value, or why there is none: over all text, of the worst router, or the number of experts."""
    if figure in _POOLED:
        pooled = next((row for row in fidelity.distribution if row.domain == "all"), None)
        measured = getattr(pooled, figure, None)
        return (None, NOT_MEASURED) if measured is None else (measured.value, NOT_FINITE)
    if figure == "router_agreement" and fidelity.routers:
        shares = [row.agreement for row in fidelity.routers]
        return (None if None in shares else min(share for share in shares if share is not None)), NOT_FINITE
    if figure == "experts_uncalibrated" and fidelity.experts is not None:
        return float(len(fidelity.experts.uncalibrated())), ""
    return None, NOT_MEASURED


def _bounded(figure: str, bound: str, value: float | None, missing: str, kept: bool) -> GateResult:
    if value is not None:
        return GateResult(figure=figure, bound=bound, value=value, ok=kept)
    return GateResult(
        figure=figure, bound=bound, value=None, ok=False if missing == NOT_FINITE else None, reason=missing
    )


def _recovery(task: str, least: float, row: Benchmark | None) -> GateResult:
    bound, figure = f">= {least:g}", f"{task}.recovery"
    recovery = row.recovery.value if row and row.recovery else None
    if recovery is not None:
        return GateResult(figure=figure, bound=bound, value=recovery, ok=recovery >= least)
    if row is None or row.status == "not run":
        reason = f"not run: {row.reason}" if row else "not run"
    else:
        reason = "the source scores 0: no information"
    return GateResult(figure=figure, bound=bound, value=None, ok=None, reason=reason)
