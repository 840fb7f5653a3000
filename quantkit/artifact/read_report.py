"""The report of an artifact, read back from its fidelity.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import EVIDENCE_FOLDER, FIDELITY, MANIFEST
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.errors import ArtifactError
from quantkit.io.files import is_file, read_json, sha256_file


def read_report(artifact: Path) -> Fidelity:
    """The report inside an artifact's folder; ArtifactError when there is none or it cannot be read."""
    path = artifact / FIDELITY
    if not path.is_file():
        raise ArtifactError(
            f"{artifact}: no {FIDELITY}: not an artifact of quantkit, or its build did not finish"
        )
    return read_report_file(path)


def read_artifact_report(artifact: Path) -> Fidelity:
    """The report of an artifact, as it was sealed once it is."""
    return (
        read_sealed_report(artifact)[0]
        if (artifact / MANIFEST).is_file()
        else read_report(artifact)
    )


def read_report_file(path: Path) -> Fidelity:
    """The report in a file; ArtifactError when it cannot be read."""
    try:
        return Fidelity.model_validate(read_json(path, ArtifactError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: {where}: {first['msg']}; use the quantkit that made it, or pull it again"
        ) from None


def read_sealed_report(
    artifact: Path, absent: Collection[str] = ()
) -> tuple[Fidelity, Mapping[str, object]]:
    """Report and manifest of an artifact whose evidence is what was sealed; the weights are left to `verify`.

    absent: evidence that need not be there. Raises ArtifactError: nobody must go by figures that were changed after the
    build.
    """
    manifest = read_manifest(artifact)
    for name, entry in get_section(manifest, "files", artifact).items():
        if not name.startswith(EVIDENCE_FOLDER) or name in absent:
            continue
        expected = entry.get("sha256") if isinstance(entry, Mapping) else None
        there = is_file(artifact / name)
        if not there or sha256_file(artifact / name, ArtifactError) != expected:
            raise ArtifactError(
                f"{artifact / name}: expected the file that {MANIFEST} names, found "
                f"{'another' if there else 'none'}; pull or build the artifact again"
            )
    return read_report(artifact), manifest
