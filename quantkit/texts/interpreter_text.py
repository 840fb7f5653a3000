"""Text of the running Python's standard library: documentation and sources of modules.

Files are read as text and docstrings are taken from the syntax tree; no module is imported. Files
with their own copyright or license notice are excluded, so that the Python Software Foundation's
license (PSF-2.0) covers everything. The selection is a pure function of the standard library, and
two draws share no file, no topic and no paragraph of documentation.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from quantkit.errors import CalibrationError
from quantkit.io.files import is_file, read_bytes

Draw = Literal["calibration", "heldout"]
Use = Literal["documentation", "sources"]
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

DRAWS: tuple[Draw, ...] = ("heldout", "calibration")  # the smaller one first: it is read for both
EXCLUDED = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings",
    "pydoc_data", "turtledemo", "ensurepip", "__pycache__", "distutils", "xmlrpc", "msilib",
}  # fmt: skip
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # generated for one machine
NOTICE = re.compile(
    r"copyright|licen[cs]e|permission (to|is)|redistribution|all rights reserved", re.IGNORECASE
)
SMALLEST_SOURCE = 1_500  # bytes
LARGEST_SOURCES: Mapping[Use, int] = {"documentation": 150_000, "sources": 100_000}
"""Bytes of a file. One large module would be most of the code of a short calibration."""
LARGEST_TOPICS = 10_000_000  # bytes
SHORTEST_TOPIC, SHORTEST_DOCSTRING, SHORTEST_PARAGRAPH = 500, 240, 60  # characters
TOPICS = Path("pydoc_data", "topics.py")
REMEDY = (
    "Use a Python that has its standard library as source files (python.org, uv and conda have; "
    "on Debian, install libpython3-stdlib), or replace the part by a `file`"
)


def find_standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def describe_interpreter() -> str:
    """Return name and version of the running Python: "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def read_sources(root: Path, draw: Draw) -> Iterator[str]:
    """Yield the source text of a draw's modules below the standard library `root`.

    Raises CalibrationError if there are none.
    """
    return _iterate_sources(root, "sources", draw)


def read_documentation(root: Path, draw: Draw) -> Iterator[str]:
    """Yield topics of the language reference, then long docstrings of a draw's modules.

    No paragraph occurs twice in the text of all draws: the first draw has it. Raises
    CalibrationError if topics or sources are missing.
    """
    paragraphs = set[str]()
    topics = _read_topics(root / TOPICS)
    for name, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        topic_draw: Draw = "heldout" if zlib.crc32(name.encode()) % 8 == 5 else "calibration"
        text = _drop_repeated(topic, paragraphs)
        if topic_draw == draw and len(text) >= SHORTEST_TOPIC:
            yield text
    for other in DRAWS[: DRAWS.index(draw) + 1]:
        for source in _iterate_sources(root, "documentation", other):
            for docstring in _iterate_docstrings(source):
                text = _drop_repeated(docstring, paragraphs)
                if other == draw and len(text) >= SHORTEST_DOCSTRING:
                    yield text


def assign_file(name: str) -> tuple[Use, Draw]:
    """Return use and draw of a file, a function of its name alone, so that none overlap."""
    number = zlib.crc32(name.encode()) % 16
    use: Use = "documentation" if 1 <= number < 11 else "sources"
    return use, "heldout" if number <= 2 else "calibration"


def list_source_files(root: Path, use: Use, draw: Draw) -> list[Path]:
    """Return the usable source files of a draw, in an order that mixes the library."""
    files: list[tuple[int, str, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_excluded(name)]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if (
                assign_file(name) == (use, draw)
                and not _is_excluded(path.name)
                and is_file(path)
                and SMALLEST_SOURCE <= path.stat().st_size <= LARGEST_SOURCES[use]
            ):
                files.append((zlib.crc32(name.encode()), name, path))
    return [path for _, _, path in sorted(files)]


def _is_excluded(name: str) -> bool:
    return name in EXCLUDED or name.startswith(EXCLUDED_PREFIXES)


def _iterate_sources(root: Path, use: Use, draw: Draw) -> Iterator[str]:
    paths = list_source_files(root, use, draw)
    if not paths:
        raise CalibrationError(
            f"expected modules of {describe_interpreter()}'s standard library as "
            f".py files in {root}, found none. {REMEDY}"
        )
    for path in paths:
        text = _decode(read_bytes(path, LARGEST_SOURCES[use], CalibrationError))
        if text and not NOTICE.search(text):
            yield text


def _decode(data: bytes) -> str:
    """Return the text of a source file with LF line ends; "" if it is not UTF-8."""
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""


def _parse(source: str) -> ast.Module:
    """Return the syntax tree of a source; an empty one if this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that a later version will refuse
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module(body=[], type_ignores=[])


def _read_topics(path: Path) -> dict[str, str]:
    """Return the topics of the language reference by name: the dictionary literal of a file."""
    expected = f"expected the topics of {describe_interpreter()} in {path}"
    if not is_file(path):
        raise CalibrationError(f"{expected}, found no such file. {REMEDY}")
    topics = dict[str, str]()
    for node in _parse(_decode(read_bytes(path, LARGEST_TOPICS, CalibrationError))).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            topics |= {
                key.value: value.value
                for key, value in zip(node.value.keys, node.value.values)
                if isinstance(key, ast.Constant)
                and isinstance(value, ast.Constant)
                and isinstance(key.value, str)
                and isinstance(value.value, str)
            }
    if not topics:
        raise CalibrationError(f"{expected}, found no dictionary of text. {REMEDY}")
    return topics


def _drop_repeated(text: str, paragraphs: set[str]) -> str:
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
    """Yield the long docstrings of a module, its classes and functions, outer ones first."""
    documented = deque[Documented]([_parse(source)])
    while documented:
        node = documented.popleft()
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= SHORTEST_DOCSTRING:
            yield docstring
        documented += [child for child in node.body if isinstance(child, Documented)]
