"""Benchmark tasks as files: their paths, their text, and the temporary folder for lm-eval."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from quantkit.errors import EvaluationError
from quantkit.io.files import describe_os_error, is_encodable, is_file, read_bytes
from quantkit.io.package_data import locate_folder

SUFFIX = ".yaml"
MAX_BYTES = 1_000_000  # no task description is larger
MAX_PYTHON_BYTES = 1_000_000  # nor is the Python of one
MAX_ROW_BYTES = 64 << 20
MAX_NESTING = 100
"""Real rows have two or three levels; pyarrow overflows the stack at some thousands."""
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
PREFIX_BYTES = 4096  # blank lines in front of the first row
SPLIT_NAME = re.compile(r"\w[\w.]{0,63}", re.ASCII)  # it becomes part of a file's name


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonFile:
    """A task's own Python, as it was read: `sha256` is of exactly this text."""

    path: Path
    text: str
    sha256: str


def list_task_names() -> tuple[str, ...]:
    """Return the tasks that ship with quantkit, in alphabetical order."""
    return tuple(sorted(path.stem for path in locate_folder("evals").glob(f"*{SUFFIX}")))


def find_task_path(name: str) -> Path:
    """Return the file of a shipped task, or of a task given by a path that ends in .yaml."""
    return Path(name) if name.endswith(SUFFIX) else locate_folder("evals") / f"{name}{SUFFIX}"


def read_task_text(path: Path) -> str:
    """Read the text of a task's file; EvaluationError if it cannot be read."""
    try:
        return read_bytes(path, MAX_BYTES, EvaluationError).decode("utf-8")
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{path}: expected UTF-8 text, found other bytes; save it as UTF-8"
        ) from None


def read_python(path: Path) -> PythonFile:
    """Read the Python of a task without running it; EvaluationError if it cannot be read."""
    data = read_bytes(path, MAX_PYTHON_BYTES, EvaluationError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{path}: expected Python in UTF-8, found other bytes; save it as UTF-8"
        ) from None
    return PythonFile(path=path, text=text, sha256=hashlib.sha256(data).hexdigest())


def check_rows_file(path: Path) -> None:
    """Check a JSONL file for the datasets library, which unpacks archives and ends the process at
    deeply nested rows. Raises EvaluationError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(PREFIX_BYTES).lstrip()
            file.seek(0)
            rows = iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"")
            faults = (_find_row_fault(number, row) for number, row in enumerate(rows, start=1))
            fault = next(filter(None, faults), None)
    except OSError as error:
        raise EvaluationError(
            f"{path}: expected a readable JSONL file, found: {describe_os_error(error)}; check the "
            "path"
        ) from None
    if start[:1] != b"{":
        raise EvaluationError(
            f"{path}: expected one JSON object per line, found another start of the file; fetch it "
            "again, or unpack it"
        )
    if fault is not None:
        raise EvaluationError(f"{path}:{fault}; correct the row")


def _find_row_fault(number: int, row: bytes) -> str | None:
    """Return the fault of a row that is too long or too deeply nested."""
    if len(row) > MAX_ROW_BYTES:
        return f"{number}: expected at most {MAX_ROW_BYTES:,} bytes in a row, found more"
    if row.count(b"[") + row.count(b"{") <= MAX_NESTING:  # true of almost every row, and quick
        return None
    depth = 0
    for token in _TOKENS.finditer(row):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > MAX_NESTING:
            return f"{number}: expected at most {MAX_NESTING} nested lists and objects, found more"
    return None


def find_first_file(name: str, places: tuple[Path, ...]) -> Path | None:
    """Return the absolute path of `name` in the first of `places` that has it, or None."""
    paths = (place / name for place in places)
    return next((path.resolve() for path in paths if is_file(path)), None)


def read_row_range(path: Path, start: int, end: int) -> str:
    """Read lines [start, end) of a JSONL file; EvaluationError if it is shorter."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = list(islice(file, start, end))
    except (OSError, UnicodeDecodeError) as fault:
        problem = describe_os_error(fault) if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise EvaluationError(
            f"{path}: expected a readable JSONL file, found: {problem}; fetch it again"
        ) from None
    if len(rows) < end - start:
        raise EvaluationError(
            f"{path}: expected rows {start} to {end}, found "
            f"{start + len(rows) if rows else 'fewer'} rows; fetch the whole file"
        )
    return "".join(rows)


def read_first_rows(
    path: Path, rows: tuple[int, int] | None, count: int
) -> list[dict[str, object]]:
    """Read the first `count` rows, or all if fewer, of a JSONL file or of its rows [from, to)."""
    start, end = rows or (0, count)
    try:
        with path.open(encoding="utf-8") as file:
            values = [json.loads(line) for line in islice(file, start, min(end, start + count))]
    except (OSError, ValueError, RecursionError) as fault:
        raise EvaluationError(
            f"{path}: expected a readable JSONL file, found: {fault}; fetch it again"
        ) from None
    if not is_encodable(values):
        raise EvaluationError(f"{path}: expected text, found half a surrogate pair; fetch it again")
    if not all(isinstance(row, dict) for row in values):
        raise EvaluationError(
            f"{path}: expected one JSON object per line, found something else; fetch it again"
        )
    return values


@contextmanager
def make_temporary_folder() -> Iterator[Path]:
    """Yield a folder that is deleted with its content on exit."""
    with tempfile.TemporaryDirectory(prefix="quantkit-evals-") as name:
        yield Path(name)


def save_text(path: Path, text: str) -> None:
    """Write a text file into a temporary folder."""
    path.write_text(text, encoding="utf-8")
