"""Checks of an artifact against its manifest: files, hashes, headers, config, values; no torch.

The checks cover the files that engines load (README.md): one set of weights, no file of another
kind, no key that leads elsewhere.

All faults are collected before any is reported. `quantkit verify` is for the receiver of an
artifact: it starts fast and reads each byte once, for the hash and for the check of values.
`quantkit verify --deep` compares with the source (deep), `--signer` checks the signature
(publish.sign).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from quantkit.artifact.engine_reasons import read_engine_reasons
from quantkit.artifact.layout import (
    ADDED_LATER,
    CONFIG,
    INDEX,
    LOADTEST,
    LOADTEST_PAGE,
    MANIFEST,
    SIGNATURE,
    SINGLE,
    UNHASHED,
    find_layout_faults,
)
from quantkit.artifact.read_manifest import get_format_name, get_section, read_manifest
from quantkit.checkpoint.folder_rules import (
    MODULES,
    find_redirects,
    find_remote_code,
    find_tokenizer_redirects,
    is_module_weights,
    is_weight_file,
)
from quantkit.checkpoint.header import Header, read_header
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.scan import read_small_tensor, scan_file
from quantkit.checkpoint.side_files import find_module_faults, list_module_folders
from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.common.checks import ValueCheck
from quantkit.io.files import read_json
from quantkit.plan.match_checkpoint import NO_CLASS, names_no_class
from quantkit.verify.check_config import find_config_faults, find_model_faults
from quantkit.verify.check_report import find_report_faults
from quantkit.verify.classify_tensors import TensorContents, classify_tensors, read_parts
from quantkit.verify.stamps import Stamp, check_unchanged, take_stamps, wait_for_tick

PAGE_HINT = (
    "a page that neither manifest nor signature covers; remove it (`quantkit loadtest FOLDER "
    "--html FILE` writes it elsewhere)"
)
MAX_READERS = 4
"""Files that are read in parallel."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Result of the checks.

    weight_files: the files that engines read tensors from; sha256: of every hashed file; unsealed:
    additional files that neither manifest nor signature covers; notes: skipped checks, and engines
    that cannot load the artifact, with the reason; stamps: taken before anything was read
    (`stamps.check_unchanged`).
    """

    path: Path
    status: str
    files: int
    tensors: int
    n_bytes: int
    modules: int = 0
    weight_files: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    unsealed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScannedFile:
    """Result of reading a file once: its hash (None if unreadable) and its faults."""

    sha256: str | None
    faults: tuple[str, ...] = ()


def verify_artifact(path: Path) -> VerifyReport:
    """Check an artifact; raises ArtifactError with every fault and what to do."""
    stamps = take_stamps(path)
    if wait_for_tick(stamps):
        stamps = take_stamps(path)
    manifest = read_manifest(path)
    files, present = get_section(manifest, "files", path), list_entries(path)
    present_files = {name: entry for name, entry in files.items() if present.get(name) == "file"}
    headers, damaged = read_headers(path, present_files)
    specs = {name: spec for header in headers.values() for name, spec in header.specs.items()}
    file_of = {name: file for file, header in headers.items() for name in header.specs}
    modules = get_section(manifest, "modules", path)

    def read_small(name: str) -> bytes:
        return read_small_tensor(path / file_of[name], headers[file_of[name]], name)

    copied, part_fault = read_parts(manifest.get("parts", []), modules)
    contents = classify_tensors(get_format_name(manifest), modules, specs, read_small, copied)
    scans = scan_files(path, present_files, headers, contents.numbers)
    faults = [
        *find_listing_faults(files, manifest, present),
        *find_layout_faults([*files, MANIFEST]),
        *find_code_faults(path, present_files),
        *find_hash_faults(path, files, present, scans),
        *damaged,
        *(fault for scan in scans.values() for fault in scan.faults),
        *find_duplicates(headers),
        *find_tensor_faults(specs, get_section(manifest, "tensors", path)),
        *find_index_faults(path, specs, headers, present_files),
    ]
    faults += [*contents.faults, *([part_fault] if part_fault else [])]
    config_faults, notes = check_configs(
        path, manifest, present_files, None if damaged or contents.faults else contents
    )
    faults += config_faults
    faults += find_report_faults(path, manifest, present_files)
    added = tuple(name for name in ADDED_LATER if present.get(name) == "file")
    faults += find_added_faults(path, added)
    raise_faults(path, faults)
    check_unchanged(path, stamps, "while it was verified")
    return VerifyReport(
        path=path,
        status=str(manifest.get("status")),
        files=len(files),
        tensors=len(specs),
        n_bytes=sum((path / name).stat().st_size for name in present_files),
        modules=len(modules),
        weight_files=tuple(headers),
        sha256={name: scan.sha256 for name, scan in scans.items() if scan.sha256},
        unsealed=added,
        notes=(*notes, *list_engine_notes(path)),
        stamps=stamps,
    )


def list_engine_notes(path: Path) -> Iterator[str]:
    """Yield a note for each reason why engines cannot load an artifact, by its report."""
    engines: dict[str, list[str]] = {}
    for engine, reason in read_engine_reasons(path).items():
        engines.setdefault(reason, []).append(engine)
    for reason, names in engines.items():
        yield escape_unprintable(f"not for {', '.join(names)}: {reason}")


def raise_faults(path: Path, faults: list[str]) -> None:
    """Raise ArtifactError with the first faults and the number of the others.

    Do nothing without.
    """
    if faults:
        lines = [escape_unprintable(fault) for fault in dict.fromkeys(faults)]
        more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ArtifactError(
            f"{path}: not what its manifest says; pull or build it again:\n"
            + "\n".join(lines[:20])
            + more
        )


def escape_unprintable(text: str) -> str:
    """Escape characters that control a terminal: names of files and tensors are untrusted."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


