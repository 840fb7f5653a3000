"""The values of an artifact for a tracker: settings, figures, series by block, files, hash."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import FIDELITY, MANIFEST, MODEL_CARD, PAGE
from quantkit.artifact.read_report import read_artifact_report
from quantkit.figure_readers import ALL_TEXT
from quantkit.figures import FIGURES
from quantkit.io.files import is_file, sha256_file

FILES = (PAGE, FIDELITY, MODEL_CARD)
"""The page with its plots, the report and the card; weights are not sent."""
NOT_IN_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)
"""Characters that MLflow refuses in the name of a metric."""


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """One run of a tracker.

    settings: source, scheme, texts and versions, as text; figures: name -> finite number; series:
    name -> a number per block, None where it is not finite; manifest: sha256 of the artifact's
    manifest, which names every file by its hash; files: those that exist.
    """

    name: str
    settings: Mapping[str, str]
    figures: Mapping[str, float]
    series: Mapping[str, Sequence[float | None]]
    manifest: str
    files: tuple[Path, ...]


def read_run_values(artifact: Path) -> RunValues:
    """Read an artifact's report and hash; raises ArtifactError for one without a valid report."""
    fidelity = read_artifact_report(artifact)
    manifest = sha256_file(artifact / MANIFEST)
    return RunValues(
        name=fidelity.artifact.name,
        settings={**list_settings(fidelity), "manifest_sha256": manifest},
        figures=list_figures(fidelity),
        series=list_series(fidelity),
        manifest=manifest,
        files=tuple(artifact / name for name in FILES if is_file(artifact / name)),
    )


def list_settings(fidelity: Fidelity) -> dict[str, str]:
    """Return model, scheme, texts, versions, seeds and hashes as text."""
    source, texts = fidelity.source, (fidelity.calibration, fidelity.measured_on)
    settings = {
        "source": source.model,
        "source_revision": source.revision or "",
        "architecture": source.architecture,
        "format": fidelity.artifact.format,
        "scheme": fidelity.artifact.scheme,
        "status": fidelity.status,
        "command": fidelity.command,
    }
    for use, text in zip(("calibration", "fidelity_text"), texts, strict=True):
        if text is not None:
            settings |= {use: text.set, f"{use}_tokens": str(text.tokens)}
    settings |= {f"version/{name}": value for name, value in fidelity.versions.items()}
    settings |= {f"seed/{name}": str(value) for name, value in fidelity.seeds.items()}
    settings |= {f"sha256/{name}": value for name, value in fidelity.hashes.items()}
    return {clean_name(name): value for name, value in settings.items() if value}


def list_figures(fidelity: Fidelity) -> dict[str, float]:
    """Return every measured figure of all text with its interval, by kind of text, and scores.

    No name is a folder of another one: MLflow's file store keeps each metric in a file.
    """
    values: dict[str, float | None] = {}
    kinds = [row.domain for row in fidelity.distribution if row.domain != ALL_TEXT]
    for figure in FIGURES:
        for part in ("", *(kinds if figure.scope == "domain" and not figure.reader else ())):
            reading = figure.read(fidelity, part)
            name = f"by_kind/{figure.key}/{part}" if part else figure.key
            values[name] = reading.value
            if reading.ci and not part:
                low, high = reading.ci
                values |= {f"interval/{name}/low": low, f"interval/{name}/high": high}
    for row in fidelity.benchmarks:
        values |= {
            f"benchmark/{row.task}/source": row.source,
            f"benchmark/{row.task}/artifact": row.artifact,
            f"benchmark/{row.task}/recovery": row.recovery.value if row.recovery else None,
        }
    return {clean_name(name): value for name, value in values.items() if value is not None}


def list_series(fidelity: Fidelity) -> dict[str, Sequence[float | None]]:
    """Return the figures that have one value per block, in the order of the model."""
    series: dict[str, Sequence[float | None]] = {
        "by_block/hidden_state_error": [row.relative_error for row in fidelity.blocks],
        "by_block/router_agreement": [row.agreement for row in fidelity.routers],
    }
    return {name: values for name, values in series.items() if values}


def clean_name(name: str) -> str:
    """Return a name of a metric that every tracker accepts."""
    return NOT_IN_NAMES.sub("_", name)
