"""Checks of file names from a manifest or a listing before they become paths of this machine, and
of those paths before they are written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from quantkit.errors import UsageError
from quantkit.io.files import PART, shorten_repr

_MAX_COMPONENT_BYTES = 255 - len(PART)
_MAX_BYTES = 1024


def find_name_faults(names: Iterable[str]) -> Iterator[str]:
    """Yield why names cannot all be files of one folder: unsafe, not portable, or colliding."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in sorted(names):
        fault = _find_fault(name)
        if fault:
            yield f"{shorten_repr(name)}: {fault}"
            continue
        key = fold_name(name)
        if key in files:
            other = shorten_repr(files[key])
            yield f"{shorten_repr(name)}: the same file as {other} where names ignore case"
        files[key] = name
        parts = key.split("/")
        folders.update({"/".join(parts[:depth]): name for depth in range(1, len(parts))})
    for key in sorted(files.keys() & folders.keys()):
        yield f"{shorten_repr(files[key])}: a file, and the folder of {shorten_repr(folders[key])}"


def check_no_link(root: Path, name: str) -> Path:
    """Return the path of the file `name` below `root`; raises UsageError if it, or a folder on the
    way, is a link: writing there would change a file elsewhere.
    """
    path = root
    for part in name.split("/"):
        path /= part
        if path.is_symlink():
            raise UsageError(f"{path}: expected a file or folder, found a link; remove it")
    return path


def fold_name(name: str) -> str:
    """Return a name as a file system compares it that ignores case and Unicode normal forms."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _find_fault(name: str) -> str | None:
    """Return why a single name is unsafe or not portable; None for a good one."""
    parts = name.split("/")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "no Unicode text"
    checks = (
        (not name or "" in parts or "." in parts, "expected a relative path"),
        (".." in parts, "leads out of the folder"),
        ("\\" in name or bool(PureWindowsPath(name).drive), "a path of another system"),
        (any(unicodedata.category(c) in {"Cc", "Cf"} for c in name), "holds a control character"),
        (max(sizes) > _MAX_COMPONENT_BYTES or sum(sizes) > _MAX_BYTES, "too long"),
        (
            any(part != part.strip() or part.endswith(".") for part in parts),
            "begins or ends with a blank or a dot",
        ),
        (name.endswith(PART), f"ends with {PART}, as unfinished files do"),
    )
    return next((sentence for bad, sentence in checks if bad), None)
