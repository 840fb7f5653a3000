"""Replacing an artifact: only the files that its manifest names are removed.

A folder under the name of an artifact may have become anything since it was built, so `--overwrite`
refuses a folder with other files in it, and removes by name. No torch: `quantkit pull` starts with
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from quantkit.artifact.layout import ADDED_LATER, LOADTEST_PAGE, MANIFEST, SIGNATURE
from quantkit.artifact.read_manifest import get_section
from quantkit.errors import ArtifactError, UsageError
from quantkit.io.files import make_write_error, read_json, sha256_file, shorten_repr, sync_folder

LINK = "link"
"""Stands for the manifest's sha256 of a replaced artifact whose name was a link to it."""


def check_replaceable(path: Path) -> None:
    """Check that removing the artifact at `path` removes only files that its manifest names; a
    link to an artifact is replaced itself. Raises UsageError.
    """
    refusal = f"{path}: exists and is not an artifact of quantkit; --overwrite replaces artifacts"
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{refusal} only")
    try:
        foreign = list(islice(iterate_foreign_files(path), 2)) if not path.is_symlink() else []
    except ArtifactError as fault:
        raise UsageError(f"{refusal} only: {fault}") from fault
    except OSError as fault:
        raise make_write_error(path, fault) from fault
    if foreign:
        raise UsageError(
            f"{path}: expected only the files of an artifact, found {shorten_repr(foreign[0])}"
            f"{' and others' if len(foreign) > 1 else ''}, which its manifest does not name; "
            "--overwrite would remove it: move it away"
        )


def iterate_foreign_files(folder: Path) -> Iterator[str]:
    """Yield the files and links below an artifact's folder that its manifest does not name.

    Raises ArtifactError without a valid manifest.
    """
    names = _list_own_files(folder)
    yield from (name for name in iterate_files(folder) if name not in names)


def read_replaced(path: Path) -> str | None:
    """Return what identifies the artifact at `path`: the sha256 of its manifest, or LINK; None if
    nothing is there.

    Raises UsageError if it must not be replaced.
    """
    if not os.path.lexists(path):
        return None
    check_replaceable(path)
    return LINK if path.is_symlink() else hash_manifest(path)


def remove_replaced(old: Path, replaced: str) -> None:
    """Remove the replaced artifact at `old`, if it is the one that `replaced` names: the files that
    its manifest names, nothing else. Ignores errors of the disk.
    """
    with suppress(OSError, ArtifactError):
        if old.is_symlink():
            if replaced == LINK:  # the artifact that it leads to stays
                old.unlink()
        elif not (old / MANIFEST).is_file():
            remove_empty_folders(old)
        elif hash_manifest(old) == replaced:
            names = _list_own_files(old) - {MANIFEST}
            for name in list(iterate_files(old)):
                if name in names:
                    (old / name).unlink()
            sync_folder(old)
            (old / MANIFEST).unlink()  # last: it says what this folder is
            remove_empty_folders(old)


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder in which there are only folders; raises OSError and keeps what holds a
    file.
    """
    for place, _, _ in os.walk(folder, topdown=False, onerror=_raise):
        os.rmdir(place)


def hash_manifest(folder: Path) -> str:
    """Return the sha256 of an artifact's manifest; raises ArtifactError."""
    return sha256_file(folder / MANIFEST, ArtifactError)


def _list_own_files(folder: Path) -> set[str]:
    """Return the names that an artifact's manifest gives to its files; raises ArtifactError."""
    manifest = read_json(folder / MANIFEST, ArtifactError)
    listed = manifest.get("unhashed")
    unhashed = [str(name) for name in listed] if isinstance(listed, list) else []
    added = (MANIFEST, SIGNATURE, *ADDED_LATER, LOADTEST_PAGE)
    return {*get_section(manifest, "files", folder), *unhashed, *added}


def iterate_files(folder: Path) -> Iterator[str]:
    """Yield the relative name of every file and link below a folder; raises OSError."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        for name in (*names, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _raise(fault: OSError) -> None:
    """Raise an error of os.walk, which ignores a folder that it cannot read."""
    raise fault
