"""templates.json as typed values: the words and sentences of tiny-v3's corpus.

corpus.py fills the placeholders in braces. Ranges are inclusive and are drawn in the order of the
file, because the order of draws is part of the corpus.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files

Range = tuple[int, int]

OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One sentence of a worked solution and its calculation; step k defines the value `v<k>`."""

    sentence: str
    left: str
    operator: str
    right: str

    def value(self, values: Mapping[str, int]) -> int:
        """Return the result of this step from the problem's numbers and previous results."""
        return OPERATORS[self.operator](values[self.left], values[self.right])


@dataclass(frozen=True, kw_only=True, slots=True)
class WordProblem:
    """A kind of word problem; a draw above `at_most` is repeated."""

    ranges: Mapping[str, Range]
    questions: tuple[str, ...]
    steps: tuple[Step, ...]
    at_most: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionTemplate:
    """A kind of Python function; `kind` selects its parameter's name, `arguments` its tests'."""

    kind: str
    names: tuple[str, ...]
    docs: tuple[str, ...]
    body: str
    arguments: str
    constants: Mapping[str, Range]


@dataclass(frozen=True, kw_only=True, slots=True)
class Templates:
    """Everything in templates.json; `words` and `parameters` are word lists by name."""

    words: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, tuple[str, ...]]
    arithmetic_questions: tuple[str, ...]
    english_sentences: tuple[str, ...]
    word_problems: tuple[WordProblem, ...]
    functions: tuple[FunctionTemplate, ...]


def load_templates() -> Templates:
    """Read templates.json next to this file."""
    data = json.loads(files(__package__).joinpath("templates.json").read_text(encoding="utf-8"))
    return Templates(
        words={key: tuple(words) for key, words in data["words"].items()},
        parameters={key: tuple(words) for key, words in data["parameters"].items()},
        arithmetic_questions=tuple(data["arithmetic_questions"]),
        english_sentences=tuple(data["english_sentences"]),
        word_problems=tuple(
            WordProblem(
                ranges=_parse_ranges(row["ranges"]),
                questions=tuple(row["questions"]),
                steps=tuple(
                    Step(
                        sentence=s["sentence"],
                        left=s["left"],
                        operator=s["operator"],
                        right=s["right"],
                    )
                    for s in row["steps"]
                ),
                at_most=dict(row.get("at_most", {})),
            )
            for row in data["word_problems"]
        ),
        functions=tuple(
            FunctionTemplate(
                kind=row["kind"],
                names=tuple(row["names"]),
                docs=tuple(row["docs"]),
                body=row["body"],
                arguments=row["arguments"],
                constants=_parse_ranges(row["constants"]),
            )
            for row in data["functions"]
        ),
    )


def _parse_ranges(row: Mapping[str, list[int]]) -> dict[str, Range]:
    return {name: (low, high) for name, (low, high) in row.items()}
