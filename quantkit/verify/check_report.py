"""Do the report and the resolved plan belong to the manifest? Their copies of its figures are compared."""

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
    "output_relative_error": "output_error",
    "tokens": "tokens",
    "rescaled": "rescaled",
}
"""What the report says of a module, and the manifest's word for it."""


def report_faults(
    path: Path, manifest: Mapping[str, object], files: Mapping[str, object]
) -> Iterator[str]:
    """Figures that stand in two places and differ; files the manifest does not list are left out."""
    status, plan = manifest.get("status"), manifest.get("plan")
    if status not in STATUSES:
        yield f"{MANIFEST}: status: expected one of {', '.join(STATUSES)}, found {status!r:.60}"
    found = {
        name: readable(path, name)
        for name in (PLAN, FIDELITY)
        if name in files and (path / name).is_file()
    }
    yield from (values for values in found.values() if isinstance(values, str))
    resolved, report = found.get(PLAN), found.get(FIDELITY)
    if isinstance(resolved, Mapping) and resolved.get("hash") != plan:
        yield f"{PLAN}: hash: not the plan that the manifest names"
    if isinstance(report, Mapping):
        if report.get("status") != status:
            yield f"{FIDELITY}: status: expected {status!r} as in the manifest, found {report.get('status')!r:.60}"
        yield from gate_faults(report)
        yield from module_faults(report.get("modules"), manifest.get("modules"))


def gate_faults(report: Mapping[str, object]) -> Iterator[str]:
    """A status that its gates do not give, and gates whose figure lies on the other side of their bound."""
    listed = report.get("gates")
    rows = [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []
    expected = compute_status([row.get("ok") for row in rows])
    if report.get("status") != expected:
        yield f"{FIDELITY}: status: expected {expected!r} by its gates, found {report.get('status')!r:.60}"
    for row in rows:
        if row.get("ok") is True and misses(row.get("value"), row.get("bound")):
            told = f"{row.get('figure')!r:.60} {row.get('bound')!r:.60}"
            yield f"{FIDELITY}: gates: {told}: kept, it says, with the figure {row.get('value')!r:.60}"


def compute_status(outcomes: Sequence[object]) -> Literal["accepted", "rejected", "not judged"]:
    """rejected when a bound is missed (False); accepted when there are some and all are kept; otherwise not judged."""
    if any(ok is False for ok in outcomes):
        return "rejected"
    return "accepted" if outcomes and all(ok is True for ok in outcomes) else "not judged"


def misses(value: object, bound: object) -> bool:
    """Whether a figure is clearly outside "<= 0.15", ">= 0.9" or "> -2": bounds are written with six digits."""
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


def readable(path: Path, name: str) -> Mapping[str, object] | str:
    """The object in a file of the artifact, or why there is none."""
    try:
        return read_json(path / name, ArtifactError)
    except ArtifactError as fault:
        return str(fault).removeprefix(f"{path}/")


def module_faults(reported: object, recorded: object) -> Iterator[str]:
    """Modules of which report and manifest tell different things."""
    rows = reported if isinstance(reported, list) else []
    told = {str(row.get("name")): row for row in rows if isinstance(row, Mapping)}
    known = recorded if isinstance(recorded, Mapping) else {}
    for name in dict.fromkeys([*told, *known]):
        row, record = told.get(name), known.get(name)
        if not isinstance(row, Mapping) or not isinstance(record, Mapping):
            yield f"{FIDELITY}: modules: {name}: expected in report and manifest, found in one of them"
            continue
        for key, other in FIGURES.items():
            if row.get(key) != record.get(other):
                yield f"{FIDELITY}: modules: {name}: {key}: expected {record.get(other)} as in the manifest"
