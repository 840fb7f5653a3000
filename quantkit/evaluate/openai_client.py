"""The client of servers with OpenAI's API (vLLM, SGLang, managed services).

The official client sends requests; this module decides when to retry and which answers count.
Answers are streamed, so that `seconds` limits the silence of a server and not the length of an
answer. A stream that ends without a finish reason is incomplete and counts for nothing. Each
complete answer is reported exactly once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from quantkit.errors import EvaluationError, UnsuitedError, UsageError
from quantkit.io.bounded_http import IDENTITY, MAX_VALUES, ResponseLimits, make_async_hook
from quantkit.io.endpoint_url import normalize_endpoint_url
from quantkit.io.retry import ResponseRefused, TransientError

Request = TypeVar("Request")
Answer = TypeVar("Answer")

INITIAL_BACKOFF = 0.5  # seconds before the second try, doubled with each further one
MAX_BACKOFF = 60.0
MAX_ANSWER_BYTES = 16_000_000
"""Bytes of one answer: 64,000 tokens as a stream, or 100,000 echoed tokens with probabilities."""
MAX_ANSWER_SILENCES = 20
"""Longest answer in units of `seconds`, the longest silence; over three hours by default."""
_NO_KEY = "none"  # a local server needs no key, but the client needs a string
_RETRYABLE_STATUS = (408, 409, 425, 429)
_UNSUITED_STATUS = (400, 413, 422)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Address and request settings of a server.

    seconds: silence after which a request is given up; tries: of one request in total;
    key_variable: the environment variable with the API key, which is never shown; resume: how to
    continue after a failure, for its message.
    """

    url: str
    model: str
    chat: bool
    concurrency: int = 16
    tries: int = 8
    seconds: float = 600.0
    key_variable: str = "OPENAI_API_KEY"
    resume: str = "continue with --resume"

    def make_client(self) -> AsyncOpenAI:
        """Create the client for one event loop.

        It does not retry by itself: it would miss broken streams.
        """
        limits = ResponseLimits(
            n_bytes=MAX_ANSWER_BYTES,
            n_values=MAX_VALUES,
            seconds=MAX_ANSWER_SILENCES * self.seconds,
            bytes_per_second=0,  # a model computes between two tokens
        )
        return AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get(self.key_variable) or _NO_KEY,
            max_retries=0,
            timeout=self.seconds,
            default_headers=IDENTITY,
            http_client=DefaultAsyncHttpxClient(
                timeout=self.seconds, event_hooks={"response": [make_async_hook(limits)]}
            ),
        )

    def redact(self, text: object) -> str:
        """Return a server's message on one line and without the key."""
        line = " ".join(str(text).split())[:300]
        key = os.environ.get(self.key_variable)
        return line.replace(key, "***") if key else line


class IncompleteStreamError(Exception):
    """A stream that ended before its answer did."""


def normalize_url(url: str) -> str:
    """Return an endpoint's URL as results may record it.

    Raises UsageError if it is none or has a secret.
    """
    try:
        return normalize_endpoint_url(url)
    except ValueError as error:
        raise UsageError(f"--endpoint: {error}") from None


