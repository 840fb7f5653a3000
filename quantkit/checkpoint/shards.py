"""The weight files of a folder: one model.safetensors, or shards with an index; headers only.

No torch: `quantkit verify` and `quantkit plan` use this module alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quantkit.checkpoint.file_names import INDEX, SINGLE
from quantkit.checkpoint.folder_rules import SHARD
from quantkit.checkpoint.foreign_weights import describe_foreign_weights
from quantkit.checkpoint.header import Header, read_header
from quantkit.contracts import TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.files import (
    is_file,
    join_faults,
    read_json,
    read_prefix,
    sha256_file,
    shorten_repr,
)
from quantkit.progress import Progress, ProgressCallback

LINKS_VARIABLE = "QUANTKIT_LINKS"
"""Environment variable with folders that links of a checkpoint may lead into."""
OUTSIDE_LINK = (
    "expected a file inside the folder, found a link that leads out of it; copy the file, or set "
    f"{LINKS_VARIABLE} to the folder that it leads to"
)
MAX_NAME_LENGTH = 256  # no file has a longer one


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The weight files of a folder, and the tensors in them; every name is in exactly one file."""

    folder: Path
    headers: Mapping[str, Header]
    files: Mapping[str, str]  # tensor -> file name
    notes: tuple[str, ...] = ()  # what differs from the files that transformers reads

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every stored tensor, in index order."""
        return {name: self.headers[file].specs[name] for name, file in self.files.items()}

    def locate(self, name: str) -> tuple[Path, Header]:
        """Return file and header of a stored tensor; raises CheckpointError for an unknown name."""
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder}: expected a tensor {shorten_repr(name)}, found none of that name"
            )
        return self.folder / self.files[name], self.headers[self.files[name]]

    def compute_fingerprint(self) -> str:
        """Return the sha256 of file names, sizes and header bytes: a cheap identity of the
        checkpoint.
        """
        digest = hashlib.sha256()
        for name in sorted(self.headers):
            header = self.headers[name]
            digest.update(f"{name}\0{header.data_start + header.n_data_bytes}\0".encode())
            digest.update(read_prefix(self.folder / name, header.data_start))
        return digest.hexdigest()

    def compute_hashes(self, progress: ProgressCallback | None = None) -> dict[str, str]:
        """Return the sha256 of each weight file, reading every byte.

        progress: called before each file and at the end.
        """
        sizes = {
            name: header.data_start + header.n_data_bytes for name, header in self.headers.items()
        }
        digests, done, total = dict[str, str](), 0, sum(sizes.values())

        def report(next_file: str) -> None:
            if progress:
                progress(Progress(stage="source's sha256", done=done, total=total, note=next_file))

        for name in sorted(sizes):
            report(name)
            digests[name] = sha256_file(self.folder / name)
            done += sizes[name]
        report("")
        return digests


def open_shards(folder: Path) -> Shards:
    """Read the index and every header of a folder; raises one CheckpointError with all faults."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, found none; check the path")
    if foreign := find_foreign_weights(folder):
        raise CheckpointError(foreign)
    index, notes = _read_index(folder), tuple[str, ...]()
    names = [SINGLE] if index is None else list(dict.fromkeys(index.values()))
    if index is None and not is_present(folder / SINGLE):
        names = choose_unindexed([path.name for path in folder.glob("*.safetensors")])
        notes = describe_unindexed(names)
    faults: list[str] = []
    headers: dict[str, Header] = {}
    for name in names:
        if fault := find_path_fault(folder, name):
            faults.append(fault)
            continue
        try:
            headers[name] = read_header(folder / name)
        except CheckpointError as damaged:
            faults.append(str(damaged))
    files = make_index(headers) if index is None else index
    faults += find_index_faults(files, headers, str(folder / INDEX))
    if faults:
        raise CheckpointError(join_faults(faults))
    notes = (*notes, *describe_links(folder, list(headers)))
    return Shards(folder=folder, headers=headers, files=files, notes=notes)


def find_foreign_weights(folder: Path) -> str | None:
    """Describe the weights of a folder without safetensors, with the remedy; None if unknown."""
    if not folder.is_dir():
        return None
    return describe_foreign_weights([path.name for path in folder.iterdir()], str(folder))


def make_index(headers: Mapping[str, Header]) -> dict[str, str]:
    """Return the tensor -> file table of headers; a tensor in two files gets the first."""
    files: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.specs:
            files.setdefault(name, file)
    return files


def is_present(path: Path) -> bool:
    """Return whether a file or a link has this name."""
    return path.is_symlink() or path.exists()


def choose_unindexed(names: Collection[str]) -> list[str]:
    """Return the shards of a folder without an index: 1 to n of n; empty if one is missing."""
    shards = sorted(name for name in names if SHARD.fullmatch(name))
    matches = [SHARD.fullmatch(name) for name in shards]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    return shards if numbers == [(i, len(shards)) for i in range(1, len(shards) + 1)] else []


def describe_unindexed(names: Sequence[str]) -> tuple[str, ...]:
    """Return the note for weight files that no index names."""
    files = names[0] if len(names) == 1 else f"{len(names)} shards"
    return (f"the weights are read from {files} without an index; transformers needs {INDEX}",)


