"""Store of an evaluation's answers in one SQLite file, from which a killed evaluation resumes.

A row is one answer to one request; SQLite commits it whole or not at all, whenever the process
dies. The primary key has everything that can change the answer, so that no request is sent or
counted twice.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from quantkit.errors import EvaluationError, QuantkitError

_SCHEMA = """create table if not exists answers (
 task text, doc_hash text, prompt_hash text, settings text, model text, turn integer,
 value text not null,
 primary key (task, doc_hash, prompt_hash, settings, model, turn)) without rowid"""
_SELECT = """select value from answers
 where (task, doc_hash, prompt_hash, settings, model, turn) = (?, ?, ?, ?, ?, ?)"""
_WAIT_SECONDS = 1


class AnswerKey(NamedTuple):
    """The key of an answer; `turn` numbers equal requests, which sampling answers differently."""

    task: str
    doc_hash: str
    prompt_hash: str
    settings: str
    model: str
    turn: int


StoredValue = list[object]
"""An answer as JSON stores it."""


class AnswerStore:
    """The answers in one file; every `put` is on disk when it returns."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._connection, self._path = connection, path

    def get(self, key: AnswerKey) -> StoredValue | None:
        """Return the stored answer, or None. Raises EvaluationError if the file is damaged."""
        try:
            row = self._connection.execute(_SELECT, key).fetchone()
            return None if row is None else list(json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            raise self._make_damaged_error(error) from None

    def put(self, answers: Sequence[tuple[AnswerKey, StoredValue]]) -> None:
        """Store all of these answers or none; the first answer to a request stays."""
        rows = [(*key, json.dumps(value)) for key, value in answers]
        try:
            with self._connection:
                self._connection.executemany(
                    "insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            # the model works, so this is no EvaluationError, which would only skip the task
            raise QuantkitError(
                f"{self._path}: an answer cannot be stored: {error}; free disk space, then resume"
            ) from None

    def __len__(self) -> int:
        try:
            return int(self._connection.execute("select count(*) from answers").fetchone()[0])
        except (sqlite3.Error, ValueError) as error:
            raise self._make_damaged_error(error) from None

    def _make_damaged_error(self, error: Exception) -> EvaluationError:
        return EvaluationError(
            f"{self._path}: expected the answers of an evaluation, found: {error}; remove it"
        )


def has_answers(path: Path) -> bool:
    """Return whether a file has answers or cannot be read.

    A file without any may be overwritten.
    """
    if not path.is_file():
        return False
    try:
        with open_answer_store(path) as store:
            return len(store) > 0
    except EvaluationError:
        return True


@contextmanager
def open_answer_store(path: Path | None) -> Iterator[AnswerStore]:
    """Open the store in a file, which is created if needed; without a path, open one in memory.

    Raises EvaluationError if the file is not a store, or if another process has it open.
    """
    name = ":memory:" if path is None else str(path)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = _connect(name)
    except sqlite3.OperationalError as error:
        raise EvaluationError(
            f"{name}: answers cannot be stored: {error}; wait for the evaluation that uses it, or "
            "name another folder"
        ) from None
    # SQLite raises UnicodeDecodeError for some damaged files
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{name}: expected the answers of an evaluation, found: {error}; remove it"
        ) from None
    try:
        yield AnswerStore(connection, name)
    finally:
        connection.close()


def _connect(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=_WAIT_SECONDS)
    try:
        connection.execute("pragma locking_mode = exclusive")  # a lock that dies with the process
        connection.execute("begin exclusive")
        connection.execute(_SCHEMA)
        connection.commit()
    except BaseException:
        connection.close()  # otherwise it keeps its lock until it is collected
        raise
    return connection
