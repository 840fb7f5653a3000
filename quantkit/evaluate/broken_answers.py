"""Benchmarks that measure their own limits: too many answers are cut or have no result."""

from __future__ import annotations

from collections.abc import Mapping

MOST_BROKEN = 0.2
"""Share of a task's answers that may be cut at the token limit, and that may have no result; a
task with more measures the limit or the reading of answers, not the model.
"""
LEAST_ANSWERS = 20
"""Answers from which on a task is judged: a share of fewer says little."""


def describe_broken(task: str, n: int, sides: Mapping[str, tuple[float, float]]) -> str:
    """Return why a task is not valid, and what to do; "" for a valid one.

    n: answers of each model; sides: model -> share of its answers that were cut, and that have no
    result.
    """
    reasons = []
    if n < LEAST_ANSWERS:
        return ""
    for side, (cut, unread) in sides.items():
        if cut > MOST_BROKEN:
            reasons.append(
                f"{cut:.0%} of the answers of the {side} were cut at the token limit; raise "
                "max_gen_toks of the task"
            )
        elif unread > MOST_BROKEN:
            reasons.append(
                f"{unread:.0%} of the answers of the {side} have no result; look at the answers, "
                "the prompt and the filter of the task"
            )
    if not reasons:
        return ""
    return f"{task}: expected at most {MOST_BROKEN:.0%}, but {', and '.join(reasons)}"
