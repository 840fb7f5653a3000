"""Built-in text of a mixture's part: the running Python's standard library, and generated
mathematics.

Each text has two draws that share no document: one to calibrate on, one to measure on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

from quantkit.errors import CalibrationError
from quantkit.texts.exercises import EXERCISES
from quantkit.texts.interpreter_text import (
    Draw,
    describe_interpreter,
    find_standard_library,
    read_documentation,
    read_sources,
)
from quantkit.texts.word_problems import WORD_PROBLEMS, Problem

BuiltinName = Literal["exercises", "python-modules", "python-topics", "word-problems"]

ORIGINS: Mapping[BuiltinName, str] = {
    "exercises": "generated exercises",
    "python-modules": "{interpreter}, standard library: sources of modules",
    "python-topics": "{interpreter}, standard library: pydoc topics and docstrings",
    "word-problems": "generated word problems",
}
CHARACTERS: Mapping[BuiltinName, Mapping[Draw, int]] = {
    "exercises": {"calibration": 450_000, "heldout": 65_000},
    "python-modules": {"calibration": 1_300_000, "heldout": 150_000},
    "python-topics": {"calibration": 700_000, "heldout": 105_000},
    "word-problems": {"calibration": 500_000, "heldout": 70_000},
}
"""The size of each draw; its last document may exceed it, and a library may have less."""

GENERATORS: Mapping[BuiltinName, tuple[Callable[[random.Random], Problem], ...]] = {
    "exercises": EXERCISES,
    "word-problems": WORD_PROBLEMS,
}
HELD_OUT_SHARE = 8  # one problem in 8 belongs to the held-out draw
LAYOUTS = (
    "Question: {question}\n\nSolution: {solution}",
    "Problem. {question}\n\n{solution}",
    "Q: {question}\nA: {solution}",
    "## Exercise\n\n{question}\n\n## Solution\n\n{solution}",
)


def read_builtin(name: BuiltinName, draw: Draw, where: str) -> tuple[str, ...]:
    """Return the documents of a draw, the same for one version of Python and of quantkit.

    Raises CalibrationError, with `where` as the place of the request, if the standard library has
    no source files.
    """
    try:
        return _read_builtin(name, draw, find_standard_library())
    except CalibrationError as error:
        raise CalibrationError(f"{where}: builtin: {error}") from None


@cache  # a plan reads the text for its hash, and the build again
def _read_builtin(name: BuiltinName, draw: Draw, root: Path) -> tuple[str, ...]:
    match name:
        case "python-modules":
            texts = read_sources(root, draw)
        case "python-topics":
            texts = read_documentation(root, draw)
        case _:
            texts = iterate_problems(name, draw)
    return take_characters(texts, CHARACTERS[name][draw])


def describe_builtin(name: BuiltinName, draw: Draw) -> str:
    """Return the origin of a draw, with the version of the Python that it comes from."""
    return f"{ORIGINS[name].format(interpreter=describe_interpreter())}; draw {draw}"


def iterate_problems(name: BuiltinName, draw: Draw) -> Iterator[str]:
    """Yield distinct problems with solutions, without end.

    The draw of a problem is a function of its text, so that the draws are disjoint.
    """
    rng = random.Random(f"{name} {draw}")
    seen = set[Problem]()
    while True:
        problem = rng.choice(GENERATORS[name])(rng)
        layout = rng.choice(LAYOUTS)
        if problem not in seen and assign_problem(problem) == draw:
            seen.add(problem)
            question, solution = problem
            yield layout.format(question=question, solution=solution)


def assign_problem(problem: Problem) -> Draw:
    """Return the draw of a problem."""
    number = zlib.crc32("\n".join(problem).encode())
    return "heldout" if number % HELD_OUT_SHARE == 0 else "calibration"


def take_characters(texts: Iterable[str], budget: int) -> tuple[str, ...]:
    """Return texts of up to `budget` characters together; the last one may exceed it."""
    taken, size = list[str](), 0
    for text in texts:
        if size >= budget:
            break
        taken.append(text)
        size += len(text)
    return tuple(taken)
