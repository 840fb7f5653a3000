"""Greedy decoding for lm-eval, made for many short answers on few cores.

lm-eval's own generator keeps a batch until its last row is done. Attention over the cache is what decoding costs (MLA
expands the whole cache at every step), so here a row leaves the batch, and its cache, as soon as it has stopped; the
prompts are sorted by length, so that padding is short. What lm-eval decides elsewhere stays its own: prompts, the rule
for BOS, stop strings, filters.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from quantkit.errors import EvaluationError

Progress = Callable[[int, int], None]
"""Called with the number of answers that are complete, and of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model wrote: text before the stop string, tokens including the one that stopped it.

    `truncated`: neither EOS nor a stop string came within the limit.
    """

    text: str
    n_tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stop:
    """When a row is done: an EOS token, or a stop string in what its last tokens spell."""

    tokenizer: Any
    eos: frozenset[int]
    strings: tuple[str, ...]

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token ends the answer; `tokens` is everything generated so far."""
        if tokens[-1] in self.eos:
            return True
        if not self.strings:
            return False
        # A token spells a byte or more, so no stop string is longer than this many tokens.
        tail = tokens[-max(len(string.encode()) for string in self.strings) - 1 :]
        text = self.tokenizer.decode(tail)
        return any(string in text for string in self.strings)

    def answer(self, tokens: Sequence[int]) -> Answer:
        """The text of a finished row."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for string in self.strings:
            text = text.split(string)[0]
        return Answer(text=text, n_tokens=len(tokens), truncated=not self.reached(tokens))


class LocalModel(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's transformers backend with this module's `generate_until`; `answers` keeps what it returned."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.answers: dict[tuple[str, int], Answer] = {}
        self._progress = progress

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One text per request, in the order of the requests."""
        # Requests with equal limits share a batch; short prompts go first.
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        rules = [_Rules.of(request.args[1], request.task_name) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (rules[index].key, len(encoded[index])))
        texts, done, start = [""] * len(requests), 0, 0
        while start < len(order):
            batch = [
                index for index in order[start : start + self.batch_size]
                if rules[index] == rules[order[start]]
            ]  # fmt: skip
            answers = self._batch([encoded[index] for index in batch], rules[batch[0]])
            for index, answer in zip(batch, answers, strict=True):
                self.answers[requests[index].task_name, requests[index].doc_id] = answer
                texts[index] = answer.text
            start += len(batch)
            done += len(batch)
            if self._progress is not None:
                self._progress(done, len(requests))
        return texts

    def _batch(self, prompts: Sequence[Sequence[int]], rules: _Rules) -> list[Answer]:
        longest = max(len(prompt) for prompt in prompts)
        if longest + rules.max_tokens > self.max_length:
            raise EvaluationError(
                f"{rules.task}: a prompt of {longest} tokens and {rules.max_tokens} new ones do not fit into the "
                f"model's context of {self.max_length}; use fewer examples or a model with more context"
            )
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # [batch, longest]
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        stop = _Stop(tokenizer=self.tokenizer, eos=self._eos(), strings=rules.until)
        device = self.model.device
        rows = greedy(self.model, ids.to(device), mask.to(device), rules.max_tokens, stop.reached)
        return [stop.answer(row) for row in rows]

    def _eos(self) -> frozenset[int]:
        """The tokenizer's EOS and those of the model's generation config (chat models have several)."""
        listed = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        several = listed if isinstance(listed, list) else [listed]
        return frozenset(token for token in (*several, self.tokenizer.eos_token_id) if token is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """A task's generation_kwargs, checked."""

    task: str
    until: tuple[str, ...]
    max_tokens: int

    @property
    def key(self) -> tuple[str, int]:
        """What requests are grouped by."""
        return self.task, self.max_tokens

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], task: str) -> _Rules:
        until, limit = kwargs.get("until", []), kwargs.get("max_gen_toks")
        if kwargs.get("do_sample"):
            raise EvaluationError(f"{task}: generation_kwargs.do_sample: expected false, found true")
        if not isinstance(limit, int) or limit < 1:
            raise EvaluationError(f"{task}: generation_kwargs.max_gen_toks: expected a whole number, found {limit!r}")
        strings = [until] if isinstance(until, str) else until
        return cls(task=task, until=tuple(string for string in strings if string), max_tokens=limit)


@torch.inference_mode()
def greedy(
    model: Any, ids: Tensor, mask: Tensor, max_tokens: int, stopped: Callable[[list[int]], bool]
) -> list[list[int]]:
    """The most probable continuation of each row, up to `max_tokens` tokens or until `stopped` says so.

    ids, mask [batch, length] int64, padded on the left. Returns the new tokens per row, the stopping one included.
    """
    rows: list[list[int]] = [[] for _ in range(len(ids))]
    alive = list(range(len(ids)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    while True:
        chosen = output.logits[:, -1].argmax(-1)  # [alive, 1, vocabulary] -> [alive]
        for row, token in zip(alive, chosen.tolist(), strict=True):
            rows[row].append(token)
        keep = [place for place, row in enumerate(alive) if not stopped(rows[row])]
        if not keep or len(rows[alive[keep[0]]]) == max_tokens:
            return rows
        if len(keep) < len(alive):
            alive = [alive[place] for place in keep]
            kept = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(kept)
            chosen, mask = chosen[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)  # [alive, length + 1]
        output = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
