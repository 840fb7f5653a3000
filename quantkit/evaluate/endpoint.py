"""Any server that speaks OpenAI's API (vLLM, SGLang, a managed one) as a model that lm-eval's tasks can ask.

The official client speaks; this module decides when to ask again and which answer counts. Answers are streamed, so
that `seconds` bounds a server's silence and not the length of an answer; a stream that ends without a finish reason was
cut and counts for nothing. Nothing is told as finished but a whole answer, and that once.

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
from openai import AsyncOpenAI

from quantkit.errors import EvaluationError, UnsuitedError, UsageError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood

Result = TypeVar("Result")

MOST_STOPS = 4  # OpenAI's own limit; all of them are applied to the answer afterwards
FIRST_WAIT = 0.5  # seconds before the second try, doubled with each one
LONGEST_WAIT = 60.0
_NO_KEY = "none"  # a server of one's own asks for no key, the client for a word
_AGAIN = (408, 409, 425, 429)
_UNFIT = (400, 413, 422)


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where and how to ask. seconds: of silence before a request is given up; tries: of one request in all.

    `key_variable` names the environment variable with the API key, which is never shown.
    """

    url: str
    model: str
    chat: bool
    concurrency: int = 16
    tries: int = 8
    seconds: float = 600.0
    key_variable: str = "OPENAI_API_KEY"

    def client(self) -> AsyncOpenAI:
        """The client for one event loop. It does not ask again by itself: a broken stream has to be asked again too."""
        return AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get(self.key_variable) or _NO_KEY,
            max_retries=0,
            timeout=self.seconds,
        )

    def hidden(self, text: object) -> str:
        """What a server said, on one line and without the key."""
        said = " ".join(str(text).split())[:300]
        key = os.environ.get(self.key_variable)
        return said.replace(key, "***") if key else said


class CutError(Exception):
    """A stream that ended before its answer did."""


