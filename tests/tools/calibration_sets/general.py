"""The two sets for real models: documentation, sources and generated mathematics; disjoint in files and in seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.calibration_sets.exercises import problem_text
from tools.calibration_sets.python_text import Share, documentation, sources, up_to

Row = tuple[str, str]  # domain, text


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneralSet:
    """What one set is made of; budgets in characters."""

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


def general_rows(which: GeneralSet) -> list[Row]:
    """Rows of a set: prose, math, code. The math does not depend on the Python version, the rest does."""
    prose = up_to(documentation()[which.prose], which.prose_budget)
    code = up_to(sources(which.code), which.code_budget)
    return [
        *(("prose", text) for text in prose),
        *(("math", text) for text in math_texts(which)),
        *(("code", text) for text in code),
    ]


def math_texts(which: GeneralSet) -> list[str]:
    """Problems with their solutions, all different; held-out ones appear in no calibration set."""
    rng = random.Random(which.math_seed)
    seen = set() if which is CALIBRATION else set(math_texts(CALIBRATION))
    texts: list[str] = []
    held = 0
    while held < which.math_budget:
        text = problem_text(rng)
        if text not in seen:
            seen.add(text)
            texts.append(text)
            held += len(text)
    return texts