def get_served_model(server: ServerOptions) -> str:
    """Return the name of the one model that a server has.

    Raises UsageError if it has none or several.
    """

    async def list_models() -> list[str]:
        async with server.make_client() as client:
            page = await _retry(server, lambda: client.models.list())
            # the page of another program has no data
            return [model.id for model in getattr(page, "data", None) or ()]

    names = asyncio.run(list_models())
    if len(names) != 1:
        raise UsageError(
            f"{server.url}: expected one served model, found {', '.join(names[:8]) or 'none'}; "
            "name one with --model"
        )
    return names[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedAnswer:
    """A complete answer. reasoning: the thoughts before it; usage: new tokens."""

    text: str
    reasoning: str
    finish_reason: str
    usage: int | None


async def stream_answer(
    client: AsyncOpenAI, server: ServerOptions, prompt: Any, settings: Mapping[str, Any]
) -> StreamedAnswer:
    """Send one request and read its stream. prompt: messages for the chat API, else text.

    Raises IncompleteStreamError if the stream ends before the answer does.
    """
    body = {
        "model": server.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **settings,
    }
    if server.chat:
        stream = await client.chat.completions.create(messages=prompt, **body)
    else:
        stream = await client.completions.create(prompt=prompt, **body)
    pieces, thoughts, finish_reason, usage = list[str](), list[str](), None, None
    async with stream:
        async for chunk in stream:
            usage = chunk.usage.completion_tokens if chunk.usage else usage
            # some servers send a chunk with usage and no choices
            for choice in chunk.choices or ():
                piece = choice.delta.content if server.chat else choice.text
                pieces.append(piece or "")
                thoughts.append(_read_reasoning(choice.delta) if server.chat else "")
                finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        raise IncompleteStreamError("the stream ended before the answer did")
    return StreamedAnswer(
        text="".join(pieces),
        reasoning="".join(thoughts),
        finish_reason=str(finish_reason),
        usage=usage,
    )


def _read_reasoning(delta: object) -> str:
    """Return a piece of reasoning: a field outside OpenAI's API, whose name depends on the
    server.
    """
    pieces = (getattr(delta, name, None) for name in ("reasoning_content", "reasoning"))
    return next((piece for piece in pieces if isinstance(piece, str)), "")


async def run_requests(
    server: ServerOptions,
    requests: Sequence[Request],
    run: Callable[[AsyncOpenAI, Request], Awaitable[Answer]],
    on_answer: Callable[[int, Answer], None],
    get_name: Callable[[Request], str],
) -> None:
    """Run every request, `concurrency` at a time.

    After a failure no further request starts; answers to requests in progress are kept. get_name:
    names a request that the server refuses.
    """
    pending, errors = iter(enumerate(requests)), list[Exception]()
    async with server.make_client() as client:

        async def work() -> None:
            for index, request in pending:
                if errors:
                    return
                try:
                    on_answer(index, await _retry(server, partial(run, client, request)))
                except UnsuitedError as error:
                    errors.append(UnsuitedError(f"{get_name(request)}: {error}"))
                    return
                except EvaluationError as error:
                    errors.append(error)
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(min(server.concurrency, len(requests))):
                group.create_task(work())
    if errors:
        raise errors[0]


async def _retry(server: ServerOptions, send: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return the response; retry while the server is busy, broken or unreachable.

    Between tries: Retry-After if the server sends it, else exponential backoff with jitter, so that
    many clients do not return at once. Raises EvaluationError after the last try.
    """
    for attempt in range(1, server.tries + 1):
        try:
            async with asyncio.timeout(2 * MAX_ANSWER_SILENCES * server.seconds):
                return await send()
        except (
            openai.APIError,
            IncompleteStreamError,
            json.JSONDecodeError,
            TransientError,
            ResponseRefused,
            TimeoutError,
        ) as error:
            message = server.redact(describe_error(error))
            if _is_unsuited(error):
                raise UnsuitedError(f"{server.url} refused a request ({message})") from None
            if not _is_retryable(error):
                raise EvaluationError(
                    f"{server.url}: refused ({message}); correct it, then {server.resume}"
                ) from None
            if attempt == server.tries:
                raise EvaluationError(
                    f"{server.url}: no answer in {attempt} tries (the last: {message}); complete "
                    f"answers are kept: {server.resume}"
                ) from None
            await asyncio.sleep(_compute_backoff(error, attempt))
    raise AssertionError("unreachable: the last try returns or raises")


def describe_error(error: Exception) -> str:
    """Return the message of an error, with its cause where the client hides it."""
    if isinstance(error, TimeoutError):
        return "no answer within the time limit"
    refused = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
    return str(refused if isinstance(refused, TransientError | ResponseRefused) else error)


def _is_unsuited(error: Exception) -> bool:
    """Return whether the server refuses this request (a long prompt), not the client."""
    if not isinstance(error, openai.APIStatusError) or error.status_code not in _UNSUITED_STATUS:
        return False
    return error.param != "model" and error.code != "model_not_found"


def _is_retryable(error: Exception) -> bool:
    if isinstance(error, ResponseRefused) or isinstance(error.__cause__, ResponseRefused):
        return False
    if isinstance(error, openai.APIStatusError):
        is_out_of_quota = getattr(error, "code", None) == "insufficient_quota"
        is_temporary = error.status_code in _RETRYABLE_STATUS or error.status_code >= 500
        return is_temporary and not is_out_of_quota
    return True  # no connection, silence, an incomplete stream, an error inside a stream


def _compute_backoff(error: Exception, attempt: int) -> float:
    """Return the seconds to wait after a failed try."""
    if isinstance(error, openai.APIStatusError):
        header, longest = error.response.headers.get("retry-after", ""), 10 * MAX_BACKOFF
        with suppress(ValueError):
            return min(max(float(header), 0.0), longest)
        with suppress(ValueError, TypeError):
            wait = parsedate_to_datetime(header).timestamp() - time.time()
            return min(max(wait, 0.0), longest)
    backoff = min(INITIAL_BACKOFF * 2 ** (attempt - 1), MAX_BACKOFF)
    return float(backoff * random.uniform(0.5, 1.0))
