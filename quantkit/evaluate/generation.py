"""Decoding for lm-eval, made for many short answers on few cores: greedy, or sampled at a temperature.

lm-eval's own generator keeps a batch until its last row is done. Attention over the cache is what decoding costs (MLA
expands the whole cache at every step), so here a row leaves the batch, and its cache, as soon as it has stopped; the
prompts are sorted by length, so that padding is short. Worked examples in front of every prompt are read once for a
whole batch. What lm-eval decides elsewhere stays its own: prompts, the rule for BOS, stop strings, filters.

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
from transformers import DynamicCache, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from quantkit.errors import UnsuitedError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood

_WORTH_SHARING = 16  # tokens: a second call of the model costs as much as reading a few
Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits [rows, vocabulary], places of the rows in their batch) -> the next token of each [rows, 1]."""


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

    def answer(self, tokens: Sequence[int]) -> GeneratedAnswer:
        """The text of a finished row."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for string in self.strings:
            text = text.split(string)[0]
        return GeneratedAnswer(text=text, n_tokens=len(tokens), truncated=not self.reached(tokens))


class LocalModel(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's transformers backend with this module's decoding."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def generate(
        self,
        requests: Sequence[Any],
        finished: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """An answer per request, told batch by batch."""
        # Requests with equal limits share a batch; short prompts go first.
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        rules = [GenerationParams.of(request.args[1], request.task_name) for request in requests]
        order = sorted(
            range(len(requests)), key=lambda index: (rules[index].key, len(encoded[index]))
        )
        start = 0
        while start < len(order):
            batch = [
                index for index in order[start : start + self.batch_size]
                if rules[index] == rules[order[start]]
            ]  # fmt: skip
            answers = self._batch([encoded[index] for index in batch], rules[batch[0]])
            finished([*zip(batch, answers, strict=True)])
            start += len(batch)

    def likelihoods(
        self,
        requests: Sequence[Any],
        finished: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """lm-eval's own, told batch by batch; requests about one prompt follow each other and share its work."""
        for start in range(0, len(requests), self.batch_size):
            some = self.loglikelihood(requests[start : start + self.batch_size], disable_tqdm=True)
            finished([*enumerate(some, start)])

    def _batch(
        self, prompts: Sequence[Sequence[int]], rules: GenerationParams
    ) -> list[GeneratedAnswer]:
        longest = max(len(prompt) for prompt in prompts)
        if longest + rules.max_tokens > self.max_length:
            raise UnsuitedError(
                f"{rules.task}: a prompt of {longest} tokens and {rules.max_tokens} new ones do not fit into the "
                f"model's context of {self.max_length}; use fewer examples or a model with more context"
            )
        stop = _Stop(tokenizer=self.tokenizer, eos=self._eos(), strings=rules.until)
        choose = (
            sampled(prompts, rules.temperature, rules.top_p, rules.seed)
            if rules.temperature
            else most_probable
        )
        rows = decode(
            self.model, prompts, self.tokenizer.pad_token_id, rules.max_tokens, stop.reached, choose
        )
        return [stop.answer(row) for row in rows]

    def _eos(self) -> frozenset[int]:
        """The tokenizer's EOS and those of the model's generation config (chat models have several)."""
        listed = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        several = listed if isinstance(listed, list) else [listed]
        return frozenset(
            token for token in (*several, self.tokenizer.eos_token_id) if token is not None
        )


def most_probable(logits: Tensor, places: Sequence[int]) -> Tensor:
    """Greedy: the token with the largest logit, [rows, vocabulary] -> [rows, 1]."""
    return logits.argmax(-1, keepdim=True)


def sampled(
    prompts: Sequence[Sequence[int]], temperature: float, top_p: float, seed: int
) -> Choose:
    """Draws from softmax(logits / temperature), cut to the most probable tokens that make up `top_p`.

    Each row has a generator of its own, seeded by its prompt and `seed`: a batch of other rows changes no draw.
    """
    generators = []
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed} {list(prompt)}".encode()).digest()
        generators.append(
            torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        )
    nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def choose(logits: Tensor, places: Sequence[int]) -> Tensor:
        scores = logits.float().cpu() / temperature  # [rows, vocabulary]
        chances = torch.softmax(nucleus(None, scores) if nucleus else scores, dim=-1)
        drawn = [
            torch.multinomial(row, 1, generator=generators[at])
            for row, at in zip(chances, places, strict=True)
        ]
        return torch.stack(drawn).to(logits.device)

    return choose


@torch.inference_mode()
def decode(
    model: Any, prompts: Sequence[Sequence[int]], pad: int, max_tokens: int, stopped: Callable[[list[int]], bool],
    choose: Choose = most_probable,
) -> list[list[int]]:  # fmt: skip
    """A continuation of each prompt, up to `max_tokens` tokens or until `stopped` says so; `choose` picks every token.

    prompts: token ids, at least one each; pad: the id that fills the shorter ones. Returns the new tokens per prompt,
    the stopping one included.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    output, mask = prefill(model, prompts, pad)
    cache = output.past_key_values
    while True:
        chosen = choose(output.logits[:, -1], alive)  # [alive, vocabulary] -> [alive, 1]
        for row, token in zip(alive, chosen[:, 0].tolist(), strict=True):
            rows[row].append(token)
        keep = [place for place, row in enumerate(alive) if not stopped(rows[row])]
        if not keep or len(rows[alive[keep[0]]]) == max_tokens:
            return rows
        if len(keep) < len(alive):
            alive = [alive[place] for place in keep]
            kept = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(kept)
            chosen, mask = chosen[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)  # [alive, length + 1]
        output = model(
            input_ids=chosen, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip


def prefill(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Any, Tensor]:
    """The model's output behind the prompts, with their cache and the logits of their last tokens, and what it sees.

    The mask [batch, length] is 1 for tokens and 0 for padding, which lies before a prompt, or between the tokens that
    all of them share and its own.
    """
    cache = DynamicCache(config=model.config)
    shared = shared_tokens(prompts, cache)
    if shared:
        front = torch.tensor([prompts[0][:shared]], device=model.device)  # [1, shared]
        model(input_ids=front, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    own = [list(prompt[shared:]) for prompt in prompts]
    longest = max(map(len, own))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in own])  # [batch, longest]
    mask = torch.tensor([[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in own])
    mask = mask.to(model.device)  # [batch, shared + longest]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]  # [batch, longest]
    output = model(
        input_ids=ids.to(model.device), attention_mask=mask, position_ids=positions, past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    return output, mask


def shared_tokens(prompts: Sequence[Sequence[int]], cache: DynamicCache) -> int:
    """How many tokens at the front of all prompts are read once: all but a prompt's last, 0 if they are few.

    And 0 where padding behind them would count: sliding windows and recurrent states go by place, not by the mask.
    """
    if len(prompts) == 1 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0
    first, last = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # what these two share, all between them share
    common = next(
        (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]),
        len(first),
    )
    shared = min(common, min(map(len, prompts)) - 1)
    return shared if shared >= _WORTH_SHARING else 0
