"""The user's cache folder: what is dear to make, and may be lost at any time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.io.files import make_folder, write_atomic


def locate_folder(name: str) -> Path:
    """The folder `name` of $QUANTKIT_CACHE, else of the user's cache folder; it need not exist."""
    chosen = os.environ.get("QUANTKIT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen) if chosen else home / "quantkit") / name


def load_or_make_text(path: Path, make: Callable[[], str]) -> str:
    """The text kept in `path` by an earlier process; where there is none, or a damaged one, it is made and kept.

    A folder that cannot be written keeps nothing, which costs time and nothing else.
    """
    try:
        seal, _, kept = path.read_bytes().partition(b"\n")
    except OSError:
        seal, kept = b"", b""
    if seal == hash_text(kept):
        return kept.decode()
    made = make()
    content = made.encode()
    with suppress(QuantkitError):
        make_folder(path.parent)
        write_atomic(path, hash_text(content) + b"\n" + content)
    return made


def hash_text(content: bytes) -> bytes:
    """What a kept text begins with: its hash, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest().encode()
