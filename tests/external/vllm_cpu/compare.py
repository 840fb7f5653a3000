"""Comparison of vLLM's answers with the dequantized model's: equal tokens except for near-ties.

Two exact implementations of one model do not choose the same tokens indefinitely: vLLM computes in
bfloat16, whose logits are 0.06 to 0.125 apart at tiny-v3's sizes, and its kernel rounds the inputs
of experts to 8 bits. Equal texts alone prove little, because tiny-v3's unquantized weights give the
same text as the artifact on 19 of 20 prompts. The comparison therefore has two conditions: every
difference is a near-tie, and the margin between the two likeliest tokens, wherever the second is at
all likely, moves by no more than rounding explains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

NEAR_TIE_NATS = 0.4
"""A logit differs by up to 0.19 between exact bfloat16 implementations of tiny-v3, so the distance
between two logits moves by up to 0.38; measured with vLLM over 200 prompts: 0.32.
"""
CLOSE_NATS = 0.1
"""Below this margin, or below the change that bfloat16 alone causes in the model's margins
(measured by reference.py), either token may win. 95 % of SmolLM2's margins move by less than 0.23
nats, 0.62 at most.
"""
MAX_DIFFERENT = 0.1
"""Share of answers that near-ties of a larger margin may change. On tiny-v3, near-ties of any
margin changed 1 of 200 answers.
"""
MARGIN_NATS = 0.12
"""Upper bound of the median change of a margin. Measured over 200 prompts: 0.044 for the artifact,
0.24 if vLLM runs the unquantized weights instead.
"""
LIKELY_NATS = -8.0
"""A step is undecided if the second token's log-probability is above this; only undecided steps
count.
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One generated token, and the likeliest tokens at its position with log-probabilities
    (nats).
    """

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to a prompt. The last step is EOS unless the answer was cut off."""

    task_id: str
    prompt: str
    prompt_tokens: list[int]
    text: str
    steps: list[Step]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first token in which two answers differ.

    margin: nats between the two tokens in the dequantized model; None if vLLM's token is not among
    the
        reference's candidates or an answer was cut off.
    position: None if the tokenizers encoded the prompt differently.
    """

    task_id: str
    position: int | None
    expected: str
    actual: str
    margin: float | None

    @property
    def is_near_tie(self) -> bool:
        return self.margin is not None and self.margin < NEAR_TIE_NATS

    @property
    def place(self) -> str:
        """The position of the difference, as text."""
        return "the prompt" if self.position is None else f"token {self.position}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing all answers.

    close: nats, the margin below which either token may win.
    margins: nats, changes of the undecided margins, up to the first difference of each answer.
    """

    answers: int
    close: float
    differences: tuple[Difference, ...]
    margins: tuple[float, ...]

    @property
    def faults(self) -> list[str]:
        """Reasons why vLLM's answers do not match the dequantized model; empty if they match."""
        faults = [
            f"{d.task_id}: {d.place} is no near-tie (margin {format_margin(d.margin)}, expected "
            f"below {NEAR_TIE_NATS} nats): expected {d.expected!r}, found {d.actual!r}"
            for d in self.differences
            if not d.is_near_tie
        ]
        clear = [d for d in self.differences if d.margin is None or d.margin > self.close]
        if len(clear) > MAX_DIFFERENT * self.answers:
            faults.append(
                f"{len(clear)} of {self.answers} answers differ at a margin above {self.close:.2g} "
                f"nats, expected at most {MAX_DIFFERENT:.0%}"
            )
        if not self.margins:
            faults.append("expected undecided steps, found none; use more prompts")
        elif median(self.margins) > MARGIN_NATS:
            faults.append(
                f"margins moved by {median(self.margins):.3f} nats in the median, expected at most "
                f"{MARGIN_NATS}: a change this large means other weights, not other arithmetic"
            )
        return faults

    @property
    def median_change(self) -> str:
        """The median change of the margins in nats, as text."""
        return f"{median(self.margins):.3f}" if self.margins else "-"

    def format_lines(self) -> list[str]:
        """Return the figures, one line each."""
        ties = [d for d in self.differences if d.is_near_tie]
        lines = [
            f"{self.answers} prompts: {self.answers - len(self.differences)} answers equal token "
            f"by token, {len(ties)} near-ties, {len(self.differences) - len(ties)} other "
            "differences"
        ]
        lines += [
            f"near-tie: {d.task_id}, {d.place}, margin {format_margin(d.margin)} nats" for d in ties
        ]
        if self.margins:
            lines.append(
                f"margin between the two likeliest tokens, {len(self.margins)} undecided steps: "
                f"moved by {median(self.margins):.3f} nats in the median (at most {MARGIN_NATS}), "
                f"{max(self.margins):.3f} at most"
            )
        return lines