# ------------------------------------------------------------------------------------------- files


def list_entries(path: Path) -> dict[str, str]:
    """List everything below the folder but folders, by relative name.

    Values are "file", "a link", or "no file" (a pipe).
    """
    entries: dict[str, str] = {}
    for folder, folders, names in os.walk(path):  # `take_stamps` rejects unreadable folders
        for name in (
            *names,
            *(subfolder for subfolder in folders if (Path(folder) / subfolder).is_symlink()),
        ):
            entry = Path(folder) / name
            mode = entry.lstat().st_mode
            kind = "a link" if entry.is_symlink() else "file" if S_ISREG(mode) else "no file"
            entries[entry.relative_to(path).as_posix()] = kind
    return entries


def find_listing_faults(
    files: Mapping[str, object], manifest: Mapping[str, object], present: Mapping[str, str]
) -> Iterator[str]:
    """Yield files that are not in the manifest, and names that must not be in it."""
    listed = manifest.get("unhashed")
    unhashed = {str(name) for name in listed} if isinstance(listed, list) else set()
    for name in sorted(unhashed - UNHASHED):
        yield f"{MANIFEST}: unhashed: expected {', '.join(UNHASHED)} at most, found {name}"
    unlisted = {MANIFEST, SIGNATURE, *ADDED_LATER, *(unhashed & UNHASHED)}
    for name in sorted(set(present) - set(files) - unlisted):
        yield f"{name}: {PAGE_HINT if name == LOADTEST_PAGE else 'not in the manifest'}"
    for name in sorted(unlisted & set(present)):
        if present[name] != "file":
            yield f"{name}: {present[name]}, expected a file"
    for name in sorted(files):
        if name in {MANIFEST, SIGNATURE, *ADDED_LATER, *UNHASHED}:
            yield f"{MANIFEST}: files: {name}: expected without a hash, found one"


def find_code_faults(path: Path, files: Mapping[str, object]) -> Iterator[str]:
    """Yield Python files that no auto_map names: Python or an engine may import them by name."""
    modules = [name for name in sorted(files) if name.endswith(".py")]
    try:
        named = list_code_files(path) if modules else ()
    except CheckpointError as fault:
        yield str(fault).removeprefix(f"{path}/")
        return
    for name in modules:
        if name not in named:
            yield f"{name}: code that no auto_map of the artifact names; an artifact holds none"
    if MODULES in files:
        faults = [f"{MODULES}: {fault}" for fault in find_module_faults(path)]
        folders = list_module_folders(path)
        yield from faults
        for name in filter(is_module_weights, files if not faults else ()):
            if name.rpartition("/")[0] not in folders:
                yield f"{name}: weights of a module that {MODULES} does not name"


def find_added_faults(path: Path, added: Sequence[str]) -> Iterator[str]:
    """Yield faults of files that were added later: the schema of a load test; nothing vouches for
    more.
    """
    if LOADTEST in added:
        from quantkit.artifact.loadtest_schema import (
            find_load_test_faults,  # pydantic: imported only if there is one
        )

        yield from (
            fault.removeprefix(f"{path}/") for fault in find_load_test_faults(path / LOADTEST)
        )


def find_hash_faults(
    path: Path,
    files: Mapping[str, object],
    present: Mapping[str, str],
    scanned: Mapping[str, ScannedFile],
) -> Iterator[str]:
    """Yield files of the manifest that are missing or changed."""
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


def scan_files(
    path: Path,
    files: Mapping[str, object],
    headers: Mapping[str, Header],
    numbers: Mapping[str, object],
) -> dict[str, ScannedFile]:
    """Read every file once, several in parallel."""
    names = sorted(files)
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        return dict(
            zip(
                names,
                readers.map(
                    lambda name: scan_and_check(path / name, headers.get(name), numbers), names
                ),
            )
        )


def scan_and_check(file: Path, header: Header | None, numbers: Mapping[str, object]) -> ScannedFile:
    """Hash a file and check the values of its tensors, in one reading."""
    from quantkit.verify.check_values import ValueChecker  # numpy: not needed to reject a manifest

    checkers = {
        name: ValueChecker(spec=spec, check=check)
        for name, spec in (header.specs if header else {}).items()
        if isinstance(check := numbers.get(name), ValueCheck)
    }

    def visit(name: str, begin: int, piece: memoryview) -> None:
        if name in checkers:
            checkers[name].check_piece(begin, piece)

    try:
        digest = scan_file(file, header, visit if checkers else None)
    except ArtifactError as fault:
        return ScannedFile(sha256=None, faults=(str(fault),))
    faults = (checker.finish() for checker in checkers.values())
    return ScannedFile(sha256=digest, faults=tuple(filter(None, faults)))


