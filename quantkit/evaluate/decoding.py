"""Decoding for many short answers on few cores, with transformers' own model and cache.

Attention over the cache dominates the cost of decoding (MLA expands the whole cache at every step),
so a row leaves the batch and its cache as soon as it stops, and prompts are sorted by length to
keep padding short. Tokens that all prompts of a batch share, such as worked examples, are read
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_MIN_SHARED_TOKENS = 16  # a second call of the model costs as much as reading a few tokens
TokenSelector = Callable[[Tensor, Sequence[int]], Tensor]
"""(logits [rows, vocab], index of each row in its batch) -> next tokens [rows, 1]."""


def select_greedy(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """Select the token with the largest logit, [rows, vocab] -> [rows, 1]."""
    return logits.argmax(-1, keepdim=True)


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
    # a prefix of the smallest and the largest prompt is a prefix of all
    smallest, largest = min(map(list, prompts)), max(map(list, prompts))
    pairs = enumerate(zip(smallest, largest, strict=False))
    common = next((index for index, (a, b) in pairs if a != b), len(smallest))
    shared = min(common, min(map(len, prompts)) - 1)
    return shared if shared >= _MIN_SHARED_TOKENS else 0
