"""Reading the manifest of an artifact. No torch: `quantkit verify` starts with it."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from sys import float_info

from quantkit.artifact.layout import MANIFEST, SCHEMA_VERSION
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json


def read_manifest(path: Path) -> Mapping[str, object]:
    """Return the manifest of the artifact in folder `path`.

    Raises ArtifactError for a folder without a manifest and for a manifest of another schema
    version.
    """
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: expected the folder of an artifact, found none; check the path"
        )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path}: no {MANIFEST}: not an artifact of quantkit, or its build did not finish"
        )
    manifest = read_json(path / MANIFEST, ArtifactError)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path / MANIFEST}: schema_version: expected {SCHEMA_VERSION}, found {version!r}; "
            "use the quantkit that made it"
        )
    return manifest


def get_section(manifest: Mapping[str, object], key: str, path: Path) -> Mapping[str, object]:
    """Return the object under `key` of a manifest; `path` is the artifact's folder.

    Raises ArtifactError.
    """
    section = manifest.get(key)
    if not isinstance(section, Mapping):
        raise ArtifactError(
            f"{path / MANIFEST}: {key}: expected an object, found {type(section).__name__}; pull "
            "it again"
        )
    return section


def get_format_name(manifest: Mapping[str, object]) -> object:
    """Return the format's name.

    For older manifests without one, the name that quantization_config implies.
    """
    entry = manifest.get("quantization_config")
    if manifest.get("format") is not None or not isinstance(entry, Mapping):
        return manifest.get("format", "dense")
    return str(entry.get("checkpoint_format") or entry.get("quant_method")).replace("-", "_")


def get_output_error(record: Mapping[str, object]) -> float | None:
    """Return the relative error of a module's outputs; None if the manifest has none.

    Older manifests have the key `output_error`: an energy ratio, the square of this norm ratio.
    """
    for key, convert in (("output_relative_error", float), ("output_error", sqrt)):
        value = record.get(key)
        if isinstance(value, int | float) and 0 <= value <= float_info.max:
            return convert(value)
    return None