def read_weight_map(index: Mapping[str, object], where: str) -> dict[str, str]:
    """Return the tensor -> file table of an index; raises CheckpointError."""
    table = index.get("weight_map")
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(file, str) for file in table.values())
    ):
        raise CheckpointError(
            f"{where}: weight_map: expected an object of tensor names and file names, found "
            f"{shorten_repr(table)}; fetch the index again"
        )
    return dict(table)


def check_single_set(table: Mapping[str, str], where: str) -> None:
    """Check that an index next to model.safetensors names that file alone.

    Raises CheckpointError otherwise: transformers loads the file and leaves the rest of the model
    random, vLLM loads the files of the index.
    """
    if others := sorted(set(table.values()) - {SINGLE}):
        raise CheckpointError(
            f"{where}: expected one set of weights, found {SINGLE}, which transformers loads, and "
            f"an index that names {shorten_repr(others[0])}, which vLLM loads; remove one of them"
        )


def find_index_faults(
    index: Mapping[str, str], headers: Mapping[str, Header], where: str
) -> list[str]:
    """Return where the index and the headers disagree, one sentence each.

    Other files are skipped.
    """
    faults: list[str] = []
    owner: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.specs:
            if name in owner:
                faults.append(
                    f"{where}: tensor {shorten_repr(name)}: expected in one file, found in "
                    f"{owner[name]} and {file}; fetch the checkpoint again"
                )
            elif name not in index:
                faults.append(
                    f"{where}: tensor {shorten_repr(name)} of {file}: expected in weight_map, "
                    "found no entry; add it to the index or it would be lost"
                )
            owner.setdefault(name, file)
    for name, file in index.items():
        if file in headers and name not in headers[file].specs:
            faults.append(
                f"{where}: tensor {shorten_repr(name)}: expected in {file}, found no such tensor "
                "there; fetch the file again"
            )
    return faults


def find_path_fault(folder: Path, name: str) -> str | None:
    """Return why an index entry is no weight file inside the folder; None for a good one."""
    path = PurePosixPath(name)
    shown = f"{folder / INDEX}: file {shorten_repr(name)}"
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not name:
        return (
            f"{shown}: expected a path inside the folder, found one that leads elsewhere; do not "
            "use this checkpoint"
        )
    if path.suffix != ".safetensors":
        return (
            f"{shown}: expected a .safetensors file, found {shorten_repr(path.suffix)}; convert "
            "the checkpoint"
        )
    if leads_outside(folder, folder / name):
        return f"{folder / name}: {OUTSIDE_LINK}"
    if not is_file(folder / name):
        place = folder / name if len(name) < MAX_NAME_LENGTH else f"{folder}: {shorten_repr(name)}"
        return (
            f"{place}: expected a file named by the checkpoint, found none; fetch the missing file"
        )
    return None


def list_link_targets() -> list[Path]:
    """Return the folders that links of a checkpoint may lead into; relative paths are skipped."""
    names = os.environ.get(LINKS_VARIABLE, "").split(os.pathsep)
    return [Path(name).resolve() for name in names if Path(name).is_absolute()]


def describe_links(folder: Path, names: Collection[str]) -> tuple[str, ...]:
    """Return the note for weight files that are links which LINKS_VARIABLE allows."""
    targets = list_link_targets()
    count = sum(
        (folder / name).is_symlink()
        and any((folder / name).resolve().is_relative_to(target) for target in targets)
        for name in names
    )
    return (
        (f"{count} weight files are links out of the folder, which {LINKS_VARIABLE} allows",)
        if count
        else ()
    )


def leads_outside(folder: Path, path: Path) -> bool:
    """Return whether a path resolves outside its folder.

    Links of the Hugging Face cache to its blobs count as inside, and links into the folders that
    the user of this machine names in LINKS_VARIABLE. A recipe cannot name any.
    """
    home = folder.resolve()
    roots = [home, *list_link_targets()]
    if home.parent.name == "snapshots":
        cache = home.parent.parent  # <cache>/models--org--name/snapshots/<commit>
        roots += [
            cache / "blobs",
            cache.parent / "blobs",
        ]  # its own blobs; blobs shared between repositories
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return True
    return not any(target.is_relative_to(root) for root in roots)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Read the index of a folder; None if a single model.safetensors is all there is."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        if leads_outside(folder, index):
            raise CheckpointError(f"{index}: {OUTSIDE_LINK}")
        table = read_weight_map(read_json(index), str(index))
        if single.is_file():
            check_single_set(table, str(folder))
        return table
    names = [path.name for path in folder.glob("*.safetensors")]
    if is_present(single) or choose_unindexed(names):
        return None
    raise CheckpointError(_describe_missing_weights(folder))


def _describe_missing_weights(folder: Path) -> str:
    expected = f"{folder}: expected {SINGLE} or {INDEX}"
    names = _list_files(folder, ("*.safetensors",))
    if names.count(".safetensors") == 1 and not SHARD.fullmatch(names):
        return f"{expected}, found {names}; rename it to {SINGLE} if it holds the whole model"
    if names:
        return (
            f"{expected}, found {names} without an index; fetch the index, or all shards of one set"
        )
    return f"{expected}, found neither; check the path or fetch the checkpoint again"


def _list_files(folder: Path, patterns: Sequence[str]) -> str:
    return ", ".join(sorted(path.name for pattern in patterns for path in folder.glob(pattern))[:3])
