"""Data from a server itself: the model it serves, and the counters of its prefix cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from math import isfinite
from typing import Any

import httpx2

from quantkit.artifact.loadtest_schema import CacheCounters
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.bounded_http import (
    IDENTITY,
    MAX_VALUES,
    ResponseLimits,
    bound_response,
    call_with_deadline,
)
from quantkit.io.retry import ResponseRefused, TransientError

TIMEOUT_SECONDS = 10.0
COUNTERS: Mapping[str, tuple[str, str]] = {
    "vLLM": ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    "SGLang": ("sglang:prompt_tokens_total", "sglang:cached_tokens_total"),
}
"""Engine -> the counters of queried tokens and of cache hits."""


ANSWER = ResponseLimits(n_bytes=4_000_000, n_values=MAX_VALUES, seconds=30.0)
"""A list of models, an error, or metrics: vLLM's have 100 kB for each engine."""
TRANSPORT_ERRORS = (httpx2.TransportError, TransientError, ResponseRefused)


def make_client(timeout: httpx2.Timeout | float = TIMEOUT_SECONDS) -> httpx2.Client:
    """Return a client whose answers are bounded."""
    hooks: dict[str, list[Callable[..., Any]]] = {
        "response": [partial(bound_response, default=ANSWER)]
    }
    return httpx2.Client(timeout=timeout, headers=IDENTITY, event_hooks=hooks)


def fetch(url: str, headers: Mapping[str, str]) -> httpx2.Response:
    """Return the answer to a GET request; raises one of TRANSPORT_ERRORS."""
    with make_client() as client:
        get = partial(client.get, url, headers=dict(headers))
        return call_with_deadline(get, 2 * (ANSWER.seconds or TIMEOUT_SECONDS))


def get_base_url(url: str) -> str:
    """Return the server's address without /v1; UsageError if it is not an address."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: expected http://HOST:PORT/v1; name the server's API")
    return url.rstrip("/").removesuffix("/v1")


def list_models(url: str, key: str) -> list[str]:
    """Return the models of a server; QuantkitError if it does not answer."""
    try:
        response = fetch(f"{get_base_url(url)}/v1/models", make_headers(key))
        values: Any = response.json()
    except (*TRANSPORT_ERRORS, ValueError, RecursionError) as fault:
        raise QuantkitError(
            f"{url}: expected an OpenAI-compatible server, found none ({fault}); start it"
        ) from None
    if response.status_code != 200:
        raise QuantkitError(
            f"{url}: /v1/models: expected status 200, found {response.status_code}; check the "
            "address and the key"
        )
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, list):
        return []
    return [str(entry.get("id")) for entry in data if isinstance(entry, dict)]


def read_served_model(url: str, key: str) -> str:
    """Return the only model of a server.

    Raises QuantkitError if it does not answer, UsageError if it has several models or none.
    """
    names = list_models(url, key)
    if len(names) != 1:
        raise UsageError(
            f"{url}: expected one served model, found {', '.join(names) or 'none'}; name one with "
            "--model"
        )
    return names[0]


def check_endpoint(url: str, key: str, path: str, body: Mapping[str, Any], seconds: float) -> None:
    """Check that a request succeeds; close its stream at the start.

    Raises QuantkitError with the server's message otherwise.
    """
    timeout = httpx2.Timeout(seconds, connect=TIMEOUT_SECONDS)
    try:
        with make_client(timeout) as client:
            request = client.build_request(
                "POST", url + path, json=dict(body), headers=make_headers(key)
            )
            response = call_with_deadline(
                partial(client.send, request, stream=True), seconds + TIMEOUT_SECONDS
            )
            with closing(response):
                if response.status_code == 200:
                    return
                response.read()
    except TRANSPORT_ERRORS as fault:
        raise QuantkitError(
            f"{url}{path}: expected a response, found none ({fault}); start the server"
        ) from None
    names = list[str]()
    with suppress(QuantkitError):
        names = list_models(url, key)
    raise QuantkitError(
        f"{url}{path}: expected status 200, found {response.status_code}: "
        f"{extract_message(response.text)}; request a model that it serves "
        f"({', '.join(names) or 'it lists none'})"
    )


def extract_message(text: str) -> str:
    """Return the message of an error in OpenAI's format, or the start of any other text."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"]["message"])[:300]
    return " ".join(text.split())[:300] or "no message"


def make_headers(key: str) -> dict[str, str]:
    """Return the headers of a request with an API key; none for ""."""
    return {"authorization": f"Bearer {key}"} if key else {}


def check_metrics(url: str, option: str) -> None:
    """Check that the address of an option has metrics, if it has one; QuantkitError otherwise."""
    if url and scrape_metrics(url) is None:
        owner = "a DCGM exporter's" if option == "--gpu-metrics" else "an engine's"
        raise QuantkitError(
            f"{option} {url}: expected {owner} /metrics, found none; check the address"
        )


def read_cache_counters(url: str) -> CacheCounters | None:
    """Return the counters of the prefix cache; None if the server has none."""
    text = scrape_metrics(url)
    return None if text is None else parse_cache_counters(text)


def scrape_metrics(url: str) -> str | None:
    """Return the text of a server's /metrics, or None."""
    try:
        base = url.rstrip("/").removesuffix("/metrics")
        response = fetch(f"{base}/metrics", {})
    except TRANSPORT_ERRORS:
        return None
    return response.text if response.status_code == 200 else None


def parse_cache_counters(text: str) -> CacheCounters | None:
    """Return the counters in Prometheus' text, summed over a server's engines."""
    for queries, hits in COUNTERS.values():
        sums = {name: sum_samples(text, name) for name in (queries, hits)}
        if sums[queries] is not None:
            return CacheCounters(asked=sums[queries] or 0.0, hits=sums[hits] or 0.0)
    return None


def sum_samples(text: str, name: str) -> float | None:
    """Return the sum of a counter's samples; None without any."""
    values = list_samples(text, name)
    return sum(values) if values else None


def list_samples(text: str, name: str) -> list[float]:
    """Return the values of a metric's samples, NAME{LABELS} VALUE [TIMESTAMP]; others are skipped.

    A label may hold spaces and braces; the text after the last brace is the value.
    """
    values = list[float]()
    for line in text.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " "):
            words = line[len(name) :].rpartition("}")[2].split()
            with suppress(ValueError, IndexError):
                value = float(words[0])
                values += [value] if isfinite(value) else []
    return values


def subtract_counters(
    before: CacheCounters | None, after: CacheCounters | None
) -> CacheCounters | None:
    """Return the difference of two readings; None if the server was restarted between them."""
    if before is None or after is None or after.asked < before.asked or after.hits < before.hits:
        return None
    return CacheCounters(asked=after.asked - before.asked, hits=after.hits - before.hits)
