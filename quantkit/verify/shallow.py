"""Is an artifact what its manifest says, and can it be served? Hashes, headers, index, config and numbers; no torch.

Every fault is found before any is reported. `quantkit verify` is for whoever receives an artifact: it starts fast and
reads each byte once, for its hash and for a look at the numbers (checks/). What an artifact says of its source is
checked by `quantkit verify --deep` (deep/), who made it by its signature (signing).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from quantkit.artifact.layout import (
    ADDED_LATER,
    CONFIG,
    INDEX,
    LOADTEST,
    MANIFEST,
    SIGNATURE,
    SINGLE,
    UNHASHED,
)
from quantkit.artifact.read_manifest import get_format_name, get_section, read_manifest
from quantkit.checkpoint.header import Header, read_header
from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.io.files import read_json

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
READERS = 4
"""Files that are read at once."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked. sha256: of every hashed file; unsealed: files beside them that nobody vouches for; notes: what
    was not looked at, and why."""

    path: Path
    status: str
    files: int
    tensors: int
    n_bytes: int
    modules: int = 0
    sha256: Mapping[str, str] = field(default_factory=dict)
    unsealed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScannedFile:
    """One reading of a file: its hash, None when it could not be read, and what is wrong with it."""

    sha256: str | None
    faults: tuple[str, ...] = ()


def verify_artifact(path: Path) -> VerifyReport:
    """Check an artifact; ArtifactError with every fault found, and what to do."""
    from quantkit.verify.check_config import (  # numpy, tables of models: when there is a file
        config_faults,
        model_faults,
    )
    from quantkit.verify.check_report import report_faults
    from quantkit.verify.classify_tensors import read_contents

    manifest = read_manifest(path)
    files, present = get_section(manifest, "files", path), entries(path)
    here = {name: entry for name, entry in files.items() if present.get(name) == "file"}
    headers, damaged = read_headers(path, here)
    specs = {name: spec for header in headers.values() for name, spec in header.specs.items()}
    owner = {name: file for file, header in headers.items() for name in header.specs}
    modules = get_section(manifest, "modules", path)

    def small(name: str) -> bytes:
        from quantkit.checkpoint.scan import read_small_tensor

        return read_small_tensor(path / owner[name], headers[owner[name]], name)

    found = read_contents(get_format_name(manifest), modules, specs, small)
    scanned = scan_all(path, here, headers, found.numbers)
    faults = [*name_faults(files, manifest, present), *hash_faults(path, files, present, scanned)]
    faults += [
        *damaged,
        *(fault for each in scanned.values() for fault in each.faults),
        *twice(headers),
    ]
    faults += tensor_faults(specs, get_section(manifest, "tensors", path))
    faults += index_faults(path, specs, headers, here)
    config, notes = read_config(path, here, faults), tuple[str, ...]()
    faults += found.faults
    if config is not None:
        if config.get("quantization_config") != manifest.get("quantization_config"):
            faults.append(
                "config.json: quantization_config is not the one the artifact was built with"
            )
        if not found.faults and not damaged:
            unfit, note = model_faults(config, found)
            faults += [*config_faults(config, found), *unfit]
            notes = (note,) if note else ()
    faults += report_faults(path, manifest, here)
    added = tuple(name for name in ADDED_LATER if present.get(name) == "file")
    faults += added_faults(path, added)
    refuse(path, faults)
    return VerifyReport(
        path=path,
        status=str(manifest.get("status")),
        files=len(files),
        tensors=len(specs),
        n_bytes=sum((path / name).stat().st_size for name in here),
        modules=len(modules),
        sha256={name: each.sha256 for name, each in scanned.items() if each.sha256},
        unsealed=added,
        notes=notes,
    )


def refuse(path: Path, faults: list[str]) -> None:
    """ArtifactError with the first faults and how many more there are; nothing without faults."""
    if faults:
        lines = [printable(fault) for fault in dict.fromkeys(faults)]
        more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ArtifactError(
            f"{path}: not what its manifest says; pull or build it again:\n"
            + "\n".join(lines[:20])
            + more
        )


def printable(text: str) -> str:
    """A sentence without characters that a terminal obeys: names of files and tensors are anybody's."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


