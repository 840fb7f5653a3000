"""Conversations of several turns with a common system prompt, which a prefix cache serves. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

TURNS = 4
MAX_AT_ONCE = 4
SYSTEM_PROMPT = """\
You are the assistant of a company that sells and services bicycles. Answer in English, in at most
three sentences, without lists. Use metric units. Name the part of the bicycle that the answer is
about, and the tool that is needed. If a repair can hurt a person when it is done wrongly, such as
work on brakes, steering or the frame, say so and advise a workshop. Prices are in euros and include
tax; say that a price is an estimate. Opening hours are Monday to Friday from nine to six, Saturday
from ten to two. Bicycles can be rented for a day or for a week; a deposit of one hundred euros is
returned. Warranty is two years for frames and one year for parts that do not wear. Chains, tyres,
brake pads and cables wear. Electric bicycles are repaired only if their battery is an original one.
If a question is about another topic, say in one sentence what you can help with. Do not ask for
names, addresses or numbers of cards. If you do not know an answer, say so."""
PARTS = (
    "the chain", "the rear derailleur", "the front brake", "the saddle", "the bottom bracket",
    "the headset", "the rear wheel", "the tyres", "the pedals", "the battery", "the front fork",
    "the lights", "the handlebar", "the mudguards", "the spokes", "the cassette",
)  # fmt: skip
QUESTIONS = (
    "Something is wrong with {part} of bicycle {number}: it makes a noise. What can it be?",
    "How do I check that at home, step by step?",
    "What does it cost if you do it for me, and how long does it take?",
    "Is it covered by the warranty, and when can I bring the bicycle?",
)


def make_conversations(count: int, max_tokens: int, *, ignore_eos: bool) -> list[dict[str, Any]]:
    """Return GuideLLM's rows of `count` conversations of TURNS turns each."""
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"system_prompt": SYSTEM_PROMPT}
        part = PARTS[number % len(PARTS)]
        for turn, question in enumerate(QUESTIONS):
            row[f"prompt_{turn}"] = question.format(part=part, number=number + 1)
            if ignore_eos:
                row[f"output_tokens_count_{turn}"] = max_tokens
        rows.append(row)
    return rows


def hash_conversations(rows: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of conversations."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
