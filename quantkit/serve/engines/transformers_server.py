"""transformers behind OpenAI's API: `quantkit.load` reads every artifact, so every artifact can be asked on a laptop.

`transformers serve` (5.23) was tried first: it cannot load AWQ, GPTQ or NF4 experts, lists the hub's cache instead of
the model, sends no [DONE], ignores stream_options and goes on generating for clients that left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from quantkit.serve.engines.decoding import Completion, Decoder, TextStreamer
from quantkit.serve.engines.openai_protocol import (
    BadRequest,
    CompletionRequest,
    ResponseHeader,
    format_event,
    make_choice,
    make_delta,
    make_usage,
    parse_request,
)
from quantkit.serve.gateway import errors
from quantkit.serve.gateway.request import (
    ClientDisconnected,
    RequestRejected,
    parse_object,
    read_body,
)
from quantkit.serve.gateway.settings import Limits

RequestKind = Literal["text", "chat"]
BODY_BYTES, BODY_SECONDS = Limits().body_bytes, Limits().body_seconds
"""Largest and slowest request, as the gateway has it."""


def make_app(decoder: Decoder) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        decoder.close()

    app = FastAPI(
        title="quantkit, transformers engine", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    errors.register_error_handler(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": decoder.name, "object": "model", "created": 0, "owned_by": "quantkit"}
        return {"object": "list", "data": [{**model, "max_model_len": decoder.context}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await handle_request(request, decoder, "text")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await handle_request(request, decoder, "chat")

    return app


async def handle_request(request: Request, decoder: Decoder, kind: RequestKind) -> Response:
    """The answer to one request; faults of it are the API's 400."""
    try:
        body = await read_body(request.receive, dict(request.headers.raw), BODY_BYTES, BODY_SECONDS)
        ask = parse_request(parse_object(body), kind, decoder.name)
        prompts = await asyncio.to_thread(decoder.prompts, ask)
    except BadRequest as fault:
        return errors.make_error_response(400, "invalid_request_error", str(fault))
    except RequestRejected as fault:
        return errors.make_error_response(fault.status, fault.kind, str(fault))
    except ClientDisconnected:
        return Response(status_code=499)  # nobody reads it
    head = ResponseHeader.of(kind, token_hex(12), decoder.name)
    jobs = [
        ChoiceTask(
            index=at * ask.n + place, ids=ids, seed=None if ask.seed is None else ask.seed + place
        )
        for at, ids in enumerate(prompts)
        for place in range(ask.n)
    ]
    if ask.stream:
        return StreamingResponse(
            iterate_events(decoder, ask, head, jobs), media_type="text/event-stream"
        )
    work = asyncio.ensure_future(make_response(decoder, ask, head, jobs))
    gone = asyncio.ensure_future(wait_for_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(work.result())
    finally:
        work.cancel()
        gone.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceTask:
    """One choice that is to be made."""

    index: int
    ids: list[int]
    seed: int | None


async def wait_for_disconnect(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def make_response(
    decoder: Decoder, ask: CompletionRequest, head: ResponseHeader, jobs: list[ChoiceTask]
) -> dict[str, Any]:
    """A whole answer."""
    choices, tokens = [], 0
    for job in jobs:
        pieces = list[str]()
        async for piece in iterate_text(decoder, ask, job):
            if isinstance(piece, Completion):
                choices.append(make_choice(ask.kind, job.index, "".join(pieces), piece.reason))
                tokens += piece.tokens
            else:
                pieces.append(piece)
    return {
        **head.values(False),
        "choices": choices,
        "usage": make_usage(count_prompt_tokens(jobs, ask.n), tokens),
    }


async def iterate_events(
    decoder: Decoder, ask: CompletionRequest, head: ResponseHeader, jobs: list[ChoiceTask]
) -> AsyncIterator[bytes]:
    """An answer as events, choice after choice."""
    tokens, values = 0, head.values(True)
    for job in jobs:
        first = True
        async for piece in iterate_text(decoder, ask, job):
            text, reason = ("", piece.reason) if isinstance(piece, Completion) else (piece, None)
            tokens += piece.tokens if isinstance(piece, Completion) else 0
            yield format_event({
                **values,
                "choices": [make_delta(ask.kind, job.index, text, reason, first)],
            })
            first = False
    if ask.usage:
        yield format_event({
            **values,
            "choices": [],
            "usage": make_usage(count_prompt_tokens(jobs, ask.n), tokens),
        })
    yield format_event("[DONE]")


def count_prompt_tokens(jobs: list[ChoiceTask], n: int) -> int:
    """Tokens of the prompts; one that is answered several times counts once, as at OpenAI."""
    return sum(len(job.ids) for job in jobs) // n


async def iterate_text(
    decoder: Decoder, ask: CompletionRequest, job: ChoiceTask
) -> AsyncIterator[str | Completion]:
    """Text as it is made, then how it ended. Whoever stops listening stops the decoder."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | Completion | BaseException]()

    def put(value: str | Completion | BaseException) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, value)

    writer, future = decoder.start(job.ids, ask, job.seed, put)
    future.add_done_callback(
        lambda done: put(done.exception() or done.result()) if not done.cancelled() else None
    )
    try:
        while True:
            piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, Completion):
                return
    finally:
        cancel_task(writer, future.cancel)


def cancel_task(writer: TextStreamer, cancel: Callable[[], bool]) -> None:
    """End an answer that nobody waits for, begun or not; one that ended is not touched."""
    writer.cancelled.set()
    cancel()
