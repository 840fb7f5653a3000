"""What a request to OpenAI's completions and chat API means, and what the answers look like. Pure.

What cannot be honoured is refused by name, never ignored: an answer that looks right and is not is worse than none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI and vLLM have it
MAX_STOPS, MAX_CHOICES = 16, 16
_IGNORED = {
    "user",
    "metadata",
    "store",
    "priority",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
_NEUTRAL: Mapping[str, Any] = {
    "echo": False, "logprobs": None, "best_of": 1, "suffix": None, "logit_bias": None, "presence_penalty": 0,
    "frequency_penalty": 0, "tools": None, "tool_choice": "none", "response_format": None, "top_logprobs": None,
    "parallel_tool_calls": None, "functions": None, "function_call": None, "audio": None, "modalities": None,
}  # fmt: skip
_SUPPORTED = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n",
    "stream", "stream_options", "ignore_eos",
}  # fmt: skip


class BadRequest(Exception):
    """A request that is wrong or asks for what this engine does not do; the API's 400."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A request. prompts: texts or token ids, one for chat; max_tokens None: up to the context's end."""

    kind: Literal["text", "chat"]
    prompts: tuple[str | list[int], ...]
    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    usage: bool  # told at a stream's end
    ignore_eos: bool  # as vLLM and SGLang have it: load tests ask for answers of one length


def parse_request(
    values: Mapping[str, Any], kind: Literal["text", "chat"], served: str
) -> CompletionRequest:
    """A request's meaning; Misasked with the first thing that is wrong."""
    check_parameters(values)
    if values.get("model", served) != served:
        raise BadRequest(f"model: expected {served!r}, found {values['model']!r}")
    options = values.get("stream_options") or {}
    stop = values.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise BadRequest(f"stop: expected a text or up to {MAX_STOPS} texts, found {stop!r}")
    tokens = values.get("max_completion_tokens")
    if tokens is None:
        tokens = values.get("max_tokens")
    if tokens is None and kind == "text":
        tokens = DEFAULT_TOKENS
    if tokens is not None and (
        isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1
    ):
        raise BadRequest(f"max_tokens: expected a number from 1, found {tokens!r}")
    return CompletionRequest(
        kind=kind,
        prompts=parse_prompts(values.get("prompt")) if kind == "text" else (),
        messages=parse_messages(values.get("messages")) if kind == "chat" else (),
        max_tokens=tokens,
        temperature=parse_number(values, "temperature", 1.0, 0.0, 2.0),
        top_p=parse_number(values, "top_p", 1.0, 1e-6, 1.0),
        seed=parse_integer(values, "seed", None, 0, 2**63 - 1),
        stop=tuple(stops),
        n=parse_integer(values, "n", 1, 1, MAX_CHOICES) or 1,
        stream=bool(values.get("stream")),
        usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        ignore_eos=bool(values.get("ignore_eos")),
    )


def check_parameters(values: Mapping[str, Any]) -> None:
    """Refuse what is not known, and what is known but changes answers in a way that this engine does not."""
    for name, value in values.items():
        if name in _NEUTRAL and value not in (None, _NEUTRAL[name], [], {}):
            raise BadRequest(f"{name}: this engine does not do that; serve with vLLM or SGLang")
        if name not in _SUPPORTED | _IGNORED | _NEUTRAL.keys():
            raise BadRequest(f"{name}: unknown; known: {', '.join(sorted(_SUPPORTED))}")


def parse_prompts(prompt: Any) -> tuple[str | list[int], ...]:
    """One or several prompts, as texts or as token ids."""
    several = (
        prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        else [prompt]
    )
    for one in several:
        ids = (
            isinstance(one, list)
            and one
            and all(isinstance(i, int) and not isinstance(i, bool) for i in one)
        )
        if not isinstance(one, str) and not ids:
            raise BadRequest("prompt: expected a text, token ids, or a list of either")
    return tuple(several)


def parse_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """Messages with their content as text; parts of type text are joined."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list with at least one message")
    made = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{where}: expected an object with role and content")
        content = message.get("content")
        if isinstance(content, list):
            texts = [
                part.get("text")
                for part in content
                if isinstance(part, Mapping) and part.get("type") == "text"
            ]
            content = "".join(map(str, texts)) if len(texts) == len(content) else None
        if not isinstance(content, str):
            raise BadRequest(f"{where}.content: expected text; this engine reads nothing else")
        made.append({**message, "content": content})
    return tuple(made)


def parse_number(
    values: Mapping[str, Any], name: str, default: float, least: float, most: float
) -> float:
    """A number within its range."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadRequest(f"{name}: expected a number from {least:g} to {most:g}, found {value!r}")
    return float(value)


def parse_integer(
    values: Mapping[str, Any], name: str, default: int | None, least: int, most: int
) -> int | None:
    """A whole number within its range."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"{name}: expected a whole number from {least} to {most}, found {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseHeader:
    """What every part of an answer repeats."""

    kind: Literal["text", "chat"]
    identity: str
    model: str
    created: int

    @staticmethod
    def of(kind: Literal["text", "chat"], identity: str, model: str) -> ResponseHeader:
        return ResponseHeader(kind=kind, identity=identity, model=model, created=int(time.time()))

    def values(self, stream: bool) -> dict[str, Any]:
        """The fields themselves."""
        chat = "chat.completion.chunk" if stream else "chat.completion"
        name = chat if self.kind == "chat" else "text_completion"
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.identity}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }


def make_choice(
    kind: Literal["text", "chat"], index: int, text: str, reason: str | None
) -> dict[str, Any]:
    """A choice of a complete answer."""
    said = {"text": text} if kind == "text" else {"message": {"role": "assistant", "content": text}}
    return {"index": index, **said, "logprobs": None, "finish_reason": reason}


def make_delta(
    kind: Literal["text", "chat"], index: int, text: str, reason: str | None, first: bool
) -> dict[str, Any]:
    """A choice of one event."""
    if kind == "text":
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    said = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return {"index": index, "delta": said, "logprobs": None, "finish_reason": reason}


def make_usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def format_event(values: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
