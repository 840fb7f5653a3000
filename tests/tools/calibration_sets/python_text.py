"""Sources and documentation of the running Python's standard library, as text with a known licence.

Files that carry a copyright or licence notice of their own are left out, so that everything taken here is covered by
the Python Software Foundation's licence (PSF-2.0). What is taken is a pure function of the standard library's version.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Share = Literal["code", "prose", "held_out_code", "held_out_prose"]

LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data", "turtledemo", "ensurepip",
    "__pycache__", "distutils", "xmlrpc", "msilib",
}  # fmt: skip
NOTICE = re.compile(
    r"copyright|licen[cs]e|permission (to|is)|redistribution|all rights reserved", re.IGNORECASE
)
SMALLEST_SOURCE, LARGEST_SOURCE = 1_500, 60_000  # bytes
SHORTEST_TOPIC, SHORTEST_DOCSTRING, SHORTEST_PARAGRAPH = 500, 240, 60  # characters


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def share_of(name: str) -> Share:
    """Which part of which set a file or topic belongs to; a function of its name alone, so that no two overlap."""
    number = zlib.crc32(name.encode()) % 16
    if number == 0:
        return "held_out_code"
    if number <= 2:
        return "held_out_prose"
    return "prose" if number < 11 else "code"


def source_files(share: Share) -> list[Path]:
    """The usable source files of a share, in an order that mixes the library."""
    root = standard_library()
    found: list[tuple[int, str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        foreign = LEFT_OUT.intersection(relative.parts) or name.startswith((
            "_sysconfigdata",
            "config-",
        ))
        if (
            not foreign
            and share_of(name) == share
            and SMALLEST_SOURCE <= path.stat().st_size <= LARGEST_SOURCE
        ):
            found.append((zlib.crc32(name.encode()), name, path))
    return [path for _, _, path in sorted(found)]


def sources(share: Share) -> Iterator[str]:
    """Source text of a share's files, those with a notice left out."""
    for path in source_files(share):
        text = path.read_text(encoding="utf-8")
        if not NOTICE.search(text):
            yield text


def documentation() -> dict[Share, list[str]]:
    """Topics of the language reference, then long docstrings, by share; no paragraph appears twice in all of it."""
    paragraphs: set[str] = set()
    texts: dict[Share, list[str]] = {"prose": [], "held_out_prose": []}
    for name, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        share: Share = "held_out_prose" if zlib.crc32(name.encode()) % 8 == 5 else "prose"
        fresh = _unseen(topic, paragraphs)
        if len(fresh) >= SHORTEST_TOPIC:
            texts[share].append(fresh)
    for share, found in texts.items():
        for source in sources(share):
            fresh_docstrings = (_unseen(docstring, paragraphs) for docstring in _docstrings(source))
            found.extend(fresh for fresh in fresh_docstrings if len(fresh) >= SHORTEST_DOCSTRING)
    return texts


def _unseen(text: str, paragraphs: set[str]) -> str:
    """The paragraphs of a text that were not seen before; long ones are remembered."""
    kept: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        mark = " ".join(paragraph.split())
        if mark in paragraphs:
            continue
        if len(mark) >= SHORTEST_PARAGRAPH:
            paragraphs.add(mark)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept).strip()


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= SHORTEST_DOCSTRING:
                yield inspect.cleandoc(docstring)


def up_to(texts: Iterable[str], budget: int) -> list[str]:
    """Texts until they hold `budget` characters; the last one may pass it."""
    taken: list[str] = []
    held = 0
    for text in texts:
        if held >= budget:
            break
        taken.append(text)
        held += len(text)
    return taken
