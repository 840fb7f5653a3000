"""Answers of the server under a load test are bounded."""

from __future__ import annotations

import gzip

import pytest
from support.places.raw_server import Answer, RawServer, endless, make_head

from quantkit.errors import QuantkitError
from quantkit.serve.loadtest import engine

BUFFERS = 60_000_000
BOMB = gzip.compress(bytes(10_000_000))


@pytest.mark.parametrize(
    "answer",
    [lambda *_: endless(), lambda *_: [make_head(Content_Encoding="gzip"), BOMB]],
    ids=["endless", "compressed"],
)
def test_hostile_server_is_one_sentence(answer: Answer) -> None:
    """For the list of models, the metrics, and the error of the first request."""
    server = RawServer(answer)
    try:
        with pytest.raises(QuantkitError, match="expected an OpenAI-compatible server, found none"):
            engine.list_models(server.url, "")
        assert engine.scrape_metrics(server.url) is None
        assert server.sent < BUFFERS
    finally:
        server.close()


def test_endless_error_is_one_sentence() -> None:
    server = RawServer(lambda *_: endless(status=500))
    try:
        with pytest.raises(QuantkitError, match=r"expected a response, found none \(expected at"):
            engine.check_endpoint(server.url, "", "/v1/completions", {"prompt": "x"}, 10)
        assert server.sent < BUFFERS
    finally:
        server.close()
