"""Whether an artifact keeps what its recipe demands. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.artifact.fidelity_schema import Benchmark, Fidelity, GateResult
from quantkit.recipe.schema import POOLED_FIGURES, Gate
from quantkit.report import format_numbers
from quantkit.verify.report import status

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"

Found = tuple[float | None, str]
"""A figure, or None and why there is none; beside a figure, what it does not cover."""


def judge(gates: Mapping[str, Gate], fidelity: Fidelity) -> list[GateResult]:
    """One result per bound, in the order of the recipe. A figure that is not finite misses every bound."""
    tasks = {row.task: row for row in fidelity.benchmarks}
    results: list[GateResult] = []
    for figure, gate in gates.items():
        results += _task(figure, gate, tasks.get(figure))
        if gate.max is None and gate.min is None:
            continue
        value, missing = _figure(figure, fidelity)
        told = (
            (lambda bound: format_numbers.size(round(bound))) if figure == "size" else "{:g}".format
        )
        if gate.max is not None:
            kept = value is not None and value <= gate.max
            results.append(_bounded(figure, f"<= {told(gate.max)}", (value, missing), kept))
        if gate.min is not None:
            kept = value is not None and value >= gate.min
            results.append(_bounded(figure, f">= {told(gate.min)}", (value, missing), kept))
    return results


def judged(gates: Mapping[str, Gate], fidelity: Fidelity) -> Fidelity:
    """The report with its gates and status filled in."""
    results = judge(gates, fidelity)
    return fidelity.model_copy(
        update={"gates": tuple(results), "status": status([result.ok for result in results])}
    )


# ---------------------------------------------------------------------------------------------- figures of the whole


def _figure(figure: str, fidelity: Fidelity) -> Found:
    """The value of one of FIGURES, or of a domain's: see schema.FIGURES."""
    name, _, domain = figure.partition("@")
    if name in POOLED_FIGURES:
        return _pooled(name, domain or "all", fidelity)
    if name == "likelihood":
        return _likelihood(domain, fidelity)
    artifact, experts = fidelity.artifact, fidelity.experts
    worst: dict[str, Found] = {
        "bits_per_weight": (artifact.bits_per_weight, ""),
        "size": (float(artifact.bytes_artifact), ""),
        "fallbacks": (
            float(len({module for row in fidelity.fallbacks for module in row.modules})),
            "",
        ),
        "experts_uncalibrated": (float(len(experts.uncalibrated())), "")
        if experts
        else (None, NOT_MEASURED),
        "lost_items": _lost(fidelity.benchmarks),
    }
    if name in worst:
        return worst[name]
    quantized = [module for module in fidelity.modules if module.method is not None]
    if name == "module_output_error":  # of an expert that no token reached it is not known
        known = [
            row.output_relative_error for row in quantized if row.output_relative_error is not None
        ]
        rest = f"{len(quantized) - len(known):,} of {len(quantized):,} modules not measured"
        return (
            (max(known), rest if len(known) < len(quantized) else "")
            if known
            else (None, NOT_MEASURED)
        )
    if name == "module_error":
        return _extreme([row.relative_error for row in quantized], sign=1)
    if name == "block_error":
        return _extreme([row.relative_error for row in fidelity.blocks], sign=1)
    return _extreme([row.agreement for row in fidelity.routers], sign=-1)


def _pooled(name: str, domain: str, fidelity: Fidelity) -> Found:
    row = next((row for row in fidelity.distribution if row.domain == domain), None)
    if row is None and fidelity.distribution:
        return (
            None,
            f"{NOT_MEASURED}: the text has {', '.join(row.domain for row in fidelity.distribution)}",
        )
    measured = getattr(row, name, None)
    return (None, NOT_MEASURED) if measured is None else (measured.value, NOT_FINITE)


def _likelihood(task: str, fidelity: Fidelity) -> Found:
    """The difference of a task's gold solutions, or the lowest of all tasks."""
    rows = [row for row in fidelity.likelihood if task in ("", row.task)]
    silent = [row for row in rows if row.difference is None]
    if silent or not rows:
        return None, f"{NOT_MEASURED}: {silent[0].reason}" if silent else NOT_MEASURED
    return _extreme([row.difference.value for row in rows if row.difference], sign=-1)


