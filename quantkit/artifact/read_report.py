"""Reading the report of an artifact, fidelity.json."""

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
    """Read the report in an artifact's folder.

    Raises ArtifactError if it is missing or unreadable.
    """
    path = artifact / FIDELITY
    if not path.is_file():
        raise ArtifactError(
            f"{artifact}: no {FIDELITY}: not an artifact of quantkit, or its build did not finish"
        )
    return read_report_file(path)


def read_artifact_report(artifact: Path) -> Fidelity:
    """Read the report of an artifact.

    Once the artifact is sealed, check it against the manifest.
    """
    return (
        read_sealed_report(artifact)[0]
        if (artifact / MANIFEST).is_file()
        else read_report(artifact)
    )


def read_report_file(path: Path) -> Fidelity:
    """Read the report in a file; raises ArtifactError."""
    try:
        return Fidelity.model_validate(read_json(path, ArtifactError))
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: {location}: {first['msg']}; use the quantkit that made it, or pull it again"
        ) from None


def read_sealed_report(
    artifact: Path, absent: Collection[str] = ()
) -> tuple[Fidelity, Mapping[str, object]]:
    """Read report and manifest of an artifact, with the hashes of its evidence checked.

    absent: evidence that may be missing. `verify` checks the weights. Raises ArtifactError for
    figures that were changed after the build.
    """
    manifest = read_manifest(artifact)
    for name, entry in get_section(manifest, "files", artifact).items():
        if not name.startswith(EVIDENCE_FOLDER) or name in absent:
            continue
        expected = entry.get("sha256") if isinstance(entry, Mapping) else None
        exists = is_file(artifact / name)
        if not exists or sha256_file(artifact / name, ArtifactError) != expected:
            raise ArtifactError(
                f"{artifact / name}: expected the file that {MANIFEST} names, found "
                f"{'another' if exists else 'none'}; pull or build the artifact again"
            )
    return read_report(artifact), manifest
