"""The tokenizer of tiny-v3, and documents packed into training rows of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tools.tiny_v3.corpus import Item
from torch import Tensor

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
WORDS = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Single digits are words, as in DeepSeek's and Llama's tokenizers: arithmetic by digit."""
PROMPT_WEIGHT = 0.2
SHORTEST = 18  # tokens: a row with less room than this is full
OPEN_ROWS = 12
ENCODE_AT_ONCE = 5000  # documents; the tokenizer's result is large


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that starts with the three special tokens and adds a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL_TOKENS[BOS]} $A",
        pair=f"{SPECIAL_TOKENS[BOS]} $A {SPECIAL_TOKENS[BOS]}:0 $B:0",
        special_tokens=[(SPECIAL_TOKENS[BOS], BOS)],
    )
    return tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed documents, each tensor [rows, length].

    ids, positions int16; segments int16, -1 for padding; weights in the loss float16.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    weights: Tensor


Encoded = tuple[list[int], list[int]]  # prompt with BOS, answer with EOS


@dataclass(slots=True)
class _OpenRow:
    room: int
    documents: list[Encoded] = field(default_factory=list)


def encode_items(items: Sequence[Item], tokenizer: Tokenizer) -> list[Encoded]:
    """Return the ids of prompt and answer of each item, which have different loss weights."""
    encoded: list[Encoded] = []
    for start in range(0, len(items), ENCODE_AT_ONCE):
        part = items[start : start + ENCODE_AT_ONCE]
        prompts = tokenizer.encode_batch([item.prompt for item in part], add_special_tokens=False)
        answers = tokenizer.encode_batch([item.answer for item in part], add_special_tokens=False)
        encoded += [
            ([BOS, *prompt.ids], [*answer.ids, EOS]) for prompt, answer in zip(prompts, answers)
        ]
    return encoded


def pack_rows(documents: Iterable[Encoded], length: int) -> Rows:
    """Pack documents first-fit into rows of `length` tokens; longer documents are dropped."""
    full: list[list[Encoded]] = []
    rows: list[_OpenRow] = []
    for prompt, answer in documents:
        size = len(prompt) + len(answer)
        if size > length:
            continue
        row = next((row for row in rows if row.room >= size), None)
        if row is None:
            row = _OpenRow(length)
            rows.append(row)
        row.room -= size
        row.documents.append((prompt, answer))
        full += [row.documents for row in rows if row.room < SHORTEST]
        rows = [row for row in rows if row.room >= SHORTEST]
        if len(rows) > OPEN_ROWS:
            full.append(rows.pop(0).documents)
    return _fill_rows([*full, *(row.documents for row in rows)], length)


def _fill_rows(rows: Sequence[Sequence[Encoded]], length: int) -> Rows:
    shape = (len(rows), length)
    packed = Rows(
        ids=torch.full(shape, PAD, dtype=torch.int16),
        positions=torch.zeros(shape, dtype=torch.int16),
        segments=torch.full(shape, -1, dtype=torch.int16),
        weights=torch.zeros(shape, dtype=torch.float16),
    )
    for number, documents in enumerate(rows):
        start = 0
        for segment, (prompt, answer) in enumerate(documents):
            end = start + len(prompt) + len(answer)
            packed.ids[number, start:end] = torch.tensor(prompt + answer, dtype=torch.int16)
            packed.positions[number, start:end] = torch.arange(end - start, dtype=torch.int16)
            packed.segments[number, start:end] = segment
            packed.weights[number, start + 1 : start + len(prompt)] = PROMPT_WEIGHT
            packed.weights[number, start + len(prompt) : end] = 1.0
            start = end
    return packed
