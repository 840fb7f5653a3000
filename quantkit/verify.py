"""Is an artifact what its manifest says? Hashes, headers, index and config, without torch and without unpacking.

Every fault is found before any is reported. `quantkit verify` is for whoever receives an artifact: it starts fast and
reads each byte once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.storage.files import read_json, sha256_file
from quantkit.storage.header import read_header

MANIFEST = "quantkit/manifest.json"
INDEX = "model.safetensors.index.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was checked."""

    path: Path
    status: str
    files: int
    tensors: int
    n_bytes: int


def verify(path: Path) -> Verified:
    """Check an artifact; ArtifactError with every fault found, and what to do."""
    manifest = read_manifest(path)
    files, n_bytes = mapping(manifest, "files", path), 0
    faults = list(file_faults(path, files, unhashed(manifest)))
    specs: dict[str, TensorSpec] = {}
    for name in sorted(files):
        if name.endswith(".safetensors") and (path / name).is_file():
            try:
                specs |= read_header(path / name).specs
            except CheckpointError as fault:
                faults.append(str(fault))
        n_bytes += (path / name).stat().st_size if (path / name).is_file() else 0
    faults += tensor_faults(specs, mapping(manifest, "tensors", path))
    faults += index_faults(path, specs, files)
    faults += config_faults(path, manifest)
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(
            f"{path}: not what its manifest says; pull or build it again:\n" + "\n".join(faults[:20]) + more
        )
    status = str(manifest.get("status"))
    return Verified(path=path, status=status, files=len(files), tensors=len(specs), n_bytes=n_bytes)


def read_manifest(path: Path) -> Mapping[str, object]:
    """The manifest of an artifact; a folder without one is not an artifact."""
    if not path.is_dir():
        raise ArtifactError(f"{path}: expected the folder of an artifact, found none; check the path")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path}: no {MANIFEST}: not an artifact of quantkit, or its build did not finish")
    manifest = read_json(path / MANIFEST, ArtifactError)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path / MANIFEST}: schema_version: expected {SCHEMA_VERSION}, found {manifest.get('schema_version')!r}; "
            "use the quantkit that made it"
        )
    return manifest


def mapping(manifest: Mapping[str, object], key: str, path: Path) -> Mapping[str, object]:
    """An object of the manifest."""
    value = manifest.get(key)
    if not isinstance(value, Mapping):
        raise ArtifactError(
            f"{path / MANIFEST}: {key}: expected an object, found {type(value).__name__}; pull it again"
        )
    return value


def unhashed(manifest: Mapping[str, object]) -> frozenset[str]:
    """Files whose content depends on the clock, which the manifest names without a hash."""
    names = manifest.get("unhashed")
    return frozenset(str(name) for name in names) if isinstance(names, list) else frozenset()


def file_faults(path: Path, files: Mapping[str, object], free: frozenset[str]) -> Iterator[str]:
    """Files that are missing, changed, or not in the manifest."""
    found_here = (found for found in path.rglob("*") if found.is_symlink() or not found.is_dir())
    present = {found.relative_to(path).as_posix() for found in found_here}
    for name in sorted(present - set(files) - free - {MANIFEST}):
        yield f"{name}: not in the manifest"
    for name, entry in sorted(files.items()):
        if name not in present or (path / name).is_symlink():
            yield f"{name}: missing" if name not in present else f"{name}: a link, expected a file"
            continue
        expected = entry if isinstance(entry, Mapping) else {}
        size = (path / name).stat().st_size
        if size != expected.get("bytes"):
            yield f"{name}: expected {expected.get('bytes')} bytes, found {size}"
        elif sha256_file(path / name, ArtifactError) != expected.get("sha256"):
            yield f"{name}: expected sha256 {expected.get('sha256')}, found another"


def tensor_faults(specs: Mapping[str, TensorSpec], told: Mapping[str, object]) -> Iterator[str]:
    """Tensors whose header differs from the manifest's list."""
    for name in sorted(set(specs) | set(told)):
        expected = told.get(name)
        found = [specs[name].dtype, list(specs[name].shape)] if name in specs else None
        if expected != found:
            yield f"tensor {name}: expected {expected or 'none'}, found {found or 'none'}"


def index_faults(path: Path, specs: Mapping[str, TensorSpec], files: Mapping[str, object]) -> Iterator[str]:
    """Entries of the index that lead nowhere, tensors it forgets, a total that is wrong."""
    name, shards = INDEX, [file for file in files if file.endswith(".safetensors")]
    if not (path / name).is_file():
        if len(shards) > 1:
            yield f"{name}: missing, with {len(shards)} shards"
        return
    try:
        index = read_json(path / name, ArtifactError)
    except ArtifactError as fault:
        yield str(fault)
        return
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    held = {tensor: file for file in shards if (path / file).is_file() for tensor in header_names(path / file)}
    if not isinstance(weight_map, Mapping) or dict(weight_map) != held:
        yield f"{name}: weight_map does not agree with the shards' headers"
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if total != sum(spec.n_bytes for spec in specs.values()):
        yield f"{name}: metadata.total_size: expected {sum(s.n_bytes for s in specs.values())}, found {total}"


def header_names(path: Path) -> tuple[str, ...]:
    """Tensor names of a shard; none when its header is damaged, which is reported elsewhere."""
    try:
        return tuple(read_header(path).specs)
    except CheckpointError:
        return ()


def config_faults(path: Path, manifest: Mapping[str, object]) -> Iterator[str]:
    """A config.json whose quantization_config is not the one the artifact was written with."""
    if not (path / "config.json").is_file():
        return  # reported as a missing file
    try:
        found = read_json(path / "config.json", ArtifactError)
    except ArtifactError as fault:
        yield str(fault)
        return
    if found.get("quantization_config") != manifest.get("quantization_config"):
        yield "config.json: quantization_config is not the one the artifact was built with"
