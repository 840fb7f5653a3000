"""Do the report and the resolved plan belong to the manifest? Their copies of its figures are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from quantkit.errors import ArtifactError
from quantkit.storage.files import read_json

REPORT, PLAN = "quantkit/fidelity.json", "quantkit/plan.json"
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


def report_faults(path: Path, manifest: Mapping[str, object], files: Mapping[str, object]) -> Iterator[str]:
    """Figures that stand in two places and differ; files the manifest does not list are left out."""
    status, plan = manifest.get("status"), manifest.get("plan")
    if status not in STATUSES:
        yield f"quantkit/manifest.json: status: expected one of {', '.join(STATUSES)}, found {status!r:.60}"
    found = {name: readable(path, name) for name in (PLAN, REPORT) if name in files and (path / name).is_file()}
    yield from (values for values in found.values() if isinstance(values, str))
    resolved, report = found.get(PLAN), found.get(REPORT)
    if isinstance(resolved, Mapping) and resolved.get("hash") != plan:
        yield f"{PLAN}: hash: not the plan that the manifest names"
    if isinstance(report, Mapping):
        if report.get("status") != status:
            yield f"{REPORT}: status: expected {status!r} as in the manifest, found {report.get('status')!r:.60}"
        yield from module_faults(report.get("modules"), manifest.get("modules"))


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
            yield f"{REPORT}: modules: {name}: expected in report and manifest, found in one of them"
            continue
        for key, other in FIGURES.items():
            if row.get(key) != record.get(other):
                yield f"{REPORT}: modules: {name}: {key}: expected {record.get(other)} as in the manifest"
