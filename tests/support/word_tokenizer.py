"""A tokenizer of words, for tests that count tokens."""

from __future__ import annotations


class WordTokenizer:
    """A tokenizer of words: BOS 1, EOS 2, the id of a word is its length + 10."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    adds_bos = True

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        front = [1] if add_special_tokens and self.adds_bos else []
        return {"input_ids": [front + [len(word) + 10 for word in line.split()] for line in text]}


class WordTokenizerWithoutBos(WordTokenizer):
    bos_token_id = None
    adds_bos = False


class WordTokenizerWithUnusedBos(WordTokenizer):
    adds_bos = False
