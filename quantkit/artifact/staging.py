"""The staging folder of a build, `<path>.building`, and the rename that gives a sealed artifact its
final name.

A folder under the final name is complete: files are written into the staging folder, sealing writes
the manifest last, and the rename follows. An artifact that is replaced is moved to
`<path>.replaced` until the new one has its name; then the files that its manifest names are
removed.
"""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.artifact.layout import MANIFEST
from quantkit.artifact.replace import check_replaceable, iterate_files, remove_replaced
from quantkit.artifact.seal import is_sealed
from quantkit.artifact.writer import WrittenState
from quantkit.errors import ArtifactError, UsageError
from quantkit.io.files import (
    PART,
    make_folder,
    make_write_error,
    sync_folder,
)
from quantkit.io.owned_dirs import OWNER_FILE, make_owned_dir, remove_marker
from quantkit.plan.plan import Plan


def get_staging_path(path: Path) -> Path:
    """Return the folder in which the artifact of `path` is built."""
    return path.with_name(path.name + ".building")


def get_replaced_path(path: Path) -> Path:
    """Return the folder that holds a replaced artifact until the new one has its name."""
    return path.with_name(path.name + ".replaced")


def check_output_free(path: Path, overwrite: bool) -> None:
    """Check that `path` is free or holds an artifact that may be replaced; raises UsageError."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError(f"{path}: exists already; choose another output.path or pass --overwrite")
    check_replaceable(path)


def check_replaced_free(path: Path) -> None:
    """Check that nothing is at the path that a replaced artifact is moved to; raises UsageError."""
    old = get_replaced_path(path)
    if os.path.lexists(old):
        raise UsageError(
            f"{old}: expected nothing where a replaced artifact goes, found something; move it away"
        )


def prepare_staging(plan: Plan, stored: WrittenState, owner: str) -> Path:
    """Make the staging folder of a plan, with the marker of `owner`, and return it.

    Only shards with tensors in `stored` stay in it, no link and no other file.
    """
    folder, stored_tensors = get_staging_path(Path(plan.path)), set(stored.tensors)
    started = {
        shard.file
        for shard in plan.shards
        if any(spec.name in stored_tensors for spec in shard.tensors)
    }
    keep = {OWNER_FILE, *started, *(file + PART for file in started)}
    make_owned_dir(folder, owner)
    try:
        for name in list(iterate_files(folder)):
            if name not in keep or (folder / name).is_symlink():
                (folder / name).unlink()
    except OSError as fault:
        raise make_write_error(folder, fault) from fault
    make_folder((folder / MANIFEST).parent)
    return folder


def rename_into_place(folder: Path, path: Path, manifest: str, replaced: str | None) -> None:
    """Rename a sealed folder to `path` unless that was done before; an artifact at `path` is
    replaced as a whole.

    replaced: what `read_replaced` returned before. Raises ArtifactError when neither `folder` nor
    `path` holds the artifact whose manifest has the sha256 `manifest`.
    """
    old = get_replaced_path(path)
    if is_sealed(folder, manifest):
        try:
            remove_marker(folder)
            if os.path.lexists(path):
                path.rename(old)
            folder.rename(path)
            sync_folder(path.parent)
        except OSError as fault:
            raise make_write_error(path, fault) from fault
    elif not is_sealed(path, manifest):
        raise ArtifactError(
            f"{path}: expected the artifact that was built, found none; start over with --restart"
        )
    if replaced is not None:
        remove_replaced(old, replaced)
