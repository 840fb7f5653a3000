"""Where everything lies inside an artifact, and the manifest as it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import ArtifactError
from quantkit.io.files import read_json

MANIFEST = "quantkit/manifest.json"


SIGNATURE = "quantkit/signature.json"


INDEX = "model.safetensors.index.json"


SCHEMA_VERSION = 1


UNHASHED = frozenset({"quantkit/timings.json"})
"""What may lie in an artifact without a hash: figures that depend on the clock."""


LOADTEST, LOADTEST_PAGE = "quantkit/loadtest.json", "quantkit/loadtest.html"


ADDED_LATER = (LOADTEST, LOADTEST_PAGE)
"""What `quantkit loadtest` adds later, by other machines: neither manifest nor signature speaks of it."""


def read_manifest(path: Path) -> Mapping[str, object]:
    """The manifest of an artifact; a folder without one is not an artifact."""
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: expected the folder of an artifact, found none; check the path"
        )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"{path}: no {MANIFEST}: not an artifact of quantkit, or its build did not finish"
        )
    manifest = read_json(path / MANIFEST, ArtifactError)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path / MANIFEST}: schema_version: expected {SCHEMA_VERSION}, found {manifest.get('schema_version')!r}; "
            "use the quantkit that made it"
        )
    return manifest


def get_section(manifest: Mapping[str, object], key: str, path: Path) -> Mapping[str, object]:
    """An object of the manifest."""
    value = manifest.get(key)
    if not isinstance(value, Mapping):
        raise ArtifactError(
            f"{path / MANIFEST}: {key}: expected an object, found {type(value).__name__}; pull it again"
        )
    return value


def format_name(manifest: Mapping[str, object]) -> object:
    """The format; manifests that do not name it are older, and their quantization_config tells."""
    entry = manifest.get("quantization_config")
    if manifest.get("format") is not None or not isinstance(entry, Mapping):
        return manifest.get("format", "dense")
    return str(entry.get("checkpoint_format") or entry.get("quant_method")).replace("-", "_")


TIMINGS = "quantkit/timings.json"


FIDELITY = "quantkit/fidelity.json"


EVIDENCE = "quantkit/"