def format_margin(margin: float | None) -> str:
    """Return a margin as text."""
    return "beyond the candidates" if margin is None else f"{margin:.3f}"


def compare_answers(
    expected: Sequence[Answer], actual: Sequence[Answer], rounding: float = 0.0
) -> Comparison:
    """Compare the answers of the dequantized model and of vLLM to the same prompts, in the same
    order.

    rounding: nats, the change that bfloat16 alone causes in the model's margins.
    """
    differences, margins = list[Difference](), list[float]()
    for reference, answer in zip(expected, actual, strict=True):
        first = find_first_difference(reference, answer)
        if first is not None:
            differences.append(first)
        if first is None:
            margins += compute_margin_changes(reference.steps, answer.steps)
        elif first.position is not None:
            margins += compute_margin_changes(
                reference.steps[: first.position + 1], answer.steps[: first.position + 1]
            )
    close = max(CLOSE_NATS, rounding)
    return Comparison(
        answers=len(expected), close=close, differences=tuple(differences), margins=tuple(margins)
    )


def find_first_difference(reference: Answer, answer: Answer) -> Difference | None:
    """Return the first difference of two answers, or None if they are equal."""
    context = {"task_id": reference.task_id, "expected": reference.text, "actual": answer.text}
    if reference.prompt_tokens != answer.prompt_tokens:
        return Difference(**context, position=None, margin=None)
    for position, (ours, theirs) in enumerate(zip(reference.steps, answer.steps)):
        if ours.token != theirs.token:
            likely = ours.logprobs
            margin = likely[ours.token] - likely[theirs.token] if theirs.token in likely else None
            return Difference(**context, position=position, margin=margin)
    if len(reference.steps) != len(answer.steps):
        return Difference(
            **context, position=min(len(reference.steps), len(answer.steps)), margin=None
        )
    return None


def compute_margin_changes(reference: Sequence[Step], answer: Sequence[Step]) -> list[float]:
    """Return |change of the margin| in nats for each undecided step.

    Both models must have read the same tokens before each step.
    """
    changes = []
    for ours, theirs in zip(reference, answer):  # up to the end of the shorter answer
        first, second = sorted(ours.logprobs, key=lambda token: -ours.logprobs[token])[:2]
        if ours.logprobs[second] > LIKELY_NATS and {first, second} <= theirs.logprobs.keys():
            margin = ours.logprobs[first] - ours.logprobs[second]
            changes.append(abs(margin - (theirs.logprobs[first] - theirs.logprobs[second])))
    return changes


def read_answers(path: Path) -> list[Answer]:
    """Read answers from a JSON file written by `write_answers` or generate.py."""
    items = json.loads(path.read_text(encoding="utf-8"))
    return [
        Answer(**{**item, "steps": [parse_step(step) for step in item["steps"]]}) for item in items
    ]


def parse_step(values: dict[str, Any]) -> Step:
    """Parse a step from JSON, whose keys are strings."""
    return Step(
        token=values["token"],
        logprobs={int(token): value for token, value in values["logprobs"].items()},
    )


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as a JSON list."""
    path.write_text(json.dumps([asdict(answer) for answer in answers]), encoding="utf-8")
