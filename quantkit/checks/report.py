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
    if PLAN in files and (values := readable(path / PLAN)) is not None and values.get("hash") != plan:
        yield f"{PLAN}: hash: not the plan that the manifest names"
    if REPORT not in files or (values := readable(path / REPORT)) is None:
        return
    if values.get("status") != status:
        yield f"{REPORT}: status: expected {status!r} as in the manifest, found {values.get('status')!r:.60}"
    yield from module_faults(values.get("modules"), manifest.get("modules"))


def readable(path: Path) -> Mapping[str, object] | None:
    """The object in a file; None when it is missing or damaged, which is told elsewhere."""
    try:
        return read_json(path, ArtifactError)
    except ArtifactError:
        return None


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
