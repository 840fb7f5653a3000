"""Names of data in a stranger's task or set: a path inside a folder, or a dataset on the hub."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from quantkit.io.files import shorten_repr

HUB_NAME = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
"""OWNER/NAME on the hub; one name alone could be a format of the datasets library or a folder."""


def check_dataset_name(path: str) -> str:
    """Return the name of a dataset on the hub. Raises ValueError for a folder or an address.

    The datasets library reads a folder of this name, if there is one, instead of the hub.
    """
    if not HUB_NAME.fullmatch(path) or Path(path).exists():
        raise ValueError(
            f"expected OWNER/NAME of a dataset on the hub, found {shorten_repr(path)}; name a file "
            "on this machine as a local file"
        )
    return path


def check_inner_path(name: str) -> str:
    """Return a path that stays below its folder. Raises ValueError for any other."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or PureWindowsPath(name).drive or "\\" in name:
        raise ValueError(
            f"expected a path below the folder of the data, found {shorten_repr(name)}; move the "
            "file there"
        )
    return name