# ----------------------------------------------------------------------------------------------------- the manifest


# -------------------------------------------------------------------------------------------------------- the files


def entries(path: Path) -> dict[str, str]:
    """Everything below the folder but folders, by relative name: "file", "a link", or "no file" (a pipe)."""
    found: dict[str, str] = {}
    for folder, folders, names in os.walk(path, onerror=None):
        for name in (*names, *(each for each in folders if (Path(folder) / each).is_symlink())):
            place = Path(folder) / name
            mode = place.lstat().st_mode
            kind = "a link" if place.is_symlink() else "file" if S_ISREG(mode) else "no file"
            found[place.relative_to(path).as_posix()] = kind
    return found


def name_faults(
    files: Mapping[str, object], manifest: Mapping[str, object], present: Mapping[str, str]
) -> Iterator[str]:
    """Files that are not in the manifest, and names that must not be."""
    told = manifest.get("unhashed")
    free = {str(name) for name in told} if isinstance(told, list) else set()
    for name in sorted(free - UNHASHED):
        yield f"{MANIFEST}: unhashed: expected {', '.join(UNHASHED)} at most, found {name}"
    beside = {MANIFEST, SIGNATURE, *ADDED_LATER, *(free & UNHASHED)}
    for name in sorted(set(present) - set(files) - beside):
        yield f"{name}: not in the manifest"
    for name in sorted(beside & set(present)):
        if present[name] != "file":
            yield f"{name}: {present[name]}, expected a file"
    for name in sorted(files):
        if name in {MANIFEST, SIGNATURE, *ADDED_LATER, *UNHASHED}:
            yield f"{MANIFEST}: files: {name}: expected without a hash, found one"
        if name.endswith(PICKLED) and not name.startswith("vocab."):
            yield f"{name}: a pickle, which runs code when it is loaded; an artifact holds safetensors only"


def added_faults(path: Path, added: Sequence[str]) -> Iterator[str]:
    """What is wrong with files that were added later: of a load test the form, for nothing says which figures."""
    if LOADTEST in added:
        from quantkit.artifact.loadtest_schema import (
            find_load_test_faults,  # pydantic: when there is one
        )

        yield from (
            fault.removeprefix(f"{path}/") for fault in find_load_test_faults(path / LOADTEST)
        )


def hash_faults(
    path: Path,
    files: Mapping[str, object],
    present: Mapping[str, str],
    scanned: Mapping[str, ScannedFile],
) -> Iterator[str]:
    """Files of the manifest that are missing or changed."""
    for name, entry in sorted(files.items()):
        kind = present.get(name)
        if kind != "file":
            yield f"{name}: missing" if kind is None else f"{name}: {kind}, expected a file"
            continue
        expected = entry if isinstance(entry, Mapping) else {}
        size = (path / name).stat().st_size
        if size != expected.get("bytes"):
            yield f"{name}: expected {expected.get('bytes')} bytes, found {size}"
        elif scanned[name].sha256 != expected.get("sha256"):
            yield f"{name}: expected sha256 {expected.get('sha256')}, found another"


def scan_all(
    path: Path,
    files: Mapping[str, object],
    headers: Mapping[str, Header],
    numbers: Mapping[str, object],
) -> dict[str, ScannedFile]:
    """Read every file once, several at a time."""
    names = sorted(files)
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        return dict(
            zip(
                names,
                readers.map(lambda name: scan_one(path / name, headers.get(name), numbers), names),
            )
        )


