"""Sealing: the manifest with the sha256 of every other file, written last.

Figures that depend on the clock or the machine's load are in timings.json, the one file without a
hash: two builds of a recipe have the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.artifact.layout import MANIFEST, SCHEMA_VERSION, TIMINGS, find_layout_faults
from quantkit.checkpoint.tensors import WrittenFile
from quantkit.errors import ArtifactError
from quantkit.io.files import sha256_file, sync_folder, write_json
from quantkit.io.owned_dirs import OWNER_FILE


def hash_files(folder: Path, known: Mapping[str, WrittenFile]) -> dict[str, dict[str, object]]:
    """Return sha256 and bytes of every file but the manifest, the timings and the marker of the
    staging folder, by relative path in sorted order.

    known: files whose hash was computed while they were written.
    """
    entries: dict[str, dict[str, object]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in {MANIFEST, TIMINGS, OWNER_FILE}:
            continue
        written = known.get(name)
        size = written.n_bytes if written else path.stat().st_size
        entries[name] = {
            "sha256": written.sha256 if written else sha256_file(path, ArtifactError),
            "bytes": size,
        }
    return entries


def seal_artifact(
    folder: Path, manifest: Mapping[str, object], known: Mapping[str, WrittenFile]
) -> str:
    """Write the manifest, after every other file, and return its sha256.

    Raises ArtifactError for a folder with other files than those of an artifact.
    """
    files = hash_files(folder, known)
    if faults := list(find_layout_faults([*files, MANIFEST])):
        raise ArtifactError(
            f"{folder}: expected the files of an artifact only, found:\n" + "\n".join(faults)
        )
    values = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "files": files,
        "unhashed": [TIMINGS],
    }
    write_json(folder / MANIFEST, values)
    sync_folder(folder)
    return sha256_file(folder / MANIFEST, ArtifactError)


def is_sealed(path: Path, manifest: str) -> bool:
    """Return whether the artifact at `path` is the one whose manifest has this sha256."""
    return (path / MANIFEST).is_file() and sha256_file(path / MANIFEST, ArtifactError) == manifest
