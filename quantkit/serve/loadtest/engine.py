"""What a server tells of itself: which model it serves, and how its prefix cache fares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx2

from quantkit.artifact.loadtest_schema import CacheCounters
from quantkit.errors import QuantkitError, UsageError

SECONDS = 10.0
COUNTERS: Mapping[str, tuple[str, str]] = {
    # engine -> tokens looked up, tokens found
    "vLLM": ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    "SGLang": ("sglang:prompt_tokens_total", "sglang:cached_tokens_total"),
}


def get_base_url(url: str) -> str:
    """The server's address without /v1; UsageError when it is none."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url}: expected http://HOST:PORT/v1; name the server's API")
    return url.rstrip("/").removesuffix("/v1")


def served(url: str, key: str) -> list[str]:
    """The models that a server serves; QuantkitError when it does not answer."""
    try:
        found = httpx2.get(
            f"{get_base_url(url)}/v1/models", headers=authorized(key), timeout=SECONDS
        )
        values: Any = found.json()
    except (httpx2.TransportError, ValueError) as fault:
        raise QuantkitError(
            f"{url}: expected an OpenAI-compatible server, found none ({fault}); start it"
        ) from None
    if found.status_code != 200:
        raise QuantkitError(
            f"{url}: /v1/models: status {found.status_code}; check the address and the key"
        )
    data = values.get("data") if isinstance(values, dict) else None
    return (
        [str(one.get("id")) for one in data if isinstance(one, dict)]
        if isinstance(data, list)
        else []
    )


def read_served_model(url: str, key: str) -> str:
    """The one model that a server serves; QuantkitError when it does not answer, UsageError when it serves more."""
    names = served(url, key)
    if len(names) != 1:
        raise UsageError(
            f"{url}: expected one served model, found {', '.join(names) or 'none'}; name one with --model"
        )
    return names[0]


def check_answers(url: str, key: str, path: str, body: Mapping[str, Any], seconds: float) -> None:
    """Ask for a stream and leave at its beginning; QuantkitError with what the server says where it begins none."""
    timeout = httpx2.Timeout(seconds, connect=SECONDS)
    try:
        with httpx2.stream(
            "POST", url + path, json=dict(body), headers=authorized(key), timeout=timeout
        ) as found:
            if found.status_code == 200:
                return
            found.read()
    except httpx2.TransportError as fault:
        raise QuantkitError(
            f"{url}{path}: expected an answer, found none ({fault}); start the server"
        ) from None
    names = list[str]()
    with suppress(QuantkitError):
        names = served(url, key)
    raise QuantkitError(
        f"{url}{path}: expected an answer, found status {found.status_code}: {said(found.text)}; ask for what it "
        f"serves ({', '.join(names) or 'it tells no models'})"
    )


def said(text: str) -> str:
    """The message in a server's fault, or its beginning where it has another shape than OpenAI's."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(text)["error"]["message"])[:300]
    return " ".join(text.split())[:300] or "nothing"


def authorized(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def check_metrics(url: str) -> None:
    """QuantkitError where an address that was named tells no counters."""
    if scraped(url) is None:
        raise QuantkitError(
            f"--metrics {url}: expected an engine's /metrics, found none; check the address"
        )


def read_cache_counters(url: str) -> CacheCounters | None:
    """The prefix cache's counters so far; None where the server tells none (or has no /metrics)."""
    text = scraped(url)
    return None if text is None else counted(text)


def scraped(url: str) -> str | None:
    """What a server's /metrics says; None where there is none."""
    try:
        found = httpx2.get(f"{url.rstrip('/').removesuffix('/metrics')}/metrics", timeout=SECONDS)
    except httpx2.TransportError:
        return None
    return found.text if found.status_code == 200 else None


def counted(text: str) -> CacheCounters | None:
    """The counters in a text of Prometheus, summed over a server's engines."""
    for asked, hits in COUNTERS.values():
        found = {name: total(text, name) for name in (asked, hits)}
        if found[asked] is not None:
            return CacheCounters(asked=found[asked] or 0.0, hits=found[hits] or 0.0)
    return None


def total(text: str, name: str) -> float | None:
    """The sum of a counter's samples; None without any. A sample is NAME{LABELS} VALUE."""
    values = [
        line.rpartition(" ")[2]
        for line in text.splitlines()
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ")
    ]
    try:
        return sum(map(float, values)) if values else None
    except ValueError:
        return None


def during(before: CacheCounters | None, after: CacheCounters | None) -> CacheCounters | None:
    """What happened between two readings; None when the server was started anew between them."""
    if before is None or after is None or after.asked < before.asked or after.hits < before.hits:
        return None
    return CacheCounters(asked=after.asked - before.asked, hits=after.hits - before.hits)