def scan_one(file: Path, header: Header | None, numbers: Mapping[str, object]) -> ScannedFile:
    """Hash a file and look at the numbers of its tensors, in one reading."""
    from quantkit.checkpoint.scan import scan_file
    from quantkit.formats.common.checks import ValueCheck
    from quantkit.verify.check_values import Watch

    watched = {
        name: Watch(spec=spec, wanted=wanted)
        for name, spec in (header.specs if header else {}).items()
        if isinstance(wanted := numbers.get(name), ValueCheck)
    }

    def visit(name: str, begin: int, piece: memoryview) -> None:
        if name in watched:
            watched[name].see(begin, piece)

    try:
        digest = scan_file(file, header, visit if watched else None)
    except ArtifactError as fault:
        return ScannedFile(sha256=None, faults=(str(fault),))
    told = (each.close() for each in watched.values())
    return ScannedFile(sha256=digest, faults=tuple(filter(None, told)))


# ------------------------------------------------------------------------------------- headers, index, configuration


def read_headers(path: Path, files: Mapping[str, object]) -> tuple[dict[str, Header], list[str]]:
    """The headers of the weight files by name, and a sentence for each that is damaged."""
    found, faults = dict[str, Header](), list[str]()
    for name in sorted(files):
        if name.endswith(".safetensors"):
            try:
                found[name] = read_header(path / name)
            except CheckpointError as fault:
                faults.append(str(fault))
    return found, faults


def twice(headers: Mapping[str, Header]) -> Iterator[str]:
    """Tensors that are stored in more than one file."""
    owner: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.specs:
            if name in owner:
                yield f"tensor {name}: expected in one file, found in {owner[name]} and {file}"
            owner[name] = file


def tensor_faults(specs: Mapping[str, TensorSpec], told: Mapping[str, object]) -> Iterator[str]:
    """Tensors whose header differs from the manifest's list."""
    for name in sorted(set(specs) | set(told)):
        expected = told.get(name)
        found = [specs[name].dtype, list(specs[name].shape)] if name in specs else None
        if expected != found:
            yield f"tensor {name}: expected {expected or 'none'}, found {found or 'none'}"


def index_faults(
    path: Path,
    specs: Mapping[str, TensorSpec],
    headers: Mapping[str, Header],
    files: Mapping[str, object],
) -> Iterator[str]:
    """Entries of the index that lead nowhere, tensors it forgets, a total that is wrong."""
    name, shards = INDEX, [file for file in files if file.endswith(".safetensors")]
    if name not in files:
        if len(shards) != 1 or shards != [SINGLE]:
            yield f"{name}: missing, with {len(shards)} shards"
        return
    try:
        index = read_json(path / name, ArtifactError)
    except ArtifactError as fault:
        yield str(fault)
        return
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    held = {tensor: file for file, header in headers.items() for tensor in header.specs}
    if not isinstance(weight_map, Mapping) or dict(weight_map) != held:
        entry = first_wrong(weight_map, held) if isinstance(weight_map, Mapping) else ""
        yield f"{name}: weight_map does not agree with the shards' headers{entry}"
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if total != sum(spec.n_bytes for spec in specs.values()):
        yield f"{name}: metadata.total_size: expected {sum(s.n_bytes for s in specs.values())}, found {total}"


def first_wrong(weight_map: Mapping[str, object], held: Mapping[str, str]) -> str:
    """Where the index and the headers first differ."""
    name = next(name for name in [*weight_map, *held] if weight_map.get(name) != held.get(name))
    return (
        f": {name}: expected {held.get(name, 'no entry')}, found {weight_map.get(name, 'no entry')}"
    )


def read_config(
    path: Path, files: Mapping[str, object], faults: list[str]
) -> Mapping[str, object] | None:
    """config.json; None when it is missing, or damaged, which is added to the faults."""
    if CONFIG not in files:
        if not (path / CONFIG).is_symlink():
            faults.append("config.json: missing")
        return None
    try:
        return read_json(path / CONFIG, ArtifactError)
    except ArtifactError as fault:
        faults.append(str(fault))
        return None
