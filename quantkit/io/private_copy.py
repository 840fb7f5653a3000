"""A copy of a folder that only this user can open: its files stay as they are while one reads."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import get_free_bytes, make_write_error

_PREFIX = "quantkit-serve-"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def make_private_copy(source: Path, parent: Path) -> Iterator[Path]:
    """Copy the files of `source` into a new folder of mode 0700 in `parent`; remove it at the end.

    Yields the copy, which has the name of `source`. Raises UsageError if others could exchange the
    new folder, if the copy does not fit, or if `source` has links or anything but files.
    """
    _check_parent(parent)
    root = source.resolve()
    files = list(_iterate_files(root))
    n_bytes, free = sum(path.lstat().st_size for path in files), get_free_bytes(parent)
    if n_bytes > free:
        raise UsageError(
            f"{parent}: expected free space for a copy of {n_bytes / 1e9:.1f} GB, found "
            f"{free / 1e9:.1f} GB; name another folder"
        )
    place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent.resolve()))
    try:
        copy = place / root.name
        try:
            for path in files:
                target = copy / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                _copy_file(path, target)
        except OSError as fault:
            raise make_write_error(place, fault) from fault
        yield copy
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _check_parent(parent: Path) -> None:
    """Check that no other user can rename a folder that is made in `parent`."""
    state = parent.stat()
    others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not state.st_mode & stat.S_ISVTX
    if others or state.st_uid not in {0, os.geteuid()}:
        raise UsageError(
            f"{parent}: expected a folder that only this user may write, or one with the sticky "
            "bit as /tmp has, found another; name another folder"
        )


def _iterate_files(root: Path) -> Iterator[Path]:
    """Yield every file below a folder; raises UsageError for a link, a pipe or a device."""
    for folder, folders, names in os.walk(root):
        for path in (Path(folder) / name for name in (*names, *folders)):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                raise UsageError(
                    f"{path}: expected a file, found a link or a device; an artifact holds none"
                )


def _copy_file(path: Path, target: Path) -> None:
    """Copy as many bytes as a file had when it was opened; links and pipes are not opened."""
    with open(os.open(path, _READ), "rb") as reader, target.open("xb") as writer:
        state = os.fstat(reader.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise UsageError(f"{path}: expected a file, found something else; start again")
        left = state.st_size
        while left and (piece := reader.read(min(left, 4 << 20))):
            writer.write(piece)
            left -= len(piece)
