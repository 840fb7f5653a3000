"""Stamps of an artifact's files: whether a file was exchanged or changed after its stamp was taken.

A stamp has the values that the kernel changes with every write, rename and link: size, mtime and
ctime. A program can reset mtime and cannot reset ctime, so another file has another ctime. Inode
numbers are left out: on overlay and FUSE file systems they change by themselves. Folders have
stamps too, because a file that is renamed away and back leaves its folder changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_IFMT

from quantkit.artifact.layout import ADDED_LATER, CHAT_TEMPLATES, SIGNATURE, UNHASHED
from quantkit.errors import ArtifactError
from quantkit.io.files import describe_os_error

Stamp = tuple[int, ...]
"""Kind of file, size, mtime_ns and ctime_ns."""

READ_BY_ENGINES = (".", CHAT_TEMPLATES)
"""Folders with a stamp. `quantkit loadtest` writes into quantkit/, which no engine reads."""

CLOCK_TICK_SECONDS = 0.05
"""A file that changed this recently may change again with the same ctime.

Kernels stamp files with the clock of the last tick, 10 ms at most on Linux.
"""


def take_stamps(path: Path) -> dict[str, Stamp]:
    """Return the stamp of every file that the manifest hashes, and of the folders engines read.

    Names are relative, with a slash at the end for a folder. {} if there is no folder. Raises
    ArtifactError for an unreadable one.
    """
    root = Path(os.path.realpath(path))
    if not root.is_dir():
        return {}
    unstamped = {*ADDED_LATER, *UNHASHED, SIGNATURE}
    stamps: dict[str, Stamp] = {}
    try:
        for folder, folders, names in os.walk(root, onerror=_raise):
            relative = Path(folder).relative_to(root)
            entries = [*names, *(n for n in folders if (Path(folder) / n).is_symlink())]
            for name in (relative / entry for entry in entries):
                if name.as_posix() not in unstamped:
                    stamps[name.as_posix()] = _read_stamp(root / name)
        for place in READ_BY_ENGINES:
            if (root / place).is_dir():
                stamps[f"{place}/"] = _read_stamp(root / place)
    except OSError as fault:
        raise ArtifactError(
            f"{path}: expected a readable folder, found: {describe_os_error(fault)}; "
            "check its permissions"
        ) from None
    return stamps


def wait_for_tick(stamps: Mapping[str, Stamp]) -> bool:
    """Wait until a change would show in ctime; return whether anything had changed just now."""
    age = time.time() - max((stamp[-1] for stamp in stamps.values()), default=0) / 1e9
    if not 0 <= age < CLOCK_TICK_SECONDS:
        return False
    time.sleep(CLOCK_TICK_SECONDS)
    return True


def find_changes(before: Mapping[str, Stamp], after: Mapping[str, Stamp]) -> Iterator[str]:
    """Yield the files and folders that were added, removed, exchanged or changed."""
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield name


def check_unchanged(
    path: Path, before: Mapping[str, Stamp], when: str, advice: str = "start again"
) -> None:
    """Check that an artifact is as it was when its stamps were taken; raises ArtifactError.

    when, advice: the time of the change and the end of the message.
    """
    if changed := list(find_changes(before, take_stamps(path))):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ArtifactError(
            f"{path}: expected files that stay as they are, found {changed[0]}{more} changed or "
            f"exchanged {when}; find out what writes there, and {advice}"
        )


def _read_stamp(path: Path) -> Stamp:
    """Return the stamp of a file or folder; links are not followed."""
    state = path.lstat()
    return (S_IFMT(state.st_mode), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _raise(fault: OSError) -> None:
    raise fault
