"""Servers with OpenAI's API (vLLM, SGLang, managed services) as a backend.

The official client sends requests; this module decides when to retry and which answers count.
Answers are streamed, so that `seconds` limits the silence of a server and not the length of an
answer. A stream that ends without a finish reason is incomplete and counts for nothing. Each
complete answer is reported exactly once.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from quantkit.errors import EvaluationError, UnsuitedError, UsageError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood
from quantkit.io.bounded_http import IDENTITY, MAX_VALUES, ResponseLimits, make_async_hook
from quantkit.io.retry import ResponseRefused, TransientError

Answer = TypeVar("Answer")

MAX_STOP_STRINGS = 4  # OpenAI's own limit; the rest are applied to the complete answer
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
    key_variable: the environment variable with the API key, which is never shown.
    """

    url: str
    model: str
    chat: bool
    concurrency: int = 16
    tries: int = 8
    seconds: float = 600.0
    key_variable: str = "OPENAI_API_KEY"

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
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"--endpoint: expected http://HOST:PORT/v1, found {url!r}; name the server's API"
        )
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "--endpoint: expected no user, password or query in the address; keys come from the "
            "environment"
        )
    return url.rstrip("/")


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


class OpenAIBackend:
    """A server as a backend.

    tokenizer: the model's own; needed for likelihoods, and to count tokens if the server reports no
    usage.
    """

    def __init__(self, server: ServerOptions, tokenizer: Any | None) -> None:
        self._server, self._tokenizer = server, tokenizer

    def generate(
        self,
        requests: Sequence[Instance],
        on_answers: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """Generate one answer per request; `on_answers` is called with each one."""
        asyncio.run(
            _run_requests(
                self._server,
                [*requests],
                self._generate_answer,
                lambda index, answer: on_answers([(index, answer)]),
            )
        )

    def compute_likelihoods(
        self,
        requests: Sequence[Instance],
        on_answers: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """Compute (log probability, is greedy) per request from an echoed prompt."""
        if self._server.chat:
            raise UnsuitedError(
                f"{requests[0].task_name}: it compares likelihoods, which the chat API does not "
                "return; leave out --chat-template"
            )
        if self._tokenizer is None:
            raise UnsuitedError(
                f"{requests[0].task_name}: it compares likelihoods, which needs the model's "
                "tokenizer; name the folder of the artifact"
            )
        asyncio.run(
            _run_requests(
                self._server,
                [*requests],
                self._compute_likelihood,
                lambda index, answer: on_answers([(index, answer)]),
            )
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages themselves: the server applies its template."""
        return json.dumps(chat_history, ensure_ascii=False)

    async def _generate_answer(self, client: AsyncOpenAI, request: Instance) -> GeneratedAnswer:
        params = GenerationParams.from_kwargs(request.args[1], request.task_name)
        body: dict[str, Any] = {
            "model": self._server.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if params.until:
            body["stop"] = [*params.until[:MAX_STOP_STRINGS]]
        if self._server.chat:
            stream = await client.chat.completions.create(
                messages=json.loads(request.args[0]), **body
            )
        else:
            stream = await client.completions.create(prompt=request.args[0], **body)
        pieces, finish_reason, usage = list[str](), None, None
        async with stream:
            async for chunk in stream:
                usage = chunk.usage.completion_tokens if chunk.usage else usage
                # some servers send a chunk with usage and no choices
                for choice in chunk.choices or ():
                    piece = choice.delta.content if self._server.chat else choice.text
                    pieces.append(piece or "")
                    finish_reason = choice.finish_reason or finish_reason
        if finish_reason is None:
            raise IncompleteStreamError("the stream ended before the answer did")
        text = "".join(pieces)
        n_tokens = usage if usage is not None else self._count_tokens(text)
        for string in params.until:
            text = text.split(string)[0]
        return GeneratedAnswer(text=text, n_tokens=n_tokens, truncated=finish_reason == "length")

    async def _compute_likelihood(self, client: AsyncOpenAI, request: Instance) -> LogLikelihood:
        context, continuation = self._encode(*request.args)
        response = await client.completions.create(
            model=self._server.model,
            prompt=[*context, *continuation],
            max_tokens=1,
            temperature=0,
            logprobs=1,
            echo=True,
        )
        is_completion = isinstance(response, openai.types.Completion) and bool(response.choices)
        logprobs = response.choices[0].logprobs if is_completion else None
        n_tokens = len(context) + len(continuation) + 1
        token_count = len(logprobs.token_logprobs or ()) if logprobs else 0
        top_count = len(logprobs.top_logprobs or ()) if logprobs else 0
        if token_count != n_tokens or top_count != n_tokens:
            raise UnsuitedError(
                f"{self._server.url}: expected log probabilities of {n_tokens - 1} echoed tokens "
                f"and one more, found {token_count}; this server cannot score likelihoods"
            )
        likelihood: LogLikelihood = LocalCompletionsAPI.parse_logprobs(
            [response.model_dump()], ctxlens=[len(context)]
        )[0]
        return likelihood

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize both; trailing spaces of the context go to the continuation, as in lm-eval."""
        assert self._tokenizer is not None
        stripped = context.rstrip()
        context_ids = list(self._tokenizer(stripped).input_ids) if stripped else []
        ids = list(self._tokenizer(context + continuation).input_ids)
        if not context_ids:  # a prediction needs a preceding token
            bos = self._tokenizer.bos_token_id
            context_ids = [self._tokenizer.eos_token_id if bos is None else bos]
            ids = ids if ids[0] == context_ids[0] else [*context_ids, *ids]
        return ids[: len(context_ids)], ids[len(context_ids) :]

    def _count_tokens(self, text: str) -> int:
        if self._tokenizer is None:
            return 0
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)


async def _run_requests(
    server: ServerOptions,
    requests: list[Instance],
    run: Callable[[AsyncOpenAI, Instance], Awaitable[Answer]],
    on_answer: Callable[[int, Answer], None],
) -> None:
    """Run every request, `concurrency` at a time.

    After a failure no further request starts; answers to requests in progress are kept.
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
                    errors.append(UnsuitedError(f"{request.task_name}: {error}"))
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
                    f"{server.url}: refused ({message}); correct it, then continue with --resume"
                ) from None
            if attempt == server.tries:
                raise EvaluationError(
                    f"{server.url}: no answer in {attempt} tries (the last: {message}); complete "
                    "answers are kept: continue with --resume"
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