def checked_url(url: str) -> str:
    """An endpoint as it may be written into results; UsageError when it is none or holds a secret."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"--endpoint: expected http://HOST:PORT/v1, found {url!r}; name the server's API"
        )
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "--endpoint: expected no user, password or query in the address; keys come from the environment"
        )
    return url.rstrip("/")


def served_model(server: Server) -> str:
    """The one model that a server serves; UsageError when it serves another number of them."""

    async def ask() -> list[str]:
        async with server.client() as client:
            found = await _patiently(server, lambda: client.models.list())
            return [
                model.id for model in getattr(found, "data", None) or ()
            ]  # a page of another program has none

    names = asyncio.run(ask())
    if len(names) != 1:
        shown = ", ".join(names[:8]) or "none"
        raise UsageError(
            f"{server.url}: expected one served model, found {shown}; name one with --model"
        )
    return names[0]


class Endpoint:
    """A server as a backend. tokenizer: the model's own, needed for likelihoods and where no usage is told."""

    def __init__(self, server: Server, tokenizer: Any | None) -> None:
        self._server, self._tokenizer = server, tokenizer

    def generate(
        self,
        requests: Sequence[Instance],
        finished: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """An answer per request, told one by one."""
        asyncio.run(
            _each(
                self._server, [*requests], self._answer, lambda at, answer: finished([(at, answer)])
            )
        )

    def likelihoods(
        self,
        requests: Sequence[Instance],
        finished: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """(log probability, greedy) per request, told one by one, from the echoed prompt's log probabilities."""
        if self._server.chat:
            raise UnsuitedError(
                f"{requests[0].task_name}: it compares likelihoods, which no chat tells; leave out --chat-template"
            )
        if self._tokenizer is None:
            raise UnsuitedError(
                f"{requests[0].task_name}: it compares likelihoods, which needs the model's tokenizer; name the folder "
                "of the artifact"
            )
        asyncio.run(
            _each(
                self._server,
                [*requests],
                self._likelihood,
                lambda at, found: finished([(at, found)]),
            )
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages themselves: the server applies its template."""
        return json.dumps(chat_history, ensure_ascii=False)

    async def _answer(self, client: AsyncOpenAI, request: Instance) -> GeneratedAnswer:
        rules = GenerationParams.of(request.args[1], request.task_name)
        shared: dict[str, Any] = {
            "model": self._server.model, "max_tokens": rules.max_tokens, "temperature": rules.temperature,
            "top_p": rules.top_p, "seed": rules.seed, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if rules.until:
            shared["stop"] = [*rules.until[:MOST_STOPS]]
        if self._server.chat:
            stream = await client.chat.completions.create(
                messages=json.loads(request.args[0]), **shared
            )
        else:
            stream = await client.completions.create(prompt=request.args[0], **shared)
        pieces, reason, tokens = list[str](), None, None
        async with stream:
            async for chunk in stream:
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in (
                    chunk.choices or ()
                ):  # some servers send a chunk of usage alone without any
                    pieces.append(
                        (choice.delta.content if self._server.chat else choice.text) or ""
                    )
                    reason = choice.finish_reason or reason
        if reason is None:
            raise CutError("the stream ended before the answer did")
        text = "".join(pieces)
        length = tokens if tokens is not None else self._tokens(text)
        for string in rules.until:
            text = text.split(string)[0]
        return GeneratedAnswer(text=text, n_tokens=length, truncated=reason == "length")

    async def _likelihood(self, client: AsyncOpenAI, request: Instance) -> LogLikelihood:
        context, continuation = self._encoded(*request.args)
        reply = await client.completions.create(
            model=self._server.model, prompt=[*context, *continuation], max_tokens=1, temperature=0, logprobs=1,
            echo=True,
        )  # fmt: skip
        told = (
            reply.choices[0].logprobs
            if isinstance(reply, openai.types.Completion) and reply.choices
            else None
        )
        n_tokens = len(context) + len(continuation) + 1
        if (
            told is None
            or len(told.token_logprobs or ()) != n_tokens
            or len(told.top_logprobs or ()) != n_tokens
        ):
            raise UnsuitedError(
                f"{self._server.url}: expected log probabilities of {n_tokens - 1} echoed tokens and one more, found "
                f"{len(told.token_logprobs or ()) if told else 0}; this server cannot score likelihoods"
            )
        found: LogLikelihood = LocalCompletionsAPI.parse_logprobs(
            [reply.model_dump()], ctxlens=[len(context)]
        )[0]
        return found

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where lm-eval splits: blanks at the end of the context belong to the continuation."""
        assert self._tokenizer is not None
        blanks = len(context) - len(context.rstrip())
        kept = context[: len(context) - blanks]
        before = list(self._tokenizer(kept).input_ids) if kept else []
        whole = list(self._tokenizer(context + continuation).input_ids)
        if not before:  # a prediction needs a token in front
            first = self._tokenizer.bos_token_id
            before = [self._tokenizer.eos_token_id if first is None else first]
            whole = whole if whole[0] == before[0] else [*before, *whole]
        return whole[: len(before)], whole[len(before) :]

    def _tokens(self, text: str) -> int:
        return (
            len(self._tokenizer(text, add_special_tokens=False).input_ids)
            if self._tokenizer is not None
            else 0
        )


async def _each(
    server: Server,
    requests: list[Instance],
    ask: Callable[[AsyncOpenAI, Instance], Awaitable[Result]],
    finished: Callable[[int, Result], None],
) -> None:
    """Ask every request, `concurrency` at once. After a failure nothing new is asked, what is under way is kept."""
    waiting, faults = iter(enumerate(requests)), list[Exception]()
    async with server.client() as client:

        async def work() -> None:
            for at, request in waiting:
                if faults:
                    return
                try:
                    finished(at, await _patiently(server, partial(ask, client, request)))
                except UnsuitedError as fault:
                    faults.append(UnsuitedError(f"{request.task_name}: {fault}"))
                    return
                except EvaluationError as fault:
                    faults.append(fault)
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(min(server.concurrency, len(requests))):
                group.create_task(work())
    if faults:
        raise faults[0]


async def _patiently(server: Server, ask: Callable[[], Awaitable[Result]]) -> Result:
    """The reply, asked for again while the server is busy, broken or not there; EvaluationError when it stays so.

    Between tries: what Retry-After says, else exponentially longer, with jitter so that a crowd comes back spread out.
    """
    for attempt in range(1, server.tries + 1):
        try:
            return await ask()
        except (openai.APIError, CutError, json.JSONDecodeError) as fault:
            if _unfit(fault):
                raise UnsuitedError(
                    f"{server.url} refused a request ({server.hidden(fault)})"
                ) from None
            if not _worth_again(fault):
                raise EvaluationError(
                    f"{server.url}: refused ({server.hidden(fault)}); correct it, then continue with --resume"
                ) from None
            if attempt == server.tries:
                raise EvaluationError(
                    f"{server.url}: no answer in {attempt} tries (the last: {server.hidden(fault)}); what was answered "
                    "is kept: continue with --resume"
                ) from None
            await asyncio.sleep(_pause(fault, attempt))
    raise AssertionError("unreachable: the last try returns or raises")


def _unfit(fault: Exception) -> bool:
    """Whether it is this request that a server refuses, such as a prompt that is too long, and not whoever asks."""
    if not isinstance(fault, openai.APIStatusError) or fault.status_code not in _UNFIT:
        return False
    return fault.param != "model" and fault.code != "model_not_found"


def _worth_again(fault: Exception) -> bool:
    if isinstance(fault, openai.APIStatusError):
        spent = getattr(fault, "code", None) == "insufficient_quota"
        return (fault.status_code in _AGAIN or fault.status_code >= 500) and not spent
    return True  # no connection, silence, a cut stream, an error told inside a stream


def _pause(fault: Exception, attempt: int) -> float:
    """Seconds to wait after a failed try."""
    if isinstance(fault, openai.APIStatusError):
        told = fault.response.headers.get("retry-after", "")
        with suppress(ValueError):
            return min(max(float(told), 0.0), 10 * LONGEST_WAIT)
        with suppress(ValueError, TypeError):
            return min(
                max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0), 10 * LONGEST_WAIT
            )
    return float(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0))
