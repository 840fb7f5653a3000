"""The user's cache folder: results that are expensive to compute and may be lost at any time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.io.files import make_folder, write_atomic


def locate_folder(name: str) -> Path:
    """Return the folder `name` in $QUANTKIT_CACHE, else in the user's cache; it need not exist."""
    configured = os.environ.get("QUANTKIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(configured) if configured else home / "quantkit") / name


def load_or_make_text(path: Path, make: Callable[[], str]) -> str:
    """Return the text cached in `path`; if it is missing or damaged, make and cache it.

    In a folder that cannot be written nothing is cached, which costs time only.
    """
    try:
        digest, _, cached = path.read_bytes().partition(b"\n")
    except OSError:
        digest, cached = b"", b""
    if digest == hash_text(cached):
        return cached.decode()
    text = make()
    content = text.encode()
    with suppress(QuantkitError):
        make_folder(path.parent)
        write_atomic(path, hash_text(content) + b"\n" + content)
    return text


def hash_text(content: bytes) -> bytes:
    """Return the sha256 in hexadecimal that a cached text begins with."""
    return hashlib.sha256(content).hexdigest().encode()
