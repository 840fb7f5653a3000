"""Serve an artifact through the gateway, send requests with OpenAI's own client, and stop it.

    PYTHONPATH=tests python -m tools.demo_serve ARTIFACT

Completion, chat, streaming, stop strings, usage, a seed, a rejected request, a client that
disconnects. Exits with 1 if a response violates the API.
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
from pathlib import Path

import openai

from quantkit.serve.engines.engine_process import find_free_port, is_responding

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?\nAnswer:"
START_SECONDS = 600  # vLLM on a CPU takes minutes


@contextmanager
def serve_artifact(artifact: str | Path, *options: str) -> Iterator[str]:
    """Run `quantkit serve` in its own process; yield the address of its API once it is ready.

    artifact: a folder, or the address of a server. The process must exit by SIGTERM.
    """
    port = find_free_port()
    serve = [sys.executable, "-m", "quantkit", "serve", str(artifact)]
    command = [*serve, "--port", str(port), *options]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        ready = "ready" if "--gateway" in options else "health"
        while not is_responding(f"http://127.0.0.1:{port}/{ready}"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{' '.join(command)}: not ready in time")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
    if code != 128 + signal.SIGTERM:
        sys.exit(f"{' '.join(command)}: exited with {code}, not by SIGTERM")


def print_result(name: str, value: object) -> None:
    sys.stdout.write(f"{name:12} {value!r}\n")


def check(condition: bool, promise: str) -> None:
    if not condition:
        sys.exit(f"API violation, expected: {promise}")


def send_requests(client: openai.OpenAI) -> None:
    """Send one request of each kind and check its response."""
    model = client.models.list().data[0].id
    print_result("model", model)
    completion = client.completions.create(model=model, prompt=PROMPT, max_tokens=48, temperature=0)
    text, usage = completion.choices[0].text, completion.usage
    print_result("completion", text)
    check(
        usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens,
        "usage adds up",
    )
    print_result("usage", usage.model_dump(exclude_none=True) if usage else None)

    parts, streamed_usage, reason = [], None, None
    options = {"include_usage": True}
    for chunk in client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options=options,
    ):
        streamed_usage = chunk.usage or streamed_usage
        for choice in chunk.choices:
            parts.append(choice.text)
            reason = choice.finish_reason or reason
    print_result("streamed", parts[:6] + ["..."])
    check(
        "".join(parts) == text and len(parts) > 5,
        "a streamed answer equals the complete one",
    )
    check(
        streamed_usage == usage and reason == completion.choices[0].finish_reason,
        "a stream has the same usage and finish reason",
    )

    word = text.split()[2]
    stopped = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=48, temperature=0, stop=[word]
    )
    print_result(f"stop {word!r}", stopped.choices[0].text)
    check(
        stopped.choices[0].text == text[: text.index(word)],
        "a stop string ends the answer and is not part of it",
    )
    check(stopped.choices[0].finish_reason == "stop", "the finish reason is stop")

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
        check(False, "a request that is too long is rejected")
    except openai.BadRequestError as rejection:
        print_result("rejected", rejection.message[:90])
    disconnect(client, model)


def disconnect(client: openai.OpenAI, model: str) -> None:
    """Close a stream early; the next answer must not wait for it."""
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
    start = time.monotonic()
    client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
    print_result("after close", f"{time.monotonic() - start:.2f} s")


def main(artifact: str) -> None:
    with serve_artifact(artifact, "--engine", "transformers", "--gateway") as url:
        send_requests(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120))
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
            text = answer.read().decode()
    lines = [
        line for line in text.splitlines() if line.startswith("quantkit_gateway_requests_total")
    ]
    for line in lines:
        print_result("metrics", line)
    check(
        any('outcome="left"' in line for line in lines),
        "the gateway counts the disconnected client",
    )


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    main(sys.argv[1])
