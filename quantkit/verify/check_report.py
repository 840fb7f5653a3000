"""Checks of the report and the resolved plan against the manifest: copies of figures must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from quantkit.artifact.layout import FIDELITY, MANIFEST, PLAN
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json

STATUSES = ("accepted", "rejected", "not judged")
FIGURES = {
    "rule": "rule",
    "method": "method",
    "rounding": "rounding",
    "relative_error": "relative_error",
    "sqnr_db": "sqnr_db",
    "output_relative_error": "output_relative_error",
    "tokens": "tokens",
    "rescaled": "rescaled",
}
"""Keys of the report's modules, and of the same figures in the manifest."""
OLD_KEYS = {"output_relative_error": "output_error"}
"""Keys of manifests next to reports of version 1, where both are energy ratios."""


def find_report_faults(
    path: Path, manifest: Mapping[str, object], files: Mapping[str, object]
) -> Iterator[str]:
    """Yield figures that differ between two places; files that the manifest does not list are
    skipped.
    """
    status, plan = manifest.get("status"), manifest.get("plan")
    if status not in STATUSES:
        yield f"{MANIFEST}: status: expected one of {', '.join(STATUSES)}, found {status!r:.60}"
    contents = {
        name: read_or_explain(path, name)
        for name in (PLAN, FIDELITY)
        if name in files and (path / name).is_file()
    }
    yield from (values for values in contents.values() if isinstance(values, str))
    resolved, report = contents.get(PLAN), contents.get(FIDELITY)
    if isinstance(resolved, Mapping) and resolved.get("hash") != plan:
        yield f"{PLAN}: hash: not the plan that the manifest names"
    if isinstance(report, Mapping):
        if report.get("status") != status:
            yield (
                f"{FIDELITY}: status: expected {status!r} as in the manifest, found "
                f"{report.get('status')!r:.60}"
            )
        yield from find_gate_faults(report)
        yield from find_module_faults(report.get("modules"), manifest.get("modules"))


def find_gate_faults(report: Mapping[str, object]) -> Iterator[str]:
    """Yield a status that does not follow from its gates, and gates on the wrong side of their
    bound.
    """
    gates = report.get("gates")
    rows = [row for row in gates if isinstance(row, Mapping)] if isinstance(gates, list) else []
    expected = compute_status([row.get("ok") for row in rows])
    if report.get("status") != expected:
        yield (
            f"{FIDELITY}: status: expected {expected!r} by its gates, found "
            f"{report.get('status')!r:.60}"
        )
    for row in rows:
        if row.get("ok") is True and is_outside(row.get("value"), row.get("bound")):
            gate = f"{row.get('figure')!r:.60} {row.get('bound')!r:.60}"
            yield (
                f"{FIDELITY}: gates: {gate}: kept, it says, with the figure "
                f"{row.get('value')!r:.60}"
            )


def compute_status(outcomes: Sequence[object]) -> Literal["accepted", "rejected", "not judged"]:
    """Return the status by the gates' outcomes.

    "rejected" if a bound is missed (False), "accepted" if there are gates and all are kept,
    otherwise "not judged".
    """
    if any(ok is False for ok in outcomes):
        return "rejected"
    return "accepted" if outcomes and all(ok is True for ok in outcomes) else "not judged"


def is_outside(value: object, bound: object) -> bool:
    """Return whether a figure is clearly outside "<= 0.15", ">= 0.9" or "> -2".

    Bounds are written with six digits, so that a relative difference of 1e-5 is tolerated.
    """
    sign, _, number = bound.partition(" ") if isinstance(bound, str) else ("", "", "")
    try:
        limit = float(number)
    except ValueError:  # a size: "<= 400 GB"
        return False
    if type(value) not in (int, float):
        return value is None
    over = float(value) - limit  # type: ignore[arg-type]  # checked above
    over = over if sign.startswith("<") else -over
    return not over <= 1e-5 * abs(limit)  # nor when it is no number


def read_or_explain(path: Path, name: str) -> Mapping[str, object] | str:
    """Return the object in a file of the artifact, or why it cannot be read."""
    try:
        return read_json(path / name, ArtifactError)
    except ArtifactError as fault:
        return str(fault).removeprefix(f"{path}/")


def find_module_faults(reported: object, recorded: object) -> Iterator[str]:
    """Yield the modules whose figures differ between report and manifest."""
    rows = reported if isinstance(reported, list) else []
    reported_rows = {str(row.get("name")): row for row in rows if isinstance(row, Mapping)}
    records = recorded if isinstance(recorded, Mapping) else {}
    for name in dict.fromkeys([*reported_rows, *records]):
        row, record = reported_rows.get(name), records.get(name)
        if not isinstance(row, Mapping) or not isinstance(record, Mapping):
            yield (
                f"{FIDELITY}: modules: {name}: expected in report and manifest, found in one of "
                "them"
            )
            continue
        for key, other in FIGURES.items():
            expected = record.get(other if other in record else OLD_KEYS.get(key, other))
            if row.get(key) != expected:
                yield (
                    f"{FIDELITY}: modules: {name}: {key}: expected {expected} as in the manifest"
                )
