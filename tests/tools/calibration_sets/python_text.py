"""Sources and documentation of the running Python's standard library, text with a known license.

Files with their own copyright or license notice are excluded, so that the Python Software
Foundation's license (PSF-2.0) covers everything. The selection is a pure function of the version of
the standard library.
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

EXCLUDED = {
    "test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data",
    "turtledemo", "ensurepip", "__pycache__", "distutils", "xmlrpc", "msilib",
}  # fmt: skip
NOTICE = re.compile(
    r"copyright|licen[cs]e|permission (to|is)|redistribution|all rights reserved", re.IGNORECASE
)
SMALLEST_SOURCE, LARGEST_SOURCE = 1_500, 60_000  # bytes
SHORTEST_TOPIC, SHORTEST_DOCSTRING, SHORTEST_PARAGRAPH = 500, 240, 60  # characters


def find_standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def assign_share(name: str) -> Share:
    """Return the share of a file or topic, a function of its name alone, so that none overlap."""
    number = zlib.crc32(name.encode()) % 16
    if number == 0:
        return "held_out_code"
    if number <= 2:
        return "held_out_prose"
    return "prose" if number < 11 else "code"


def list_source_files(share: Share) -> list[Path]:
    """Return the usable source files of a share, in an order that mixes the library."""
    root = find_standard_library()
    files: list[tuple[int, str, Path]] = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        is_foreign = EXCLUDED.intersection(relative.parts) or name.startswith((
            "_sysconfigdata",
            "config-",
        ))
        if (
            not is_foreign
            and assign_share(name) == share
            and SMALLEST_SOURCE <= path.stat().st_size <= LARGEST_SOURCE
        ):
            files.append((zlib.crc32(name.encode()), name, path))
    return [path for _, _, path in sorted(files)]


def iterate_sources(share: Share) -> Iterator[str]:
    """Yield the source text of a share's files, except those with a notice."""
    for path in list_source_files(share):
        text = path.read_text(encoding="utf-8")
        if not NOTICE.search(text):
            yield text


def collect_documentation() -> dict[Share, list[str]]:
    """Return topics of the language reference, then long docstrings, by share.

    No paragraph occurs twice in all of it.
    """
    paragraphs: set[str] = set()
    texts: dict[Share, list[str]] = {"prose": [], "held_out_prose": []}
    for name, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        share: Share = "held_out_prose" if zlib.crc32(name.encode()) % 8 == 5 else "prose"
        text = _drop_seen(topic, paragraphs)
        if len(text) >= SHORTEST_TOPIC:
            texts[share].append(text)
    for share, collected in texts.items():
        for source in iterate_sources(share):
            docstrings = (_drop_seen(text, paragraphs) for text in _iterate_docstrings(source))
            collected.extend(text for text in docstrings if len(text) >= SHORTEST_DOCSTRING)
    return texts


def _drop_seen(text: str, paragraphs: set[str]) -> str:
    """Return the paragraphs of a text that are not in `paragraphs`; add the long ones to it."""
    new: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        key = " ".join(paragraph.split())
        if key in paragraphs:
            continue
        if len(key) >= SHORTEST_PARAGRAPH:
            paragraphs.add(key)
        new.append(paragraph.rstrip())
    return "\n\n".join(new).strip()


def _iterate_docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= SHORTEST_DOCSTRING:
                yield inspect.cleandoc(docstring)


def take_budget(texts: Iterable[str], budget: int) -> list[str]:
    """Return texts up to `budget` characters; the last one may exceed it."""
    taken: list[str] = []
    size = 0
    for text in texts:
        if size >= budget:
            break
        taken.append(text)
        size += len(text)
    return taken