# -------------------------------------------------------------------- headers, index, configuration


def read_headers(path: Path, files: Mapping[str, object]) -> tuple[dict[str, Header], list[str]]:
    """Read the headers of the weight files by name; return a sentence for each damaged one."""
    headers, faults = dict[str, Header](), list[str]()
    for name in sorted(files):
        if name.endswith(".safetensors"):
            try:
                header = read_header(path / name)
            except CheckpointError as fault:
                faults.append(str(fault))
            else:
                if not is_module_weights(name):  # its tensors are not the model's
                    headers[name] = header
    return headers, faults


def find_duplicates(headers: Mapping[str, Header]) -> Iterator[str]:
    """Yield tensors that are stored in more than one file."""
    owner: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.specs:
            if name in owner:
                yield f"tensor {name}: expected in one file, found in {owner[name]} and {file}"
            owner[name] = file


def find_tensor_faults(
    specs: Mapping[str, TensorSpec], listed: Mapping[str, object]
) -> Iterator[str]:
    """Yield tensors whose header differs from the manifest's list."""
    for name in sorted(set(specs) | set(listed)):
        expected = listed.get(name)
        actual = [specs[name].dtype, list(specs[name].shape)] if name in specs else None
        if expected != actual:
            yield f"tensor {name}: expected {expected or 'none'}, found {actual or 'none'}"


def find_index_faults(
    path: Path,
    specs: Mapping[str, TensorSpec],
    headers: Mapping[str, Header],
    files: Mapping[str, object],
) -> Iterator[str]:
    """Yield entries of the index without a tensor, tensors without an entry, a wrong total."""
    name, shards = INDEX, [file for file in files if is_weight_file(file) and file != INDEX]
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
    stored = {tensor: file for file, header in headers.items() for tensor in header.specs}
    if not isinstance(weight_map, Mapping) or dict(weight_map) != stored:
        entry = (
            format_first_difference(weight_map, stored) if isinstance(weight_map, Mapping) else ""
        )
        yield f"{name}: weight_map does not agree with the shards' headers{entry}"
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if total != sum(spec.n_bytes for spec in specs.values()):
        yield (
            f"{name}: metadata.total_size: expected {sum(s.n_bytes for s in specs.values())}, "
            f"found {total}"
        )


def format_first_difference(weight_map: Mapping[str, object], stored: Mapping[str, str]) -> str:
    """Format the first difference between index and headers."""
    name = next(name for name in [*weight_map, *stored] if weight_map.get(name) != stored.get(name))
    return (
        f": {name}: expected {stored.get(name, 'no entry')}, found "
        f"{weight_map.get(name, 'no entry')}"
    )


def check_configs(
    path: Path,
    manifest: Mapping[str, object],
    files: Mapping[str, object],
    contents: TensorContents | None,
) -> tuple[list[str], tuple[str, ...]]:
    """Return the faults of config.json and the tokenizer's configs, and notes on unchecked parts.

    contents: None if the tensors have faults, which hide those of the configuration.
    """
    config, faults = read_config(path, files)
    notes: list[str] = []
    if config is not None:
        if config.get("quantization_config") != manifest.get("quantization_config"):
            faults.append(
                "config.json: quantization_config is not the one the artifact was built with"
            )
        if contents is not None:
            model_faults, note = find_model_faults(config, contents)
            faults += [*find_config_faults(config, contents), *model_faults]
            notes += [note] if note else []
        faults += find_redirects(config, CONFIG)
        if names_no_class(config):
            notes.append(f"config.json: architectures: expected a class, found none: {NO_CLASS}")
    configs: dict[str, Mapping[str, object]] = {CONFIG: config or {}}
    for name in sorted(file for file in files if file.endswith("_config.json")):
        try:
            configs[name] = read_json(path / name, ArtifactError)
        except ArtifactError as fault:
            faults.append(str(fault).removeprefix(f"{path}/"))
            continue
        faults += find_tokenizer_redirects(configs[name], name)
    notes += [
        f"{name}: auto_map names code of another repository, {code!r:.80}: engines run it only "
        "with --trust-remote-code, and nothing here vouches for it"
        for name, values in configs.items()
        for code in find_remote_code(values)
    ]
    return faults, tuple(notes)


def read_config(
    path: Path, files: Mapping[str, object]
) -> tuple[Mapping[str, object] | None, list[str]]:
    """Read config.json; None and a fault if it is missing or damaged."""
    if CONFIG not in files:
        return None, [] if (path / CONFIG).is_symlink() else ["config.json: missing"]
    try:
        return read_json(path / CONFIG, ArtifactError, infinite=True), []
    except ArtifactError as fault:
        return None, [str(fault)]
