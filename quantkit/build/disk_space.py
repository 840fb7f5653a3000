"""Whether the disk has room for a build: its artifacts and its scratch files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.staging import get_staging_path
from quantkit.build.session import scratch_folder
from quantkit.io.files import get_free_bytes
from quantkit.plan.plan import Plan


def describe_disk_shortage(plans: Sequence[Plan]) -> str:
    """Return how much room a build lacks on the disk of its artifacts; "" if there is enough.

    Files of an interrupted build count as room that is there.
    """
    folder = Path(plans[0].path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    needed = sum(plan.n_bytes for plan in plans) + max(p.memory.scratch_bytes for p in plans)
    begun = [get_staging_path(Path(plan.path)) for plan in plans] + [scratch_folder(plans)]
    room = get_free_bytes(folder) + sum(map(count_bytes, begun))
    if needed <= room:
        return ""
    return (
        f"expected {needed / 1e9:.3g} GB of disk for the artifacts and scratch files of the build "
        f"in {folder}, found {room / 1e9:.3g} GB free; free some space, or set output.path to "
        "another disk"
    )


def count_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder and below; 0 without one."""
    if folder.is_symlink():
        return 0
    return sum(
        os.lstat(os.path.join(path, name)).st_blocks * 512
        for path, _, names in os.walk(folder)
        for name in names
    )
