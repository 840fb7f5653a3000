"""transformers with OpenAI's API: `quantkit.load` reads every artifact, so a laptop can serve it.

`transformers serve` (5.23) was tried first: it cannot load AWQ, GPTQ or NF4 experts, lists the
hub's cache instead of the model, sends no [DONE], ignores stream_options, and continues generating
after a client disconnected.
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
from quantkit.serve.gateway.bodies import read_body
from quantkit.serve.gateway.errors import ClientDisconnected, RequestRejected
from quantkit.serve.gateway.request import parse_object
from quantkit.serve.gateway.settings import Limits

RequestKind = Literal["text", "chat"]
BODY_BYTES, BODY_SECONDS = Limits().body_bytes, Limits().body_seconds
"""Largest body, and longest time to receive it: the gateway's defaults."""


def make_app(decoder: Decoder) -> FastAPI:
    """Make the application."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        decoder.close()

    app = FastAPI(
        title="quantkit, transformers engine", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    errors.register_error_handler(app)

    @app.get("/health")
    async def get_health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        model = {"id": decoder.name, "object": "model", "created": 0, "owned_by": "quantkit"}
        return {"object": "list", "data": [{**model, "max_model_len": decoder.context}]}

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return await handle_request(request, decoder, "text")

    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await handle_request(request, decoder, "chat")

    return app


async def handle_request(http_request: Request, decoder: Decoder, kind: RequestKind) -> Response:
    """Serve one request; an invalid one gets status 400."""
    try:
        headers = dict(http_request.headers.raw)
        body = await read_body(http_request.receive, headers, BODY_BYTES, BODY_SECONDS)
        request = parse_request(parse_object(body), kind, decoder.name)
        prompts = await asyncio.to_thread(decoder.encode_prompts, request)
    except BadRequest as fault:
        return errors.make_error_response(400, "invalid_request_error", str(fault))
    except RequestRejected as fault:
        return errors.make_error_response(fault.status, fault.kind, str(fault))
    except ClientDisconnected:
        return Response(status_code=499)  # no client reads it
    header = ResponseHeader.create(kind, token_hex(12), decoder.name)
    tasks = [
        ChoiceTask(
            index=prompt * request.n + n,
            ids=ids,
            seed=None if request.seed is None else request.seed + n,
        )
        for prompt, ids in enumerate(prompts)
        for n in range(request.n)
    ]
    if request.stream:
        events = iterate_events(decoder, request, header, tasks)
        return StreamingResponse(events, media_type="text/event-stream")
    response = asyncio.ensure_future(make_response(decoder, request, header, tasks))
    disconnect = asyncio.ensure_future(wait_for_disconnect(http_request))
    try:
        await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not response.done():
            return Response(status_code=499)  # no client reads it
        return JSONResponse(response.result())
    finally:
        response.cancel()
        disconnect.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceTask:
    """A choice to generate: its index in the response, its prompt and its seed."""

    index: int
    ids: list[int]
    seed: int | None


async def wait_for_disconnect(http_request: Request) -> None:
    """Wait until the client disconnects."""
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def make_response(
    decoder: Decoder, request: CompletionRequest, header: ResponseHeader, tasks: list[ChoiceTask]
) -> dict[str, Any]:
    """Generate a complete response."""
    choices, tokens = [], 0
    for task in tasks:
        pieces = list[str]()
        async for piece in iterate_text(decoder, request, task):
            if isinstance(piece, Completion):
                text = "".join(pieces)
                choices.append(make_choice(request.kind, task.index, text, piece.reason))
                tokens += piece.tokens
            else:
                pieces.append(piece)
    return {
        **header.to_json(is_stream=False),
        "choices": choices,
        "usage": make_usage(count_prompt_tokens(tasks, request.n), tokens),
    }


async def iterate_events(
    decoder: Decoder, request: CompletionRequest, header: ResponseHeader, tasks: list[ChoiceTask]
) -> AsyncIterator[bytes]:
    """Yield a response as events, choice by choice."""
    tokens, values = 0, header.to_json(is_stream=True)
    for task in tasks:
        is_first = True
        async for piece in iterate_text(decoder, request, task):
            text, reason = ("", piece.reason) if isinstance(piece, Completion) else (piece, None)
            tokens += piece.tokens if isinstance(piece, Completion) else 0
            delta = make_delta(request.kind, task.index, text, reason, is_first)
            yield format_event({**values, "choices": [delta]})
            is_first = False
    if request.include_usage:
        usage = make_usage(count_prompt_tokens(tasks, request.n), tokens)
        yield format_event({**values, "choices": [], "usage": usage})
    yield format_event("[DONE]")


def count_prompt_tokens(tasks: list[ChoiceTask], n: int) -> int:
    """Count the tokens of the prompts; a prompt with several choices counts once, as at OpenAI."""
    return sum(len(task.ids) for task in tasks) // n


async def iterate_text(
    decoder: Decoder, request: CompletionRequest, task: ChoiceTask
) -> AsyncIterator[str | Completion]:
    """Yield text as it is generated, then the Completion. Closing it stops the decoder."""
    loop = asyncio.get_running_loop()
    queue = asyncio.Queue[str | Completion | BaseException]()

    def put(value: str | Completion | BaseException) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, value)

    streamer, future = decoder.submit(task.ids, request, task.seed, put)
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
        cancel_task(streamer, future.cancel)


def cancel_task(streamer: TextStreamer, cancel: Callable[[], bool]) -> None:
    """Cancel a completion, started or not; without effect on a finished one."""
    streamer.cancelled.set()
    cancel()
