"""Benchmark prompts that appear in calibration text, by shared runs of words.

An item overlaps if at least 80 % of its words lie in runs of RUN words that the text has, too
(Touvron et al. 2023, Llama 2, appendix A.6, with words for tokens). Prompts made of one template
share runs, but not 80 % of their words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

RUN = 13
"""Words in a row (Brown et al. 2020, GPT-3, appendix C); a shorter prompt counts as a whole."""
FEWEST_WORDS = 6
"""A shorter prompt is not checked: it says nothing of its own."""
LEAST_SHARE = 0.8

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without blanks: each is a word
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W_{_IDEOGRAPHS}]+")


class TextRuns:
    """The runs of words of a text, by length. Mutable: lengths are added when they are needed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._words = [list_words(text) for text in texts]
        self._runs = dict[int, set[int]]()

    def overlaps(self, prompt: str) -> bool:
        """Return whether the text has at least 80 % of a prompt's words, in runs."""
        words = list_words(prompt)
        if len(words) < FEWEST_WORDS:
            return False
        length = min(RUN, len(words))
        known, covered = self._find_runs(length), [False] * len(words)
        for start, run in enumerate(hash_runs(words, length)):
            if run in known:
                covered[start : start + length] = [True] * length
        return sum(covered) >= LEAST_SHARE * len(words)

    def _find_runs(self, length: int) -> set[int]:
        if length not in self._runs:
            self._runs[length] = {run for words in self._words for run in hash_runs(words, length)}
        return self._runs[length]


def count_overlaps(texts: Iterable[str], prompts: Sequence[str]) -> int:
    """Return how many prompts appear in texts."""
    runs = TextRuns(texts)
    return sum(runs.overlaps(prompt) for prompt in prompts)


def list_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; an ideograph is a word."""
    return _WORD.findall(text.lower())


def hash_runs(words: Sequence[str], length: int) -> list[int]:
    """Return a hash of every run of `length` words."""
    return [hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1)]
