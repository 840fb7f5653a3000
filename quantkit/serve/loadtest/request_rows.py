"""The requests of a level, one by one, from GuideLLM's results. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.artifact.loadtest_schema import (
    MAX_ANSWER_CHARACTERS,
    MAX_ANSWERS,
    Answer,
    Requests,
)


@dataclass(frozen=True, kw_only=True)
class TimedRequests:
    """The completed requests of a level, and the time in which they ran, as seconds since 1970."""

    requests: Requests
    started: float
    ended: float


def parse_requests(benchmark: Mapping[str, Any]) -> TimedRequests | None:
    """Return the completed requests; None if the results have none, as those of old versions.

    Raises KeyError, TypeError or ValueError for results in another format.
    """
    rows = [
        row
        for row in benchmark.get("requests", {}).get("successful") or ()
        if row["request_latency"] is not None
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: row["request_start_time"])
    first = float(rows[0]["request_start_time"])
    numbers: dict[object, int] = {}
    conversations = [
        numbers.setdefault(row["info"].get("conversation_id") or row["request_id"], len(numbers))
        for row in rows
    ]
    requests = Requests(
        start_s=tuple(row["request_start_time"] - first for row in rows),
        latency_ms=tuple(1000 * row["request_latency"] for row in rows),
        ttft_ms=tuple(row["time_to_first_token_ms"] for row in rows),
        inter_token_ms=tuple(row["inter_token_latency_ms"] for row in rows),
        prompt_tokens=tuple(row["prompt_tokens"] for row in rows),
        output_tokens=tuple(row["output_tokens"] for row in rows),
        cached_tokens=tuple(row.get("cached_tokens") for row in rows),
        conversation=tuple(conversations),
    )
    ends = [row["request_start_time"] + row["request_latency"] for row in rows]
    return TimedRequests(requests=requests, started=first, ended=max(ends))


def parse_answers(benchmark: Mapping[str, Any], texts: Sequence[str]) -> tuple[Answer, ...]:
    """Return the first answer to each of the prompts `texts`, in their order.

    Long answers are cut, and prompts after the first MAX_ANSWERS are left out.
    """
    numbers = {text: number for number, text in reversed([*enumerate(texts[:MAX_ANSWERS])])}
    kept: dict[int, str] = {}
    for row in benchmark.get("requests", {}).get("successful") or ():
        number = numbers.get(extract_prompt(row.get("request_args")))
        text = row.get("output")
        if number is not None and isinstance(text, str):
            kept.setdefault(number, text[:MAX_ANSWER_CHARACTERS])
    return tuple(Answer(prompt=number, text=kept[number]) for number in sorted(kept))


def extract_prompt(arguments: object) -> str:
    """Return the prompt of a request as GuideLLM records it; "" if it has no single one."""
    try:
        body = json.loads(arguments)["body"] if isinstance(arguments, str) else {}
        if isinstance(body.get("prompt"), str):
            return str(body["prompt"])
        (message,) = body["messages"]
        content = message["content"]
        return content if isinstance(content, str) else str(content[0]["text"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""
