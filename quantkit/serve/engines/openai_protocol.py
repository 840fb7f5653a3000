"""Requests and responses of OpenAI's completions and chat API. Pure.

A parameter that cannot be honoured is rejected by name and never ignored: a plausible but wrong
completion is worse than an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_TOKENS = 16  # of /v1/completions, as in OpenAI's API and vLLM
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
    "echo": False, "logprobs": None, "best_of": 1, "suffix": None, "logit_bias": None,
    "presence_penalty": 0, "frequency_penalty": 0, "tools": None, "tool_choice": "none",
    "response_format": None, "top_logprobs": None, "parallel_tool_calls": None, "functions": None,
    "function_call": None, "audio": None, "modalities": None,
}  # fmt: skip
"""Parameters that are accepted only with a value that changes nothing."""
_SUPPORTED = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "n", "stream", "stream_options", "ignore_eos",
}  # fmt: skip


class BadRequest(Exception):
    """An invalid or unsupported request; status 400."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A validated request.

    prompts: texts or token ids; empty for chat. max_tokens: None for the rest of the context.
    include_usage: send the usage as the last event of a stream. ignore_eos: as in vLLM and SGLang;
    load tests request completions of one length.
    """

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
    include_usage: bool
    ignore_eos: bool


def parse_request(
    values: Mapping[str, Any], kind: Literal["text", "chat"], served_model: str
) -> CompletionRequest:
    """Validate a request; BadRequest names the first invalid parameter."""
    check_parameters(values)
    if values.get("model", served_model) != served_model:
        raise BadRequest(f"model: expected {served_model!r}, found {values['model']!r}")
    options = values.get("stream_options") or {}
    return CompletionRequest(
        kind=kind,
        prompts=parse_prompts(values.get("prompt")) if kind == "text" else (),
        messages=parse_messages(values.get("messages")) if kind == "chat" else (),
        max_tokens=parse_max_tokens(values, kind),
        temperature=parse_number(values, "temperature", 1.0, 0.0, 2.0),
        top_p=parse_number(values, "top_p", 1.0, 1e-6, 1.0),
        seed=parse_integer(values, "seed", None, 0, 2**63 - 1),
        stop=parse_stops(values.get("stop")),
        n=parse_integer(values, "n", 1, 1, MAX_CHOICES) or 1,
        stream=bool(values.get("stream")),
        include_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        ignore_eos=bool(values.get("ignore_eos")),
    )


def check_parameters(values: Mapping[str, Any]) -> None:
    """Check that every parameter is known, and that unsupported ones have a neutral value."""
    for name, value in values.items():
        if name in _NEUTRAL and value not in (None, _NEUTRAL[name], [], {}):
            raise BadRequest(f"{name}: not supported by this engine; serve with vLLM or SGLang")
        if name not in _SUPPORTED | _IGNORED | _NEUTRAL.keys():
            raise BadRequest(f"{name}: unknown; known: {', '.join(sorted(_SUPPORTED))}")


def parse_stops(stop: Any) -> tuple[str, ...]:
    """Return the stop strings of a request."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and text for text in stops)
    ):
        raise BadRequest(f"stop: expected a text or up to {MAX_STOPS} texts, found {stop!r}")
    return tuple(stops)


def parse_max_tokens(values: Mapping[str, Any], kind: Literal["text", "chat"]) -> int | None:
    """Return the limit of generated tokens; None for the rest of the context."""
    tokens = values.get("max_completion_tokens")
    if tokens is None:
        tokens = values.get("max_tokens")
    if tokens is None:
        return DEFAULT_TOKENS if kind == "text" else None
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise BadRequest(f"max_tokens: expected a number from 1, found {tokens!r}")
    return tokens


def parse_prompts(prompt: Any) -> tuple[str | list[int], ...]:
    """Return one or several prompts, as texts or token ids."""
    is_batch = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = prompt if is_batch else [prompt]
    for entry in prompts:
        is_token_ids = (
            isinstance(entry, list)
            and entry
            and all(isinstance(token, int) and not isinstance(token, bool) for token in entry)
        )
        if not isinstance(entry, str) and not is_token_ids:
            raise BadRequest("prompt: expected a text, token ids, or a list of either")
    return tuple(prompts)


def parse_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the messages with their content as text; parts of type text are joined."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list with at least one message")
    parsed = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
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
            raise BadRequest(f"{where}.content: expected text, the only supported content")
        parsed.append({**message, "content": content})
    return tuple(parsed)


def parse_number(
    values: Mapping[str, Any], name: str, default: float, minimum: float, maximum: float
) -> float:
    """Return a number within its range."""
    value = values.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not minimum <= value <= maximum
    ):
        raise BadRequest(
            f"{name}: expected a number from {minimum:g} to {maximum:g}, found {value!r}"
        )
    return float(value)


def parse_integer(
    values: Mapping[str, Any], name: str, default: int | None, minimum: int, maximum: int
) -> int | None:
    """Return an integer within its range."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise BadRequest(
            f"{name}: expected an integer from {minimum} to {maximum}, found {value!r}"
        )
    return value


# -------------------------------------------------------------------------------------- responses


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseHeader:
    """The fields that every part of a response repeats."""

    kind: Literal["text", "chat"]
    request_id: str
    model: str
    created: int

    @staticmethod
    def create(kind: Literal["text", "chat"], request_id: str, model: str) -> ResponseHeader:
        """Make a header with the current time."""
        return ResponseHeader(
            kind=kind, request_id=request_id, model=model, created=int(time.time())
        )

    def to_json(self, *, is_stream: bool) -> dict[str, Any]:
        """Return the fields."""
        chat = "chat.completion.chunk" if is_stream else "chat.completion"
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": chat if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
        }


def make_choice(
    kind: Literal["text", "chat"], index: int, text: str, reason: str | None
) -> dict[str, Any]:
    """Return a choice of a complete response."""
    content = (
        {"text": text} if kind == "text" else {"message": {"role": "assistant", "content": text}}
    )
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def make_delta(
    kind: Literal["text", "chat"], index: int, text: str, reason: str | None, is_first: bool
) -> dict[str, Any]:
    """Return a choice of one event of a stream."""
    if kind == "text":
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
    content = {"role": "assistant"} if is_first else {}
    content |= {"content": text} if text or is_first else {}
    return {"index": index, "delta": content, "logprobs": None, "finish_reason": reason}


def make_usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the usage: tokens of the prompts and of the completions."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def format_event(values: Mapping[str, Any] | str) -> bytes:
    """Format a server-sent event."""
    text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
