"""Sequential generation with transformers: streaming, stop strings, cancellation.

transformers' own `stop_strings` keeps the stop string in the text and sends it to a streamer. Here
text is held back while it may still become a stop string.
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
from quantkit.io.templates import TemplateFault, TemplateWorker, WorkerLimits
from quantkit.io.yaml_document import printable
from quantkit.serve.engines.openai_protocol import BadRequest, CompletionRequest
from quantkit.texts.chat_templates import render_chat
from quantkit.texts.corpora import RUST_PANIC, load_tokenizer
from quantkit.texts.corpus_spec import get_first_line

DEFAULT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""The chat template of models without one: the model continues the text of the messages."""
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The end of a completion: its reason, and the number of generated tokens."""

    reason: FinishReason
    tokens: int


class TextStreamer:
    """A streamer of `generate`: passes text on until a stop string or cancellation.

    Mutable; `cancelled` may be set from another thread.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop, self._on_text = tuple(stop), on_text
        self._held_back = ""
        self._is_prompt = True
        self.tokens = 0
        self.is_stopped = False
        self.cancelled = threading.Event()

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first and is skipped, then the tokens one by one."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.tokens += 1
            if not self.is_stopped:
                self._add_text(self._stream.step(self._backend, token) or "")

    def end(self) -> None:
        """Pass on the text that was held back."""
        if not self.is_stopped and self._held_back:
            self._on_text(self._held_back)
            self._held_back = ""

    def is_done(self, ids: Tensor, _scores: object) -> Tensor:
        """Return transformers' stopping criterion after every token: [rows] bool."""
        return torch.full(
            (ids.shape[0],), self.is_stopped or self.cancelled.is_set(), device=ids.device
        )

    def _add_text(self, text: str) -> None:
        pending = self._held_back + text
        matches = [start for stop in self._stop if (start := pending.find(stop)) >= 0]
        if matches:
            self.is_stopped = True
            pending, kept = pending[: min(matches)], 0
        else:
            kept = max((count_stop_prefix(pending, stop) for stop in self._stop), default=0)
        ready = pending[: len(pending) - kept]
        self._held_back = pending[len(pending) - kept :]
        if ready:
            self._on_text(ready)


def count_stop_prefix(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that may begin `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


class Decoder:
    """A model that serves one request at a time, in order of arrival, in a thread of its own."""

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
        self._eos_ids: list[int] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        # generate would take it from there for a request without one
        self.model.generation_config.eos_token_id = None
        longest = int(getattr(self.model.config, "max_position_embeddings", 0)) or 2048
        self.context = min(context or longest, longest)
        own = template or getattr(self.tokenizer, "chat_template", None)
        self.template = template or (None if own else DEFAULT_TEMPLATE)  # None: the tokenizer's
        self.has_own_template = own is not None
        # a server has no last request: only each single one is limited
        self._templates = TemplateWorker(WorkerLimits(total_seconds=None, total_characters=None))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def encode_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Return the token ids of each prompt; BadRequest if one leaves no room for output."""
        if request.kind == "chat":
            text = self._render_chat(request)
            prompts = [self._encode(text, special=not self.has_own_template)]
        else:
            prompts = [
                prompt if isinstance(prompt, list) else self._encode(prompt, special=True)
                for prompt in request.prompts
            ]
        vocab_size = self.model.get_input_embeddings().num_embeddings
        for ids in prompts:
            if any(not 0 <= token < vocab_size for token in ids):
                raise BadRequest(f"prompt: expected token ids from 0 to {vocab_size - 1}")
            if not ids or len(ids) + (request.max_tokens or 1) > self.context:
                raise BadRequest(
                    f"prompt: expected at least one token and with max_tokens "
                    f"({request.max_tokens or 1}) at most {self.context}, found {len(ids)}; "
                    "shorten it or lower max_tokens"
                )
        return prompts

    def _render_chat(self, request: CompletionRequest) -> str:
        """Return the text of a conversation; BadRequest if the chat template gives none."""
        try:
            return render_chat(
                self._templates, self.tokenizer, request.messages, template=self.template
            )
        except (TemplateFault, ValueError) as fault:
            sentence = printable(" ".join(str(fault).split()), 300)
            raise BadRequest(
                f"messages: the model's chat template gives no text for them: {sentence}; change "
                "the messages, or serve with another --chat-template"
            ) from None

    def _encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text.

        Raises BadRequest for half of a surrogate pair, which JSON can contain, and for a text on
        which the model's tokenizer fails.
        """
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise BadRequest(
                f"prompt: expected text, found half of a surrogate pair at {fault.start}; fix it"
            ) from None
        try:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        # the tokenizers library raises bare Exception, and Rust panics, which are no Exception
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
                raise
            sentence = printable(get_first_line(error), 300)
            raise BadRequest(
                f"prompt: the model's tokenizer cannot encode it: {sentence}; change the text"
            ) from None

    def submit(
        self,
        ids: list[int],
        request: CompletionRequest,
        seed: int | None,
        on_text: Callable[[str], None],
    ) -> tuple[TextStreamer, Future[Completion]]:
        """Queue a completion. `on_text` is called in the decoder's thread."""
        streamer = TextStreamer(self.tokenizer, request.stop, on_text)
        return streamer, self._thread.submit(self._generate, streamer, ids, request, seed)

    def close(self) -> None:
        """Stop accepting requests."""
        self._templates.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _generate(
        self, streamer: TextStreamer, ids: list[int], request: CompletionRequest, seed: int | None
    ) -> Completion:
        if streamer.cancelled.is_set():
            return Completion(reason="cancelled", tokens=0)
        if seed is not None:
            torch.manual_seed(seed)  # one completion at a time: no other thread samples
        room = self.context - len(ids)
        limit = min(request.max_tokens or room, room)
        is_sampled = request.temperature > 0
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        config.update(
            max_new_tokens=limit, do_sample=is_sampled, top_p=None, temperature=None, top_k=None
        )
        if is_sampled:
            config.update(temperature=request.temperature, top_p=request.top_p, top_k=0)
        eos_ids = [] if request.ignore_eos else self._eos_ids
        config.update(eos_token_id=eos_ids or None)
        inputs = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            outputs = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([streamer.is_done]),
            )
        if streamer.cancelled.is_set():
            return Completion(reason="cancelled", tokens=streamer.tokens)
        has_stopped = streamer.is_stopped or int(outputs[0, -1]) in eos_ids
        return Completion(reason="stop" if has_stopped else "length", tokens=streamer.tokens)
