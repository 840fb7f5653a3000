"""Whether vLLM answers as the dequantized model does: the same tokens, but where two tokens were nearly as likely.

Two exact implementations of one model do not choose the same token for ever: vLLM computes in bfloat16, whose logits
lie 0.06 to 0.125 apart at tiny-v3's sizes, and its kernel rounds what experts read to 8 bits. Equal texts alone would
prove little either, as tiny-v3's own unquantized weights give the same text as the artifact on 19 of 20 prompts. So two
things are asked: every difference is a near-tie, and the margin between the two likeliest tokens, wherever the second
has a chance at all, moves by no more than rounding explains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

NEAR_TIE_NATS = 0.4
"""Each of two logits differs by up to 0.19 between exact bfloat16 implementations of tiny-v3, so that their distance
moves by up to 0.38; measured against vLLM over 200 prompts: 0.32."""
CLOSE_NATS = 0.1
"""A margin below this falls to either side, and below what bfloat16 alone moves the margins of the model in question
(reference.py measures it): 95 % of SmolLM2's move by less than 0.23 nats, 0.62 at most."""
MAX_DIFFERENT = 0.1
"""Share of answers that near-ties of a larger margin may change; on tiny-v3, ties of any margin changed 1 of 200."""
MARGIN_NATS = 0.12
"""Bound of the median change of a margin. Measured over 200 prompts: 0.044 for the artifact; 0.24 when vLLM runs the
unquantized weights instead."""
LIKELY_NATS = -8.0
"""A margin counts where the second token's log-probability is above this; elsewhere nothing is undecided."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One generated token, and the likeliest tokens at its place with their log-probabilities (nats)."""

    token: int
    logprobs: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote behind a prompt; the last step is EOS unless the answer was cut off."""

    task_id: str
    prompt: str
    prompt_tokens: list[int]
    text: str
    steps: list[Step]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first token in which two answers differ; `margin` is what the dequantized model sees between the two.

    margin None: vLLM's token is not even among the reference's candidates, or an answer was cut off.
    position None: the tokenizers read the prompt differently.
    """

    task_id: str
    position: int | None
    expected: str
    found: str
    margin: float | None

    @property
    def near_tie(self) -> bool:
        return self.margin is not None and self.margin < NEAR_TIE_NATS

    @property
    def place(self) -> str:
        """Where the answers part, as text."""
        return "the prompt" if self.position is None else f"token {self.position}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All answers compared. `margins`: how far the undecided margins moved, over steps before a difference.

    close: nats, the margin below which either token may come.
    """

    answers: int
    close: float
    differences: tuple[Difference, ...]
    margins: tuple[float, ...]

    @property
    def faults(self) -> list[str]:
        """Why vLLM does not say what the dequantized model says; empty when it does."""
        found = [
            f"{d.task_id}: {d.place} is no near-tie (margin {format_margin(d.margin)}, expected below {NEAR_TIE_NATS} nats): "
            f"expected {d.expected!r}, found {d.found!r}"
            for d in self.differences
            if not d.near_tie
        ]
        clear = [d for d in self.differences if d.margin is None or d.margin > self.close]
        if len(clear) > MAX_DIFFERENT * self.answers:
            found.append(
                f"{len(clear)} of {self.answers} answers differ at a margin above {self.close:.2g} nats, expected at "
                f"most {MAX_DIFFERENT:.0%}"
            )
        if not self.margins:
            found.append("no step was undecided, expected some; ask more prompts")
        elif median(self.margins) > MARGIN_NATS:
            found.append(
                f"margins moved by {median(self.margins):.3f} nats in the median, expected at most {MARGIN_NATS}: "
                "so far apart are other weights, not other arithmetic"
            )
        return found

    @property
    def moved(self) -> str:
        """How far the margins moved in the median, in nats, as text."""
        return f"{median(self.margins):.3f}" if self.margins else "-"

    def lines(self) -> list[str]:
        """The figures, one line each."""
        ties = [d for d in self.differences if d.near_tie]
        told = [
            f"{self.answers} prompts: {self.answers - len(self.differences)} answers equal token by token, "
            f"{len(ties)} near-ties, {len(self.differences) - len(ties)} other differences"
        ]
        told += [
            f"near-tie: {d.task_id}, {d.place}, margin {format_margin(d.margin)} nats" for d in ties
        ]
        if self.margins:
            told.append(
                f"margin between the two likeliest tokens, {len(self.margins)} undecided steps: "
                f"moved by {median(self.margins):.3f} nats in the median (at most {MARGIN_NATS}), "
                f"{max(self.margins):.3f} at most"
            )
        return told


def format_margin(margin: float | None) -> str:
    """A margin as text."""
    return "beyond the candidates" if margin is None else f"{margin:.3f}"


def compare_answers(
    expected: Sequence[Answer], found: Sequence[Answer], rounding: float = 0.0
) -> Comparison:
    """Answers of the dequantized model and of vLLM to the same prompts, in the same order.

    rounding: how far bfloat16 alone moves the model's margins, in nats.
    """
    differences, margins = list[Difference](), list[float]()
    for reference, answer in zip(expected, found, strict=True):
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
    """Where two answers part, or None when they do not."""
    told = {"task_id": reference.task_id, "expected": reference.text, "found": answer.text}
    if reference.prompt_tokens != answer.prompt_tokens:
        return Difference(**told, position=None, margin=None)
    for position, (ours, theirs) in enumerate(zip(reference.steps, answer.steps)):
        if ours.token != theirs.token:
            likely = ours.logprobs
            margin = likely[ours.token] - likely[theirs.token] if theirs.token in likely else None
            return Difference(**told, position=position, margin=margin)
    if len(reference.steps) != len(answer.steps):
        return Difference(
            **told, position=min(len(reference.steps), len(answer.steps)), margin=None
        )
    return None


def compute_margin_changes(reference: Sequence[Step], answer: Sequence[Step]) -> list[float]:
    """|change of the margin| of every undecided step; both models read the same tokens up to each."""
    changes = []
    for ours, theirs in zip(reference, answer):  # up to the end of the shorter answer
        first, second = sorted(ours.logprobs, key=lambda token: -ours.logprobs[token])[:2]
        if ours.logprobs[second] > LIKELY_NATS and {first, second} <= theirs.logprobs.keys():
            margin = ours.logprobs[first] - ours.logprobs[second]
            changes.append(abs(margin - (theirs.logprobs[first] - theirs.logprobs[second])))
    return changes


def read_answers(path: Path) -> list[Answer]:
    """The answers of a JSON file that `write_answers`, or generate.py, wrote."""
    items = json.loads(path.read_text(encoding="utf-8"))
    return [
        Answer(**{**item, "steps": [parse_step(step) for step in item["steps"]]}) for item in items
    ]


def parse_step(values: dict[str, Any]) -> Step:
    """A step from JSON, whose keys are text."""
    return Step(
        token=values["token"],
        logprobs={int(token): value for token, value in values["logprobs"].items()},
    )


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """Answers as a JSON list."""
    path.write_text(json.dumps([asdict(answer) for answer in answers]), encoding="utf-8")
