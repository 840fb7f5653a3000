"""templates.json as typed values: what the corpus of tiny-v3 is made of.

Placeholders in braces are filled by corpus.py. Ranges are inclusive and are drawn in the order in which they are
written, because the order of the draws is part of the corpus.
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
    """One sentence of a worked solution and the calculation behind it; step k defines the value `v<k>`."""

    sentence: str
    left: str
    operator: str
    right: str

    def value(self, values: Mapping[str, int]) -> int:
        """The result of this step, given the numbers of the problem and of the steps before."""
        return OPERATORS[self.operator](values[self.left], values[self.right])


@dataclass(frozen=True, kw_only=True, slots=True)
class WordProblem:
    """A kind of word problem; `at_most` bounds numbers after they were drawn (a draw above it is repeated)."""

    ranges: Mapping[str, Range]
    questions: tuple[str, ...]
    steps: tuple[Step, ...]
    at_most: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionTemplate:
    """A kind of Python function; `kind` says what its parameter is called, `arguments` what its tests pass."""

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
    """Read templates.json, which is shipped beside this file."""
    data = json.loads(files(__package__).joinpath("templates.json").read_text(encoding="utf-8"))
    return Templates(
        words={key: tuple(words) for key, words in data["words"].items()},
        parameters={key: tuple(words) for key, words in data["parameters"].items()},
        arithmetic_questions=tuple(data["arithmetic_questions"]),
        english_sentences=tuple(data["english_sentences"]),
        word_problems=tuple(
            WordProblem(
                ranges=_ranges(row["ranges"]),
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
                constants=_ranges(row["constants"]),
            )
            for row in data["functions"]
        ),
    )


def _ranges(row: Mapping[str, list[int]]) -> dict[str, Range]:
    return {name: (low, high) for name, (low, high) in row.items()}
