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

from quantkit.serve.engines.decoding import Decoder, Ended, Writer
from quantkit.serve.engines.openai_protocol import (
    BadRequest,
    CompletionRequest,
    Head,
    choice,
    delta,
    event,
    read,
    usage,
)
from quantkit.serve.gateway import errors
from quantkit.serve.gateway.request import (
    ClientDisconnected,
    RequestRejected,
    read_body,
    read_object,
)
from quantkit.serve.gateway.settings import Limits

Kind = Literal["text", "chat"]
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
    errors.tell_unknown_paths(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": decoder.name, "object": "model", "created": 0, "owned_by": "quantkit"}
        return {"object": "list", "data": [{**model, "max_model_len": decoder.context}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(request, decoder, "text")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await respond(request, decoder, "chat")

    return app


async def respond(request: Request, decoder: Decoder, kind: Kind) -> Response:
    """The answer to one request; faults of it are the API's 400."""
    try:
        body = await read_body(request.receive, dict(request.headers.raw), BODY_BYTES, BODY_SECONDS)
        ask = read(read_object(body), kind, decoder.name)
        prompts = await asyncio.to_thread(decoder.prompts, ask)
    except BadRequest as fault:
        return errors.answer(400, "invalid_request_error", str(fault))
    except RequestRejected as fault:
        return errors.answer(fault.status, fault.kind, str(fault))
    except ClientDisconnected:
        return Response(status_code=499)  # nobody reads it
    head = Head.of(kind, token_hex(12), decoder.name)
    jobs = [
        Job(index=at * ask.n + place, ids=ids, seed=None if ask.seed is None else ask.seed + place)
        for at, ids in enumerate(prompts)
        for place in range(ask.n)
    ]
    if ask.stream:
        return StreamingResponse(stream(decoder, ask, head, jobs), media_type="text/event-stream")
    work = asyncio.ensure_future(complete(decoder, ask, head, jobs))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(work.result())
    finally:
        work.cancel()
        gone.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One choice that is to be made."""

    index: int
    ids: list[int]
    seed: int | None


async def disconnected(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def complete(
    decoder: Decoder, ask: CompletionRequest, head: Head, jobs: list[Job]
) -> dict[str, Any]:
    """A whole answer."""
    choices, tokens = [], 0
    for job in jobs:
        pieces = list[str]()
        async for piece in answer(decoder, ask, job):
            if isinstance(piece, Ended):
                choices.append(choice(ask.kind, job.index, "".join(pieces), piece.reason))
                tokens += piece.tokens
            else:
                pieces.append(piece)
    return {
        **head.values(False),
        "choices": choices,
        "usage": usage(read_tokens(jobs, ask.n), tokens),
    }


async def stream(
    decoder: Decoder, ask: CompletionRequest, head: Head, jobs: list[Job]
) -> AsyncIterator[bytes]:
    """An answer as events, choice after choice."""
    tokens, values = 0, head.values(True)
    for job in jobs:
        first = True
        async for piece in answer(decoder, ask, job):
            text, reason = ("", piece.reason) if isinstance(piece, Ended) else (piece, None)
            tokens += piece.tokens if isinstance(piece, Ended) else 0
            yield event({**values, "choices": [delta(ask.kind, job.index, text, reason, first)]})
            first = False
    if ask.usage:
        yield event({**values, "choices": [], "usage": usage(read_tokens(jobs, ask.n), tokens)})
    yield event("[DONE]")


def read_tokens(jobs: list[Job], n: int) -> int:
    """Tokens of the prompts; one that is answered several times counts once, as at OpenAI."""
    return sum(len(job.ids) for job in jobs) // n


async def answer(decoder: Decoder, ask: CompletionRequest, job: Job) -> AsyncIterator[str | Ended]:
    """Text as it is made, then how it ended. Whoever stops listening stops the decoder."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | Ended | BaseException]()

    def put(value: str | Ended | BaseException) -> None:
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
            if isinstance(piece, Ended):
                return
    finally:
        stop(writer, future.cancel)


def stop(writer: Writer, cancel: Callable[[], bool]) -> None:
    """End an answer that nobody waits for, begun or not; one that ended is not touched."""
    writer.cancelled.set()
    cancel()
