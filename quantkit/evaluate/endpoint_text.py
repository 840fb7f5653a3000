"""Text sampled through an endpoint with OpenAI's API that serves the model to be quantized."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

from openai import AsyncOpenAI

from quantkit.errors import CalibrationError, EvaluationError
from quantkit.evaluate.openai_client import (
    ServerOptions,
    StreamedAnswer,
    run_requests,
    stream_answer,
)
from quantkit.evaluate.prompt_text import PromptRenderer, make_message
from quantkit.texts.self_text import SampledText, Sampling, TextRequest

SEED_BITS = 31
"""Bits of a request's seed that every server accepts."""


class EndpointTextGenerator:
    """Samples texts through a server. Its answers arrive in any order and are independent."""

    def __init__(
        self, server: ServerOptions, renderer: PromptRenderer, sampling: Sampling, group_size: int
    ) -> None:
        self.group_size = group_size
        self._server, self._renderer, self._sampling = server, renderer, sampling

    def close(self) -> None:
        """Do nothing: connections end with each group."""

    def generate(
        self,
        group: Sequence[TextRequest],
        needed: Collection[int],
        on_text: Callable[[SampledText], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        """Send the requests that are needed. Raises CalibrationError if the server gives up."""
        requests = [request for request in group if request.index in needed]

        def report(number: int, answer: StreamedAnswer) -> None:
            sample = self._make_text(requests[number], answer)
            on_text(sample)
            on_tokens(sample.n_tokens)

        try:
            asyncio.run(
                run_requests(self._server, requests, self._send, report, lambda _: "sampling text")
            )
        except ExceptionGroup as group_error:  # of `report`: the disk refused a record
            raise group_error.exceptions[0] from None
        except EvaluationError as error:
            raise CalibrationError(f"calibration.endpoint: {error}") from None

    async def _send(self, client: AsyncOpenAI, request: TextRequest) -> StreamedAnswer:
        prompt: Any = [make_message(request.prompt)]
        if not self._server.chat:
            prompt = self._renderer.render_prompt(request.prompt)
        settings = {
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "seed": request.seed % 2**SEED_BITS,
        }
        return await stream_answer(client, self._server, prompt, settings)

    def _make_text(self, request: TextRequest, answer: StreamedAnswer) -> SampledText:
        ended = answer.finish_reason == "stop"
        content, reasoning = (
            text.encode("utf-8", "replace").decode() for text in (answer.text, answer.reasoning)
        )
        if self._server.chat:
            text, start = self._renderer.render_answer(
                request.prompt, reasoning, content, ended=ended
            )
        else:
            prompt = self._renderer.render_prompt(request.prompt)
            text, start = prompt + content, len(prompt)
        n_tokens = answer.usage if answer.usage is not None else self._count(reasoning + content)
        return SampledText(
            index=request.index, text=text, start=start, n_tokens=n_tokens, ended=ended
        )

    def _count(self, text: str) -> int:
        tokenizer = self._renderer.tokenizer
        return len(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
