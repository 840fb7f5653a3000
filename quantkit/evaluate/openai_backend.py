"""Servers with OpenAI's API as a backend; see `openai_client`.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from openai import AsyncOpenAI

from quantkit.errors import UnsuitedError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood
from quantkit.evaluate.openai_client import ServerOptions, run_requests, stream_answer

MAX_STOP_STRINGS = 4  # OpenAI's own limit; the rest are applied to the complete answer


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
            run_requests(
                self._server,
                [*requests],
                self._generate_answer,
                lambda index, answer: on_answers([(index, answer)]),
                _get_task_name,
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
            run_requests(
                self._server,
                [*requests],
                self._compute_likelihood,
                lambda index, answer: on_answers([(index, answer)]),
                _get_task_name,
            )
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages themselves: the server applies its template."""
        return json.dumps(chat_history, ensure_ascii=False)

    async def _generate_answer(self, client: AsyncOpenAI, request: Instance) -> GeneratedAnswer:
        params = GenerationParams.from_kwargs(request.args[1], request.task_name)
        settings: dict[str, Any] = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        if params.until:
            settings["stop"] = [*params.until[:MAX_STOP_STRINGS]]
        prompt = json.loads(request.args[0]) if self._server.chat else request.args[0]
        answer = await stream_answer(client, self._server, prompt, settings)
        text = answer.text
        n_tokens = answer.usage if answer.usage is not None else self._count_tokens(text)
        for string in params.until:
            text = text.split(string)[0]
        return GeneratedAnswer(
            text=text, n_tokens=n_tokens, truncated=answer.finish_reason == "length"
        )

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


def _get_task_name(request: Instance) -> str:
    return str(request.task_name)
