"""transformers as a backend: greedy or sampled decoding for many short answers on few cores.

Decoding is that of `decoding`, which is faster than lm-eval's own generator. Everything else stays
lm-eval's: prompts, the rule for BOS, stop strings, filters.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import TopPLogitsWarper

from quantkit.errors import UnsuitedError
from quantkit.evaluate.decoding import TokenSelector, decode, select_greedy
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood
from quantkit.io.templates import TemplateWorker
from quantkit.texts.chat_templates import render_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class StopCondition:
    """When a row ends: an EOS token, or a stop string in the text of its last tokens."""

    tokenizer: Any
    eos: frozenset[int]
    strings: tuple[str, ...]

    def is_met(self, tokens: Sequence[int]) -> bool:
        """Return whether the newest of the generated `tokens` ends the answer."""
        if tokens[-1] in self.eos:
            return True
        if not self.strings:
            return False
        # A token spells a byte or more, so no stop string is longer than this many tokens.
        tail = tokens[-max(len(string.encode()) for string in self.strings) - 1 :]
        text = self.tokenizer.decode(tail)
        return any(string in text for string in self.strings)

    def make_answer(self, tokens: Sequence[int]) -> GeneratedAnswer:
        """Return the text of a finished row."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for string in self.strings:
            text = text.split(string)[0]
        return GeneratedAnswer(text=text, n_tokens=len(tokens), truncated=not self.is_met(tokens))


class TransformersBackend(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's transformers backend with this module's decoding."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._templates = TemplateWorker()

    def generate(
        self,
        requests: Sequence[Any],
        on_answers: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """Generate one answer per request; `on_answers` is called batch by batch."""
        # Requests with equal limits share a batch; short prompts come first.
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        params = [
            GenerationParams.from_kwargs(request.args[1], request.task_name) for request in requests
        ]
        order = sorted(
            range(len(requests)),
            key=lambda index: (params[index].group_key, len(encoded[index])),
        )
        start = 0
        while start < len(order):
            first = params[order[start]]
            candidates = order[start : start + self.batch_size]
            batch = [index for index in candidates if params[index] == first]
            answers = self._generate_batch([encoded[index] for index in batch], first)
            on_answers([*zip(batch, answers, strict=True)])
            start += len(batch)

    def compute_likelihoods(
        self,
        requests: Sequence[Any],
        on_answers: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """Compute log-likelihoods with lm-eval's own code, batch by batch.

        Requests with the same prompt are adjacent and share its computation.
        """
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            on_answers([*enumerate(self.loglikelihood(batch, disable_tqdm=True), start)])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the tokenizer's chat template, with limits."""
        return render_prompt(
            self._templates, self.tokenizer, chat_history, is_finished=add_generation_prompt
        )

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], params: GenerationParams
    ) -> list[GeneratedAnswer]:
        longest = max(len(prompt) for prompt in prompts)
        if longest + params.max_tokens > self.max_length:
            raise UnsuitedError(
                f"{params.task}: a prompt of {longest} tokens and {params.max_tokens} new ones do "
                f"not fit into the model's context of {self.max_length}; use fewer examples or a "
                "model with more context"
            )
        stop = StopCondition(
            tokenizer=self.tokenizer, eos=self._collect_eos(), strings=params.until
        )
        select: TokenSelector = select_greedy
        if params.temperature:
            select = make_sampler(prompts, params.temperature, params.top_p, params.seed)
        rows = decode(
            self.model,
            prompts,
            self.tokenizer.pad_token_id,
            params.max_tokens,
            stop.is_met,
            select,
        )
        return [stop.make_answer(row) for row in rows]

    def _collect_eos(self) -> frozenset[int]:
        """Return EOS of the tokenizer and of the generation config (chat models have several)."""
        config = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        tokens = config if isinstance(config, list) else [config]
        return frozenset(
            token for token in (*tokens, self.tokenizer.eos_token_id) if token is not None
        )


def make_sampler(
    prompts: Sequence[Sequence[int]], temperature: float, top_p: float, seed: int
) -> TokenSelector:
    """Return a sampler from softmax(logits / temperature), cut to the nucleus `top_p`.

    Each row has its own generator, seeded by its prompt and `seed`: other rows of a batch change no
    sample.
    """
    generators = []
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed} {list(prompt)}".encode()).digest()
        row_seed = int.from_bytes(digest[:8], "little", signed=True)
        generators.append(torch.Generator().manual_seed(row_seed))
    nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def sample(logits: Tensor, indices: Sequence[int]) -> Tensor:
        scores = logits.float().cpu() / temperature  # [rows, vocab]
        probabilities = torch.softmax(nucleus(None, scores) if nucleus else scores, dim=-1)
        tokens = [
            torch.multinomial(row, 1, generator=generators[index])
            for row, index in zip(probabilities, indices, strict=True)
        ]
        return torch.stack(tokens).to(logits.device)

    return sample
