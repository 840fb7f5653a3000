"""The two sets for real models: documentation, sources and generated mathematics.

They are disjoint in files and in seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.calibration_sets.exercises import make_problem_text
from tools.calibration_sets.python_text import (
    Share,
    collect_documentation,
    iterate_sources,
    take_budget,
)

Row = tuple[str, str]  # domain, text


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralSet:
    """The composition of one set; budgets in characters."""

    code: Share
    prose: Share
    code_budget: int
    prose_budget: int
    math_budget: int
    math_seed: int


CALIBRATION = GeneralSet(
    code="code",
    prose="prose",
    code_budget=1_150_000,
    prose_budget=700_000,
    math_budget=800_000,
    math_seed=30,
)
HELD_OUT = GeneralSet(
    code="held_out_code",
    prose="held_out_prose",
    code_budget=105_000,
    prose_budget=90_000,
    math_budget=90_000,
    math_seed=31,
)


def make_general_rows(spec: GeneralSet) -> list[Row]:
    """Return the rows of a set: prose, math, code; all but math depend on the Python version."""
    prose = take_budget(collect_documentation()[spec.prose], spec.prose_budget)
    code = take_budget(iterate_sources(spec.code), spec.code_budget)
    return [
        *(("prose", text) for text in prose),
        *(("math", text) for text in make_math_texts(spec)),
        *(("code", text) for text in code),
    ]


def make_math_texts(spec: GeneralSet) -> list[str]:
    """Return distinct problems with solutions; held-out ones are in no calibration set."""
    rng = random.Random(spec.math_seed)
    seen = set() if spec is CALIBRATION else set(make_math_texts(CALIBRATION))
    texts: list[str] = []
    size = 0
    while size < spec.math_budget:
        text = make_problem_text(rng)
        if text not in seen:
            seen.add(text)
            texts.append(text)
            size += len(text)
    return texts
