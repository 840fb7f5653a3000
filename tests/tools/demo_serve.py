"""Serve an artifact behind the gateway on this machine, ask it with OpenAI's own client, and stop it.

    python -m tools.demo_serve ARTIFACT

Completion, chat, streaming, stop strings, usage, a seed, a request that is refused, a client that leaves. Exits with 1
when an answer is not what the API promises.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from quantkit.serve.engines.engine_process import find_free_port, is_responding

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"
START_SECONDS = 600  # vLLM on a CPU takes minutes


@contextmanager
def serve_artifact(artifact: str, *options: str) -> Iterator[str]:
    """`quantkit serve` in a process of its own, until it is ready; the address of its API. It must end by itself.

    artifact: a folder, or the address of a server.
    """
    port = find_free_port()
    words = [sys.executable, "-m", "quantkit", "serve", artifact, "--port", str(port), *options]
    started = subprocess.Popen(words)
    try:
        end = time.monotonic() + START_SECONDS
        ready = "ready" if "--gateway" in options else "health"
        while not is_responding(f"http://127.0.0.1:{port}/{ready}"):
            if started.poll() is not None or time.monotonic() > end:
                sys.exit(f"{' '.join(words)}: did not get ready")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started.send_signal(signal.SIGTERM)
        code = started.wait(90)
    if code != 128 + signal.SIGTERM:
        sys.exit(f"{' '.join(words)}: ended with {code}, not by the signal")


def print_result(what: str, found: object) -> None:
    sys.stdout.write(f"{what:12} {found!r}\n")


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"not what the API promises: {what}")


def send_requests(client: openai.OpenAI) -> None:
    """One of each, checked."""
    model = client.models.list().data[0].id
    print_result("model", model)
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=48, temperature=0)
    text, usage = whole.choices[0].text, whole.usage
    print_result("completion", text)
    check(
        usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
        "usage adds up",
    )
    print_result("usage", usage.model_dump(exclude_none=True) if usage else None)

    parts, told, reason = [], None, None
    options = {"include_usage": True}
    for chunk in client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options=options,
    ):
        told = chunk.usage or told
        for choice in chunk.choices:
            parts.append(choice.text)
            reason = choice.finish_reason or reason
    print_result("streamed", parts[:6] + ["..."])
    check(
        "".join(parts) == text and len(parts) > 5,
        "a stream says the same as a whole answer, in pieces",
    )
    check(
        told == usage and reason == whole.choices[0].finish_reason,
        "and tells the same usage and reason",
    )

    word = text.split()[2]
    stopped = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=48, temperature=0, stop=[word]
    )
    print_result(f"stop {word!r}", stopped.choices[0].text)
    check(
        stopped.choices[0].text == text[: text.index(word)],
        "a stop string ends the answer and is no part of it",
    )
    check(stopped.choices[0].finish_reason == "stop", "and is told as the reason")

    messages = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, temperature=0
    )
    print_result("chat", chat.choices[0].message.content)
    check(
        chat.choices[0].message.role == "assistant" and bool(chat.choices[0].message.content),
        "chat answers",
    )
    drawn = [
        client.completions
        .create(model=model, prompt=PROMPT, max_tokens=16, temperature=1.0, seed=7)
        .choices[0]
        .text
        for _ in range(2)
    ]
    check(drawn[0] == drawn[1], "one seed, one answer")
    try:
        client.completions.create(model=model, prompt=PROMPT, max_tokens=100_000)
        check(False, "too long a request is refused")
    except openai.BadRequestError as refused:
        print_result("refused", refused.message[:90])
    leave(client, model)


def leave(client: openai.OpenAI, model: str) -> None:
    """A client that leaves in the middle costs nobody time: the next answer comes at once."""
    stream = client.completions.create(
        model=model,
        prompt="a",
        max_tokens=500,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    began = time.monotonic()
    client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
    print_result("left; next", f"{time.monotonic() - began:.2f} s")


def main(artifact: str) -> None:
    with serve_artifact(artifact, "--engine", "transformers", "--gateway") as url:
        send_requests(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120))
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
            text = answer.read().decode()
    told = [
        line for line in text.splitlines() if line.startswith("quantkit_gateway_requests_total")
    ]
    for line in told:
        print_result("metrics", line)
    check(any('outcome="left"' in line for line in told), "the gateway saw the client leave")


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    main(sys.argv[1])
