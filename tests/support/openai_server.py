"""An HTTP server with OpenAI's API on loopback that fails as configured and records every request.

Answers are a function of the prompt. Faults are a function of (prompt, how often it was asked):
"429", "500", "drop" (no response at all), "cut" (the connection breaks inside the stream), "end"
(the stream ends politely before its answer does), "error" (an error inside the stream), "slow"
(pieces with pauses), "silent" (nothing for a long time), "html" (a page of another program).
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RETRY_AFTER = 0.5  # seconds
SILENCE = 2.0


@dataclass
class Record:
    """One request: time, prompt, body, and its outcome ("served" or the fault)."""

    at: float
    prompt: str
    body: dict
    fault: str
    is_over: bool = False


@dataclass
class Server:
    """`with Server(...) as server:` listens on `server.url`."""

    answer: Callable[[str, dict], str]
    fault: Callable[[str, int], str] = lambda prompt, nth: ""
    pause: float = 0.0
    piece: int = 3  # characters
    models: Sequence[str] = ("tiny",)
    key: str = ""
    reasoning: Callable[[str, dict], str] | None = None  # before the answer, of the chat API
    # tokens -> of each but the first: its log probability, and that of the most probable token
    # there
    logprobs: Callable[[list[int]], list[tuple[float, float]]] | None = None
    records: list[Record] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0

    def __enter__(self) -> Server:
        self.lock, self.asked = threading.Lock(), Counter()
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def count_served(self) -> Counter:
        """Return how often each prompt was answered completely."""
        return Counter(
            record.prompt for record in self.records if record.fault in ("served", "slow")
        )


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: Server
    record: Record | None = None
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(
            200,
            {
                "object": "list",
                "data": [{"id": name, "object": "model"} for name in self.owner.models],
            },
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path.endswith("/chat/completions")
        prompt = json.dumps(body["messages"]) if chat else body["prompt"]
        name = prompt if isinstance(prompt, str) else json.dumps(prompt)
        owner = self.owner
        with owner.lock:
            fault = owner.fault(name, owner.asked[name])
            owner.asked[name] += 1
            record = Record(at=time.monotonic(), prompt=name, body=body, fault=fault or "pending")
            owner.records.append(record)
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        self.record = record
        try:
            time.sleep(owner.pause)
            self.respond(body, prompt, chat, fault)
        except (BrokenPipeError, ConnectionResetError):
            record.fault = fault or "pending"
        finally:
            self.complete()
            self.record = None

    def complete(self) -> None:
        """Count a request as answered: before the client can see the end of the answer."""
        if record := self.record:
            with self.owner.lock:
                if not record.is_over:
                    record.is_over = True
                    self.owner.at_once -= 1

    def mark_served(self) -> None:
        """Record a complete answer without a fault, before its end is sent."""
        if self.record and self.record.fault == "pending":
            self.record.fault = "served"
        self.complete()

    def respond(self, body: dict, prompt: str | list[int], chat: bool, fault: str) -> None:
        if self.owner.key and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            said = self.headers.get("Authorization", "")
            self.reply(
                401,
                {
                    "error": {
                        "message": f"Incorrect API key provided: {said}",
                        "code": "invalid_api_key",
                    }
                },
            )
        elif fault == "429":
            self.reply(
                429, {"error": {"message": "too many requests"}}, {"Retry-After": str(RETRY_AFTER)}
            )
        elif fault in ("500", "503", "400"):
            self.reply(int(fault), {"error": {"message": "something broke"}})
        elif fault == "long":
            self.reply(
                400,
                {
                    "error": {
                        "message": "maximum context length is 512 tokens",
                        "code": 400,
                        "param": None,
                    }
                },
            )
        elif fault == "unknown":
            self.reply(
                400,
                {
                    "error": {
                        "message": "no such model",
                        "code": "model_not_found",
                        "param": "model",
                    }
                },
            )
        elif fault == "drop":
            self.close_connection = True
        elif fault == "html":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "13")
            self.end_headers()
            self.wfile.write(b"<html></html>")
        elif fault == "silent":
            time.sleep(SILENCE)
            self.close_connection = True
        elif body.get("stream"):
            self.stream(self.owner.answer(prompt, body), body, chat, fault, prompt)
        else:
            self.echo(prompt)

    def reply(self, status: int, values: dict, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.mark_served()
        self.wfile.write(text)

    def stream(
        self, text: str, body: dict, chat: bool, fault: str, prompt: str | list[int]
    ) -> None:
        """Send the answer in pieces, which count as tokens, as chunked server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = [
            text[start : start + self.owner.piece]
            for start in range(0, len(text), self.owner.piece)
        ]
        kept = words[: body["max_tokens"]]
        broken = fault in ("cut", "end", "error")
        if self.owner.reasoning is not None:
            delta = {"reasoning_content": self.owner.reasoning(str(prompt), body)}
            self.send_event({"choices": [{"index": 0, "finish_reason": None, "delta": delta}]})
        for word in kept[: len(kept) // 2] if broken else kept:
            self.send_event({"choices": [self.choice(word, None, chat)]})
            if fault == "slow":
                time.sleep(0.06)
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "error":
            self.send_event({"error": {"message": "the engine died", "type": "internal"}})
        elif fault != "end":
            reason = "stop" if len(kept) == len(words) else "length"
            self.send_event({"choices": [self.choice("", reason, chat)]})
            self.send_event({
                "choices": [],
                "usage": {"prompt_tokens": 1, "completion_tokens": len(kept), "total_tokens": 0},
            })
            self.mark_served()
            # one write: a client may close the connection as soon as it has read the end mark
            self.wfile.write(make_chunk(b"data: [DONE]\n\n") + make_chunk(b""))
            return
        self.chunk(b"")

    def choice(self, text: str, reason: str | None, chat: bool) -> dict:
        said = {"delta": {"content": text}} if chat else {"text": text}
        return {"index": 0, "finish_reason": reason, **said}

    def send_event(self, values: dict) -> None:
        self.chunk(
            b"data: "
            + json.dumps({
                "id": "x",
                "object": "chunk",
                "created": 0,
                "model": "tiny",
                **values,
            }).encode()
            + b"\n\n"
        )

    def chunk(self, data: bytes) -> None:
        self.wfile.write(make_chunk(data))
        self.wfile.flush()

    def echo(self, tokens: str | list[int]) -> None:
        """Send log probabilities of the prompt's tokens and one more, as /v1/completions does for
        echo.
        """
        assert self.owner.logprobs is not None
        both = [*self.owner.logprobs(tokens), (-0.5, -0.5)]
        values = [None, *(value for value, _ in both)]
        top = [None, *({"best": best} for _, best in both)]
        probs = {
            "tokens": [""] * len(values),
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": [0] * len(values),
        }
        self.reply(
            200,
            {
                "id": "x",
                "object": "text_completion",
                "created": 0,
                "model": "tiny",
                "choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": probs}],
            },
        )


def make_chunk(data: bytes) -> bytes:
    """Return a chunk of a chunked answer; an empty one is the last."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
