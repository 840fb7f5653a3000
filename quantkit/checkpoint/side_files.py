"""Files of a model next to its weights: which are copied into an artifact, and why others are not.

Data is copied: documents, images, tables, settings of processors and of sentence-transformers, in
subfolders too. Weights in other forms, code, and files by which an engine would load something else
are not; the weights of a module that modules.json names, such as 2_Dense, are. Names and sizes
only, except modules.json and the headers of such weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG, MODEL_CARD
from quantkit.checkpoint.folder_rules import (
    MODULES,
    describe_foreign_file,
    is_module_config,
    is_module_weights,
    is_sidecar,
    is_weight_file,
)
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.shards import OUTSIDE_LINK, leads_outside
from quantkit.errors import CheckpointError
from quantkit.io.files import is_file, parse_json, read_bytes, shorten_repr

MAX_DEPTH = 3
MAX_FILES = 10_000
MAX_NAMED = 3
"""Files that a sentence names."""
_OWN_TYPES = "sentence_transformers."
_SILENT = (MODEL_CARD, CONFIG)


def list_side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that are copied into an artifact, sorted.

    Raises CheckpointError for links out of the folder.
    """
    code, names = list_code_files(folder), list_files(folder)
    copied = [folder / name for name in names if is_copied(folder, name, code)]
    for path in copied:
        if is_module_weights(path.relative_to(folder).as_posix()):
            read_header(path)  # raises if it is cut short or no safetensors file
    outside = [path for path in copied if leads_outside(folder, path)]
    if outside:
        raise CheckpointError(f"{outside[0]}: {OUTSIDE_LINK}")
    return tuple(sorted(copied))


def is_copied(folder: Path, name: str, code: Sequence[str]) -> bool:
    """Return whether a file is copied: a kind of data, or code that an auto_map names."""
    if not is_sidecar(name) or (name.endswith(".py") and name not in code):
        return False
    if is_module_weights(name):
        return name.rpartition("/")[0] in list_module_folders(folder)
    if name == MODULES or is_module_config(name):
        return is_file(folder / MODULES) and not list(find_module_faults(folder))
    return True


def list_files(folder: Path) -> list[str]:
    """Return the names of all files in a folder and below, without hidden ones, sorted.

    Raises CheckpointError for more than MAX_FILES.
    """
    names = list[str]()
    for place, folders, files in os.walk(folder):
        inner = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if name[0] != "." and len(inner.parts) < MAX_DEPTH]
        names += [
            (inner / name).as_posix()
            for name in files
            if name[0] != "." and (Path(place) / name).is_file()
        ]
        if len(names) > MAX_FILES:
            raise CheckpointError(
                f"{folder}: expected at most {MAX_FILES:,} files of a model, found more; name the "
                "model's own folder"
            )
    return sorted(names)


def list_module_folders(folder: Path) -> frozenset[str]:
    """Return the folders of the modules in modules.json; none if it would load something else."""
    if not is_file(folder / MODULES) or list(find_module_faults(folder)):
        return frozenset()
    return frozenset(str(entry.get("path", "")) for entry in _read_modules(folder))


def _read_modules(folder: Path) -> list[Mapping[str, object]]:
    """Read modules.json; raises CheckpointError, or KeyError for something else than a list."""
    path = folder / MODULES
    entries = parse_json(b'{"list": ' + read_bytes(path) + b"}", str(path))["list"]
    listed = entries if isinstance(entries, list) else [None]
    return [entry if isinstance(entry, Mapping) else {} for entry in listed]


def find_module_faults(folder: Path) -> Iterator[str]:
    """Yield why the modules.json of sentence-transformers would load something else.

    Its types are imported by name, and its paths are opened.
    """
    path = folder / MODULES
    if not is_file(path):
        return
    try:
        entries = _read_modules(folder)
    except (CheckpointError, KeyError) as fault:
        yield str(fault)
        return
    for values in entries:
        kind, place = values.get("type"), values.get("path", "")
        if not isinstance(kind, str) or not kind.startswith(_OWN_TYPES):
            yield f"type: expected a class of sentence_transformers, found {shorten_repr(kind)}"
        elif not isinstance(place, str) or not is_inner_path(place):
            yield f"path: expected a folder of the model, found {shorten_repr(place)}"


def is_inner_path(path: str) -> bool:
    """Return whether a path stays in the folder; the empty one is the folder itself."""
    return not path.startswith(("/", "~")) and "\\" not in path and ".." not in path.split("/")


def describe_left_files(folder: Path, copied: Iterable[Path]) -> tuple[str, ...]:
    """Return a sentence per reason for which files of a folder are not copied."""
    kept = {path.relative_to(folder).as_posix() for path in copied}
    return describe_left_names([name for name in list_files(folder) if name not in kept])


def describe_left_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return a sentence per reason for which files of these names are not copied.

    The model's own weights, config.json and card, which the artifact has too, are not named.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in _SILENT and not is_weight_file(name) and not name.startswith("."):
            groups.setdefault(describe_foreign_file(name), []).append(name)
    return tuple(
        f"not copied: {_format_names(files)}: {reason}" for reason, files in groups.items()
    )


def _format_names(names: Sequence[str]) -> str:
    shown = ", ".join(shorten_repr(name)[1:-1] for name in names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
