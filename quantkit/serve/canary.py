"""A canary: prompts of the fidelity text whose log-probabilities at a server are compared with the
report's.

A server that runs another file, a wrong kernel or a wrong flag still answers fluently. Its
log-probabilities of a known text differ: by hundredths of a nat between correct kernels, by more
than quantization itself cost if something is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from quantkit.artifact.layout import TEXT_SAMPLES, TOKEN_SAMPLES
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.bounded_http import call_with_deadline
from quantkit.report.samples import read_columns
from quantkit.serve.loadtest.engine import (
    TRANSPORT_ERRORS,
    extract_message,
    make_client,
    make_headers,
    read_served_model,
)

PROMPTS, TOKENS = 4, 64
"""Prompts of the canary, and the most tokens of each."""
LEAST_BOUND = 0.1
"""Nats that correct kernels may differ by: 16-bit activations and other orders of summation."""
SECONDS = 60.0
"""Longest time of one prompt."""


@dataclass(frozen=True, kw_only=True)
class CanaryPrompt:
    """Token ids, and the report's log-probability of the tokens at `positions`, in nats."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    expected: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Canary:
    """The prompts of an artifact.

    bound: the mean absolute difference that is too large, in nats: what quantization itself moved
    the same tokens by (artifact against source), and at least LEAST_BOUND.
    """

    prompts: tuple[CanaryPrompt, ...]
    bound: float


@dataclass(frozen=True, kw_only=True)
class CanaryReading:
    """The mean absolute difference of the log-probabilities in nats, and the tokens compared."""

    difference: float
    tokens: int


def read_canary(artifact: Path) -> Canary:
    """Make the canary of an artifact from its samples.

    Raises UsageError if it has no text with its tokens, ArtifactError for damaged samples.
    """
    files = artifact / TEXT_SAMPLES, artifact / TOKEN_SAMPLES
    if not all(file.is_file() for file in files):
        raise UsageError(
            f"{artifact}: expected samples of a fidelity text ({TEXT_SAMPLES}), found none; build "
            "it with `fidelity:`, with keep_text: true for text of your own, or leave the canary "
            "out"
        )
    text = read_columns(files[0], ["sequence", "token"])
    names = ["sequence", "position", "nll_source", "nll_artifact"]
    scored = {name: column.to_numpy() for name, column in zip(
        names, read_columns(files[1], names).columns, strict=True)}  # fmt: skip
    sequences, ids = text["sequence"].to_numpy(), text["token"].to_numpy()
    numbers = np.unique(scored["sequence"])
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(PROMPTS, len(numbers))).astype(int)]
    prompts, moved = list[CanaryPrompt](), list[float]()
    for number in chosen.tolist():
        mask = (scored["sequence"] == number) & (scored["position"] < TOKENS)
        source, own = scored["nll_source"][mask], scored["nll_artifact"][mask]
        moved += np.abs(own - source).tolist()
        prompts.append(
            CanaryPrompt(
                tokens=tuple(ids[sequences == number][:TOKENS].tolist()),
                positions=tuple(scored["position"][mask].tolist()),
                expected=tuple((-own).tolist()),
            )
        )
    if not moved:
        raise UsageError(f"{artifact}: expected scored tokens in {TOKEN_SAMPLES}, found none")
    return Canary(prompts=tuple(prompts), bound=max(LEAST_BOUND, sum(moved) / len(moved)))


def ask_canary(canary: Canary, url: str, key: str = "", model: str = "") -> CanaryReading:
    """Ask a server for the log-probabilities of every prompt and compare them.

    url: its API, ending in /v1. The server needs /v1/completions with `echo` and `logprobs`, as
    vLLM and SGLang. QuantkitError if it does not answer or does not score prompts.
    """
    name = model or read_served_model(url, key)
    differences = list[float]()
    for prompt in canary.prompts:
        observed = fetch_logprobs(prompt, url, key, name)
        differences += [
            abs(observed[position] - expected)
            for position, expected in zip(prompt.positions, prompt.expected, strict=True)
        ]
    return CanaryReading(difference=sum(differences) / len(differences), tokens=len(differences))


def fetch_logprobs(prompt: CanaryPrompt, url: str, key: str, model: str) -> list[float]:
    """Return the log-probability of every token of a prompt; that of the first one is 0."""
    body = {
        "model": model, "prompt": list(prompt.tokens), "max_tokens": 1, "temperature": 0,
        "echo": True, "logprobs": 1,
    }  # fmt: skip
    address = f"{url}/completions"
    try:
        with make_client(httpx2.Timeout(SECONDS)) as client:
            post = partial(client.post, address, json=body, headers=make_headers(key))
            response = call_with_deadline(post, SECONDS)
    except TRANSPORT_ERRORS as fault:
        raise QuantkitError(f"{address}: expected a response, found none ({fault})") from None
    if response.status_code != 200:
        raise QuantkitError(
            f"{address}: expected status 200, found {response.status_code}: "
            f"{extract_message(response.text)}; the canary needs `echo` with `logprobs`"
        )
    try:
        values: Any = response.json()
        logprobs = values["choices"][0]["logprobs"]["token_logprobs"]
        observed = [0.0, *map(float, logprobs[1 : len(prompt.tokens)])]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        observed = []
    if len(observed) != len(prompt.tokens) or not all(map(isfinite, observed)):
        raise QuantkitError(
            f"{address}: expected log-probabilities of {len(prompt.tokens)} echoed tokens, found "
            f"{len(observed)}; the canary needs `echo` with `logprobs`"
        )
    return observed
