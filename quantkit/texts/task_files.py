"""Benchmark tasks as files: where they lie, their text, and the temporary folder that lm-eval reads them from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from quantkit.errors import EvaluationError
from quantkit.io.files import describe_os_error, is_encodable, is_file, read_bytes
from quantkit.io.package_data import locate_folder

SUFFIX = ".yaml"
LIMIT_BYTES = 1_000_000  # no task description is larger


def list_task_names() -> tuple[str, ...]:
    """The tasks that ship with quantkit, in alphabetical order."""
    return tuple(sorted(path.stem for path in locate_folder("evals").glob(f"*{SUFFIX}")))


def find_task_path(name: str) -> Path:
    """The file of a task that ships with quantkit, or of one given by its path (anything that ends in .yaml)."""
    return Path(name) if name.endswith(SUFFIX) else locate_folder("evals") / f"{name}{SUFFIX}"


def read_task_text(path: Path) -> str:
    """The text of a task's file; EvaluationError when it cannot be read."""
    try:
        return read_bytes(path, LIMIT_BYTES, EvaluationError).decode("utf-8")
    except UnicodeDecodeError:
        raise EvaluationError(
            f"{path}: expected UTF-8 text, found other bytes; save it as UTF-8"
        ) from None


def find_first_file(name: str, places: tuple[Path, ...]) -> Path | None:
    """The absolute path of `name` in the first of `places` that has it."""
    found = (place / name for place in places)
    return next((path.resolve() for path in found if is_file(path)), None)


def read_row_range(path: Path, start: int, end: int) -> str:
    """Lines start to end (exclusive, counted from 0) of a JSONL file; EvaluationError when it has fewer."""
    try:
        with path.open(encoding="utf-8") as file:
            rows = list(islice(file, start, end))
    except (OSError, UnicodeDecodeError) as fault:
        said = describe_os_error(fault) if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise EvaluationError(
            f"{path}: expected a readable JSONL file, found: {said}; fetch it again"
        ) from None
    if len(rows) < end - start:
        raise EvaluationError(
            f"{path}: expected rows {start} to {end}, found {start + len(rows) if rows else 'fewer'} rows; "
            "fetch the whole file"
        )
    return "".join(rows)


def read_first_rows(
    path: Path, rows: tuple[int, int] | None, count: int
) -> list[dict[str, object]]:
    """The first `count` rows, or all there are, of a JSONL file or of the rows [from, to) of it."""
    start, end = rows or (0, count)
    try:
        with path.open(encoding="utf-8") as file:
            found = [json.loads(line) for line in islice(file, start, min(end, start + count))]
    except (OSError, ValueError, RecursionError) as fault:
        raise EvaluationError(
            f"{path}: expected a readable JSONL file, found: {fault}; fetch it again"
        ) from None
    if not is_encodable(found):
        raise EvaluationError(f"{path}: expected text, found half a surrogate pair; fetch it again")
    if not all(isinstance(row, dict) for row in found):
        raise EvaluationError(
            f"{path}: expected one JSON object a line, found something else; fetch it again"
        )
    return found


@contextmanager
def make_temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, with whatever was put into it."""
    with tempfile.TemporaryDirectory(prefix="quantkit-evals-") as name:
        yield Path(name)


def write_text(path: Path, text: str) -> None:
    """Write a text file into a temporary folder."""
    path.write_text(text, encoding="utf-8")
