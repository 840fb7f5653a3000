"""Answers as they come, in one SQLite file: an evaluation that was killed goes on with what it had not asked yet.

A row is one answer to one question; SQLite commits it whole or not at all, whenever the process dies. The primary key
is everything that can change the answer, so that nothing is asked, or counted, twice.
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
 task text, doc_hash text, prompt_hash text, settings text, model text, turn integer, value text not null,
 primary key (task, doc_hash, prompt_hash, settings, model, turn)) without rowid"""
_WAIT_SECONDS = 1


class AnswerKey(NamedTuple):
    """What an answer is stored under; `turn` counts equal questions, which sampling answers differently."""

    task: str
    doc_hash: str
    prompt_hash: str
    settings: str
    model: str
    turn: int


StoredValue = list[object]
"""An answer as JSON keeps it."""


class AnswerStore:
    """The answers in one file; every `put` is on disk when it returns."""

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._connection, self._path = connection, path

    def get(self, question: AnswerKey) -> StoredValue | None:
        """The stored answer; None when there is none. EvaluationError for a file that is damaged."""
        try:
            row = self._connection.execute(
                "select value from answers where (task, doc_hash, prompt_hash, settings, model, turn) = "
                "(?, ?, ?, ?, ?, ?)",
                question,
            ).fetchone()
            return None if row is None else list(json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as fault:
            raise self._damaged(fault) from None

    def put(self, answers: Sequence[tuple[AnswerKey, StoredValue]]) -> None:
        """Store answers, all of them or none; the first answer to a question stays."""
        rows = [(*question, json.dumps(value)) for question, value in answers]
        try:
            with self._connection:
                self._connection.executemany(
                    "insert or ignore into answers values (?, ?, ?, ?, ?, ?, ?)", rows
                )
        except sqlite3.Error as fault:
            raise QuantkitError(  # the model can be asked: no reason to do without its answers
                f"{self._path}: an answer cannot be stored: {fault}; make room and go on"
            ) from None

    def __len__(self) -> int:
        try:
            return int(self._connection.execute("select count(*) from answers").fetchone()[0])
        except (sqlite3.Error, ValueError) as fault:
            raise self._damaged(fault) from None

    def _damaged(self, fault: Exception) -> EvaluationError:
        return EvaluationError(
            f"{self._path}: expected the answers of an evaluation, found: {fault}; remove it"
        )


def has_answers(path: Path) -> bool:
    """Whether a file has answers, or is one that cannot be read as it should; what has none can be written over."""
    if not path.is_file():
        return False
    try:
        with open_answer_store(path) as found:
            return len(found) > 0
    except EvaluationError:
        return True


@contextmanager
def open_answer_store(path: Path | None) -> Iterator[AnswerStore]:
    """The journal in a file, which is made when it is not there; without a path one that is gone afterwards.

    EvaluationError when the file is no journal, or when another process has it open.
    """
    name = ":memory:" if path is None else str(path)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = _connected(name)
    except sqlite3.OperationalError as fault:
        raise EvaluationError(
            f"{name}: answers cannot be stored: {fault}; wait for the evaluation that uses it, or name another place"
        ) from None
    except (
        sqlite3.DatabaseError,
        UnicodeDecodeError,
    ) as fault:  # the latter for what SQLite says of a damaged file
        raise EvaluationError(
            f"{name}: expected the answers of an evaluation, found: {fault}; remove it"
        ) from None
    try:
        yield AnswerStore(connection, name)
    finally:
        connection.close()


def _connected(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=_WAIT_SECONDS)
    try:
        connection.execute("pragma locking_mode = exclusive")  # a lock that dies with the process
        connection.execute("begin exclusive")
        connection.execute(_SCHEMA)
        connection.commit()
    except BaseException:
        connection.close()  # or it would keep its lock until it is collected
        raise
    return connection
