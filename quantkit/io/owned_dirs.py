"""Folders next to an artifact's path in which it is built or received: recognized, made, removed.

Such a folder contains a folder named `quantkit` from its first moment to its last. That
distinguishes it from a user's folder, whatever ends the process that makes, fills or removes it.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import make_folder, make_write_error, shorten_repr

MARKER = "quantkit"
"""The folder inside that marks a folder as quantkit's: the evidence folder of an artifact."""
WORK_SUFFIXES = (".building", ".building.scratch", ".replaced")
"""Suffixes of the folders next to an artifact's path while it is built."""


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


def check_owned_dir(folder: Path) -> None:
    """Check that `folder` is absent, empty or made by quantkit; raises UsageError."""
    if folder.is_symlink():
        kind = "a link"
    elif not folder.exists():
        return
    elif not folder.is_dir():
        kind = "a file"
    else:
        try:
            names = {path.name for path in folder.iterdir()}
        except OSError as fault:
            raise make_write_error(folder, fault) from fault
        marker = folder / MARKER
        if not names or (MARKER in names and marker.is_dir() and not marker.is_symlink()):
            return
        kind = "another folder"
    raise UsageError(
        f"{folder}: expected nothing, or what an interrupted run of quantkit left, found {kind}; "
        "move it away, or choose another folder for the artifact"
    )


def make_owned_dir(folder: Path) -> None:
    """Make a folder that `check_owned_dir` accepts; raises QuantkitError."""
    make_folder(folder)
    make_folder(folder / MARKER)


def remove_owned_dir(folder: Path) -> None:
    """Remove a folder of `make_owned_dir` or an artifact, nothing else; ignore disk errors."""
    with suppress(OSError):
        if not folder.is_symlink() and (folder / MARKER).is_dir():
            for path in [path for path in folder.iterdir() if path.name != MARKER]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            shutil.rmtree(folder / MARKER)  # last: without it, the rest would look like a user's
        folder.rmdir()
