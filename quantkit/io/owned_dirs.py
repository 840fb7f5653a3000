"""Folders beside an artifact's place, where it is made or arrives: which are quantkit's, and how they end.

Such a folder holds one named `quantkit` from its first moment to its last: so it is told from a folder of the user's,
whatever ends the process that makes, fills or removes it.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import make_folder, make_write_error, shorten_repr

MARKER = "quantkit"
WORK_SUFFIXES = (".building", ".building.scratch", ".replaced")
"""What lies beside an artifact's place while it is made."""


def validate_folder(path: str) -> str:
    """A path that has a name of its own, `~` as the user's home; ValueError for another."""
    try:
        place = Path(path).expanduser() if path.startswith("~") else Path(path)
    except RuntimeError:
        raise ValueError(
            f"expected a folder, found {shorten_repr(path)}, of a user that is not known here"
        ) from None
    if place.name in {"", ".."} or place.name.endswith(WORK_SUFFIXES):
        raise ValueError(
            f"expected a folder with a name of its own, found {shorten_repr(path)}; write one that ends neither in .. nor in "
            f"{', '.join(WORK_SUFFIXES)}"
        )
    return str(place) if path.startswith("~") else path


def check_owned_dir(folder: Path) -> None:
    """UsageError unless there is nothing, an empty folder, or one that quantkit made."""
    if folder.is_symlink():
        found = "a link"
    elif not folder.exists():
        return
    elif not folder.is_dir():
        found = "a file"
    else:
        try:
            names = {path.name for path in folder.iterdir()}
        except OSError as fault:
            raise make_write_error(folder, fault) from fault
        if not names or (
            MARKER in names and (folder / MARKER).is_dir() and not (folder / MARKER).is_symlink()
        ):
            return
        found = "another folder"
    raise UsageError(
        f"{folder}: expected nothing, or what an interrupted run of quantkit left, found {found}; move it away, or "
        "choose another folder for the artifact"
    )


def make_owned_dir(folder: Path) -> None:
    """Make a folder that `check_ours` knows; raises QuantkitError."""
    make_folder(folder)
    make_folder(folder / MARKER)


def remove_owned_dir(folder: Path) -> None:
    """Remove a folder that `make_ours` made, or an artifact; one of somebody else's stays, and what the disk keeps."""
    with suppress(OSError):
        if not folder.is_symlink() and (folder / MARKER).is_dir():
            for path in [path for path in folder.iterdir() if path.name != MARKER]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            shutil.rmtree(
                folder / MARKER
            )  # last: without it, what is left would be somebody else's
        folder.rmdir()
