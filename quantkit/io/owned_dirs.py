"""Folders next to an artifact's path in which it is built or received: recognized, made, removed.

Such a folder belongs to quantkit if its marker file holds the id that a journal holds too. The id
is random: no folder of a user has it, whatever is in the folder. A working folder holds marker and
journal; other folders of the same job have the marker only.

    <folder>/.quantkit-owner     {"owner": "<32 hexadecimal digits>"}
    <folder>/journal.jsonl       its first entry has the same "owner"

The rest that a killed process leaves of a folder that was being made or removed holds no other
file: nothing is lost with it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import (
    create_file,
    make_folder,
    make_write_error,
    name_part,
    open_plain_file,
    shorten_repr,
    sync_folder,
    write_all,
)
from quantkit.io.journal import read_first_entry

OWNER_FILE = ".quantkit-owner"
"""The marker."""
JOURNAL = "journal.jsonl"
OWNER_KEY = "owner"
"""Key of the id in the marker and in the first entry of the journal."""
WORK_SUFFIXES = (".building", ".building.scratch", ".replaced")
"""Suffixes of the folders next to an artifact's path while it is built."""

_MARKER_BYTES = 100  # of a marker, which has 48
_OWNER = re.compile(r"[0-9a-f]{32}")


def validate_folder(path: str) -> str:
    """Return a path for an artifact, `~` replaced by the user's home.

    Raises ValueError for a path that ends in .. or in one of WORK_SUFFIXES.
    """
    try:
        folder = Path(path).expanduser() if path.startswith("~") else Path(path)
    except RuntimeError:
        raise ValueError(
            f"expected a folder, found {shorten_repr(path)}, of a user that is not known here"
        ) from None
    if folder.name in {"", ".."} or folder.name.endswith(WORK_SUFFIXES):
        raise ValueError(
            f"expected a folder with a name of its own, found {shorten_repr(path)}; write one that "
            f"ends neither in .. nor in {', '.join(WORK_SUFFIXES)}"
        )
    return str(folder) if path.startswith("~") else path


def make_owner_id() -> str:
    """Return a new random id of 128 bits."""
    return secrets.token_hex(16)


def read_marker(folder: Path) -> str | None:
    """Return the id in a folder's marker; None without a valid one."""
    try:
        with open(open_plain_file(folder / OWNER_FILE, os.O_RDONLY), "rb") as file:
            values = json.loads(file.read(_MARKER_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return parse_owner(values)


def parse_owner(values: object) -> str | None:
    """Return the id in a marker's values or in the first entry of a journal; None without one."""
    owner = values.get(OWNER_KEY) if isinstance(values, dict) else None
    return owner if isinstance(owner, str) and _OWNER.fullmatch(owner) else None


def check_work_dir(folder: Path, remedy: str) -> str | None:
    """Return the id of a working folder; None for an absent one and for remains without a journal.

    A lone journal was left by a process that was killed while it removed the folder.

    remedy: the step to take, for the message. Raises UsageError for any other folder, a file or a
    link.
    """
    if folder.is_dir() and not folder.is_symlink():
        owner = parse_owner(read_first_entry(folder / JOURNAL))
        if owner is not None and (read_marker(folder) == owner or _holds_only_journal(folder)):
            return owner
    check_owned_dir(folder, None, remedy)
    return None


def check_owned_dir(folder: Path, owner: str | None, remedy: str) -> None:
    """Check that `folder` is absent, without a file of anybody else, or has the marker of `owner`.

    remedy: the step to take, for the message. Raises UsageError.
    """
    if folder.is_symlink():
        kind = "a link"
    elif not folder.exists():
        return
    elif not folder.is_dir():
        kind = "a file"
    else:
        if _is_remains(folder) or (owner is not None and read_marker(folder) == owner):
            return
        kind = "a folder that no journal of this version knows"
    raise UsageError(
        f"{folder}: expected nothing, or the files of an interrupted run of quantkit, found "
        f"{kind}; {remedy}"
    )


def make_owned_dir(folder: Path, owner: str) -> None:
    """Make a folder with the marker of `owner`, or add the marker to it; raises QuantkitError."""
    make_folder(folder)
    if read_marker(folder) == owner:
        return
    try:
        descriptor = create_file(folder / OWNER_FILE)
        try:
            write_all(descriptor, json.dumps({OWNER_KEY: owner}).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(folder)
    except OSError as fault:
        raise make_write_error(folder, fault) from fault


def remove_marker(folder: Path) -> None:
    """Remove the marker of a folder that gets its final name; raises OSError."""
    (folder / OWNER_FILE).unlink(missing_ok=True)


def remove_owned_dir(folder: Path, owner: str | None) -> None:
    """Remove a folder with the marker of `owner`, or one without a file of anybody else.

    Ignores errors of the disk and leaves any other folder as it is.
    """
    with suppress(OSError):
        if folder.is_symlink() or not folder.is_dir():
            return
        if not _is_remains(folder):
            if owner is None or read_marker(folder) != owner:
                return
            _remove_content(folder)
        # The journal is last: a process that is killed before can be resumed by it.
        for name in (*_list_parts(folder), OWNER_FILE, JOURNAL):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _remove_content(folder: Path) -> None:
    """Remove everything in a folder but its journal and its marker; raises OSError."""
    for path in [path for path in folder.iterdir() if path.name not in {JOURNAL, OWNER_FILE}]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    sync_folder(folder)


def _is_remains(folder: Path) -> bool:
    """Return whether a folder holds nothing but a journal, or a marker and the unfinished journal
    that it names; raises QuantkitError if it cannot be read.
    """
    try:
        names = {path.name for path in folder.iterdir()}
        if names == {JOURNAL}:
            return parse_owner(read_first_entry(folder / JOURNAL)) is not None
        if not names <= {OWNER_FILE, *_list_parts(folder)}:
            return False
        marker = folder / OWNER_FILE
        return not names or (marker.is_file() and marker.lstat().st_size <= _MARKER_BYTES)
    except OSError as fault:
        raise make_write_error(folder, fault) from fault


def _holds_only_journal(folder: Path) -> bool:
    try:
        return {path.name for path in folder.iterdir()} == {JOURNAL}
    except OSError as fault:
        raise make_write_error(folder, fault) from fault


def _list_parts(folder: Path) -> tuple[str, ...]:
    """Return the name of the unfinished journal that a folder's marker names."""
    owner = read_marker(folder)
    return (name_part(folder, owner).name,) if owner else ()
