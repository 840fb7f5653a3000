"""Answers of a server that is evaluated are bounded: bytes, encoding and time."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest
from support.places.raw_server import Answer, RawServer, endless, make_head, repeat

from quantkit.errors import EvaluationError
from quantkit.evaluate import openai_client
from quantkit.evaluate.openai_backend import OpenAIBackend
from quantkit.evaluate.openai_client import ServerOptions, get_served_model

BUFFERS = 100_000_000
EVENT = (
    b'data: {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": '
    b'[{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
)


class Request:
    """Stands for lm-eval's request."""

    task_name = "mine"
    args = ("prompt", {"until": [], "max_gen_toks": 5})


def send(answer: Answer, seconds: float = 30.0) -> tuple[RawServer, str]:
    """Ask a hostile server for one answer; return the server and the sentence of the refusal."""
    server = RawServer(answer)
    options = ServerOptions(url=f"{server.url}/v1", model="m", chat=False, tries=2, seconds=seconds)
    try:
        with pytest.raises(EvaluationError) as caught:
            OpenAIBackend(options, None).generate([Request()], lambda _: None)  # type: ignore[list-item]
    finally:
        server.close()
    return server, str(caught.value)


def stream(*pieces: bytes) -> Answer:
    """Return an answer that begins a stream of events and repeats the last piece for ever."""

    def answer(*_: str) -> Iterator[bytes]:
        yield make_head(Content_Type="text/event-stream")
        yield from pieces[:-1]
        yield from repeat(pieces[-1])

    return answer


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches in no time."""
    monkeypatch.setattr(openai_client, "MAX_ANSWER_BYTES", 500_000)
    monkeypatch.setattr(openai_client, "INITIAL_BACKOFF", 0.01)


@pytest.mark.parametrize(
    "answer",
    [stream(EVENT), stream(b"data: " + b"x" * 60_000), lambda *_: endless()],
    ids=["events", "one line", "no events"],
)
def test_endless_answer_is_refused_once(answer: Answer) -> None:
    """The same request would bring the same answer."""
    server, sentence = send(answer)
    assert "refused (expected at most 500,000 bytes, found more)" in sentence
    assert len(server.requests) == 1 and server.sent < BUFFERS


def test_compressed_answer_is_refused() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    server, sentence = send(lambda *_: [make_head(Content_Encoding="gzip"), bomb])
    assert "refused (expected an answer that is not compressed, found 'gzip')" in sentence
    assert b"accept-encoding: identity" in server.heads[0].lower()


def test_endless_error_is_refused() -> None:
    server, sentence = send(lambda *_: endless(status=400))
    assert "refused (expected at most 4,000,000 bytes, found more)" in sentence
    assert server.sent < BUFFERS


def test_answer_that_does_not_end_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One event after the other, each before the silence limit."""
    import time

    monkeypatch.setattr(openai_client, "MAX_ANSWER_SILENCES", 0.02)

    def answer(*_: str) -> Iterator[bytes]:
        yield make_head(Content_Type="text/event-stream")
        while True:
            time.sleep(0.01)
            yield EVENT

    _, sentence = send(answer, seconds=10.0)
    assert "no answer in 2 tries (the last: the answer took more than 0 seconds)" in sentence


def test_endless_list_of_models_is_refused() -> None:
    server = RawServer(lambda *_: endless())
    options = ServerOptions(url=f"{server.url}/v1", model="", chat=False, tries=2)
    with pytest.raises(EvaluationError, match="expected at most 500,000 bytes"):
        get_served_model(options)
    server.close()
    assert server.sent < BUFFERS