def _extreme(values: Sequence[float | None], sign: int) -> Found:
    """The largest (sign 1) or smallest (-1) of figures that are all measured."""
    known = [value for value in values if value is not None]
    if not values:
        return None, NOT_MEASURED
    return (
        (None, NOT_FINITE)
        if len(known) < len(values)
        else (max(known) if sign > 0 else min(known), "")
    )


def _lost(rows: Sequence[Benchmark]) -> Found:
    """Items of all tasks that the source has right and the artifact wrong."""
    silent = [row.task for row in rows if row.lost is None]
    if silent or not rows:
        return None, f"{NOT_MEASURED}: {', '.join(silent)} was not run" if silent else NOT_MEASURED
    return float(sum(row.lost or 0 for row in rows)), ""


def _bounded(figure: str, bound: str, found: Found, kept: bool) -> GateResult:
    value, reason = found
    if value is not None:
        return GateResult(
            figure=figure,
            bound=bound,
            value=value,
            ok=kept,
            reason="" if reason == NOT_FINITE else reason,
        )
    return GateResult(
        figure=figure,
        bound=bound,
        value=None,
        ok=False if reason == NOT_FINITE else None,
        reason=reason,
    )


# ----------------------------------------------------------------------------------------------- figures of one task


def _task(task: str, gate: Gate, row: Benchmark | None) -> list[GateResult]:
    """The bounds that are set, of those that a task takes."""
    if row is None or row.status == "not run":
        row, absent = None, f"not run: {row.reason}" if row else "not run"
    else:
        absent = NOT_MEASURED
    floor = row is not None and row.source == 0
    results = []
    if gate.min_recovery is not None:
        value = row.recovery.value if row and row.recovery else None
        reason = (
            absent
            if row is None
            else "the source scores 0: no information"
            if value is None
            else ""
        )
        kept = value is not None and value >= gate.min_recovery
        results.append(
            _bounded(f"{task}.recovery", f">= {gate.min_recovery:g}", (value, reason), kept)
        )
    if gate.margin_pp is not None:
        results.append(_margin(task, gate.margin_pp, row, absent))
    if gate.max_lost is not None:
        lost = float(row.lost) if row and row.lost is not None else None
        kept = lost is not None and lost <= gate.max_lost
        found = (
            (None, "the source scores 0: nothing can be lost")
            if floor
            else (lost, absent if lost is None else "")
        )
        results.append(_bounded(f"{task}.lost", f"<= {gate.max_lost}", found, kept))
    if gate.min_score is not None:
        score = row.artifact if row else None
        kept = score is not None and score >= gate.min_score
        results.append(
            _bounded(
                f"{task}.score",
                f">= {gate.min_score:g}",
                (score, absent if score is None else ""),
                kept,
            )
        )
    rates = (("truncated", gate.max_truncated_pp), ("unparsed", gate.max_unparsed_pp))
    return results + [
        _rise(task, name, most, row, absent) for name, most in rates if most is not None
    ]


def _rise(task: str, name: str, most: float, row: Benchmark | None, absent: str) -> GateResult:
    """By how many points the share of answers that were cut, or had no result, is above the source's."""
    before, after = (getattr(row, name) if row else None) or (None, None)
    rise = None if before is None or after is None else 100 * (after - before)
    kept = rise is not None and rise <= most
    return _bounded(
        f"{task}.{name}_pp", f"<= {most:g}", (rise, absent if rise is None else ""), kept
    )


def _margin(task: str, margin: float, row: Benchmark | None, absent: str) -> GateResult:
    """Non-inferiority: a loss of `margin` points is excluded when the paired interval lies above it."""
    figure, bound = f"{task}.delta_pp.low", f"> {-margin:g}" if margin else "> 0"
    if row and row.source == row.artifact == 0:
        return _bounded(figure, bound, (None, "both score 0: no information"), False)
    low, high = (row.delta_pp.ci if row and row.delta_pp else None) or (None, None)
    if row is None or low is None or high is None:
        return _bounded(figure, bound, (None, absent), False)
    open_ = low <= -margin <= high
    reason = (
        f"not resolved: {row.n:,} items cannot exclude a loss of {margin:g} points" if open_ else ""
    )
    return _bounded(figure, bound, (low, reason), low > -margin)
