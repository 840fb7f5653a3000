"""One answer after the other with transformers' `generate`, told piece by piece, stopped by whoever asked.

transformers' own `stop_strings` leaves the stop string in the text and tells it to a streamer; here text is held back
while it may still become one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from quantkit.artifact.load_model import load_model
from quantkit.serve.engines.openai_protocol import BadRequest, CompletionRequest
from quantkit.texts.corpora import load_tokenizer

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""For models without a chat template: they go on with the text of the messages."""
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How an answer ended, and its tokens."""

    reason: Reason
    tokens: int


class Writer:
    """What `generate` streams to: token ids in, text out, until a stop string or whoever asked says stop."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], tell: Callable[[str], None]) -> None:
        self._backend, self._stream = (
            tokenizer.backend_tokenizer,
            DecodeStream(skip_special_tokens=True),
        )
        self._stop, self._tell = tuple(stop), tell
        self._held = ""
        self._prompt = True
        self.tokens = 0
        self.stopped = False
        self.cancelled = threading.Event()

    def put(self, value: Tensor) -> None:
        """The prompt, which comes first and is not told, then token after token."""
        if self._prompt:
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.tokens += 1
            if not self.stopped:
                self._say(self._stream.step(self._backend, token) or "")

    def end(self) -> None:
        """Tell what was held back."""
        if not self.stopped and self._held:
            self._tell(self._held)
            self._held = ""

    def done(self, ids: Tensor, _scores: object) -> Tensor:
        """transformers' stopping criterion, asked after every token: [rows] bool."""
        return torch.full(
            (ids.shape[0],), self.stopped or self.cancelled.is_set(), device=ids.device
        )

    def _say(self, text: str) -> None:
        held = self._held + text
        found = [place for stop in self._stop if (place := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            held, keep = held[: min(found)], 0
        else:
            keep = max((beginning(held, stop) for stop in self._stop), default=0)
        told, self._held = held[: len(held) - keep], held[len(held) - keep :]
        if told:
            self._tell(told)


def beginning(text: str, stop: str) -> int:
    """Characters at the end of `text` that may begin `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


class Decoder:
    """A model that answers one request at a time, in the order they came, in a thread of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "",
        context: int | None = None,
        template: str | None = None,
    ) -> None:
        self.tokenizer: Any = load_tokenizer(folder)
        self.model = load_model(folder)
        self.name = name or folder.resolve().name
        eos = self.model.generation_config.eos_token_id
        self._ends: list[int] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.model.generation_config.eos_token_id = (
            None  # what a request leaves open, generate takes from there
        )
        longest = int(getattr(self.model.config, "max_position_embeddings", 0)) or 2048
        self.context = min(context or longest, longest)
        own = template or getattr(self.tokenizer, "chat_template", None)
        self.template, self.own_template = own or PLAIN_TEMPLATE, own is not None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def prompts(self, ask: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt; Misasked when one leaves no room for an answer."""
        if ask.kind == "chat":
            text = self.tokenizer.apply_chat_template(
                list(ask.messages),
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
            )
            made = [self._ids(text, special=not self.own_template)]
        else:
            made = [
                one if isinstance(one, list) else self._ids(one, special=True)
                for one in ask.prompts
            ]
        words = self.model.get_input_embeddings().num_embeddings
        for ids in made:
            if any(not 0 <= one < words for one in ids):
                raise BadRequest(f"prompt: expected token ids from 0 to {words - 1}")
            if not ids or len(ids) + (ask.max_tokens or 1) > self.context:
                raise BadRequest(
                    f"prompt: expected at least one token and with max_tokens ({ask.max_tokens or 1}) at most "
                    f"{self.context}, found {len(ids)}; shorten it or ask for less"
                )
        return made

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; Misasked for what is none: JSON can say half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise BadRequest(
                f"prompt: expected text, found half a surrogate pair at {fault.start}; mend it"
            ) from None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def start(
        self, ids: list[int], ask: CompletionRequest, seed: int | None, tell: Callable[[str], None]
    ) -> tuple[Writer, Future[Ended]]:
        """Begin an answer when its turn comes. `tell` is called in the decoder's thread."""
        writer = Writer(self.tokenizer, ask.stop, tell)
        return writer, self._thread.submit(self._run, writer, ids, ask, seed)

    def close(self) -> None:
        """Take no more requests."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(
        self, writer: Writer, ids: list[int], ask: CompletionRequest, seed: int | None
    ) -> Ended:
        if writer.cancelled.is_set():
            return Ended(reason="cancelled", tokens=0)
        if seed is not None:
            torch.manual_seed(seed)  # one answer at a time: nobody else draws
        room = self.context - len(ids)
        limit = min(ask.max_tokens or room, room)
        sampled = ask.temperature > 0
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        config.update(
            max_new_tokens=limit, do_sample=sampled, top_p=None, temperature=None, top_k=None
        )
        if sampled:
            config.update(temperature=ask.temperature, top_p=ask.top_p, top_k=0)
        ends = [] if ask.ignore_eos else self._ends
        config.update(eos_token_id=ends or None)
        inputs = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            made = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=writer,
                stopping_criteria=StoppingCriteriaList([writer.done]),
            )
        if writer.cancelled.is_set():
            return Ended(reason="cancelled", tokens=writer.tokens)
        ended = writer.stopped or int(made[0, -1]) in ends
        return Ended(reason="stop" if ended else "length", tokens=writer.tokens)
