"""transformers as a backend: greedy or sampled decoding for many short answers on few cores.

lm-eval's own generator keeps a batch until its last row ends. Attention over the cache dominates
the cost of decoding (MLA expands the whole cache at every step), so a row leaves the batch and its
cache as soon as it stops, and prompts are sorted by length to keep padding short. Worked examples
that all prompts of a batch share are read once. Everything else stays lm-eval's: prompts, the rule
for BOS, stop strings, filters.

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
from quantkit.io.templates import TemplateWorker
from quantkit.texts.chat_templates import render_prompt

_MIN_SHARED_TOKENS = 16  # a second call of the model costs as much as reading a few tokens
TokenSelector = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits [rows, vocab], index of each row in its batch) -> next tokens [rows, 1]."""


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


def select_greedy(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """Select the token with the largest logit, [rows, vocab] -> [rows, 1]."""
    return logits.argmax(-1, keepdim=True)


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


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad: int,
    max_tokens: int,
    is_stopped: Callable[[list[int]], bool],
    select: TokenSelector = select_greedy,
) -> list[list[int]]:
    """Decode a continuation of each prompt, up to `max_tokens` tokens or until `is_stopped`.

    Args:
        prompts: token ids, at least one per prompt.
        pad: the id that pads shorter prompts.
        select: selects every token.

    Returns the new tokens of each prompt, including the one that stopped it.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    output, mask = prefill(model, prompts, pad)
    cache = output.past_key_values
    while True:
        tokens = select(output.logits[:, -1], alive)  # [alive, vocab] -> [alive, 1]
        for row, token in zip(alive, tokens[:, 0].tolist(), strict=True):
            rows[row].append(token)
        keep = [index for index, row in enumerate(alive) if not is_stopped(rows[row])]
        if not keep or len(rows[alive[keep[0]]]) == max_tokens:
            return rows
        if len(keep) < len(alive):
            alive = [alive[index] for index in keep]
            kept = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(kept)
            tokens, mask = tokens[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)  # [alive, length + 1]
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )


def prefill(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Any, Tensor]:
    """Run the model on the prompts.

    Return its output (cache, logits of the last tokens) and the mask.

    The attention mask [batch, length] is 1 for tokens and 0 for padding. Padding comes before a
    prompt, or between the shared tokens and a prompt's own.
    """
    cache = DynamicCache(config=model.config)
    shared = count_shared_tokens(prompts, cache)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)  # [1, shared]
        model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    own = [list(prompt[shared:]) for prompt in prompts]
    longest = max(map(len, own))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in own])  # [batch, longest]
    mask = torch.tensor([[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in own])
    mask = mask.to(model.device)  # [batch, shared + longest]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]  # [batch, longest]
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output, mask


def count_shared_tokens(prompts: Sequence[Sequence[int]], cache: DynamicCache) -> int:
    """Return how many leading tokens are read once for all prompts; 0 if they are few.

    0 as well if padding after them would count: sliding windows and recurrent states go by
    position, not by the mask.
    """
    if len(prompts) == 1 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0
    # all prompts share what the smallest and the largest share
    smallest, largest = min(map(list, prompts)), max(map(list, prompts))
    pairs = enumerate(zip(smallest, largest, strict=False))
    common = next((index for index, (a, b) in pairs if a != b), len(smallest))
    shared = min(common, min(map(len, prompts)) - 1)
    return shared if shared >= _MIN_SHARED_TOKENS else 0
