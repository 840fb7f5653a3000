"""Benchmark prompts that appear in calibration text, by shared runs of words.

A prompt appears in a text if a line of at least RUN words does: 90 % of the line's words lie in
runs of RUN words that one text has, too (runs of 13 words: Brown et al. 2020, GPT-3, appendix C;
a share of the words: Touvron et al. 2023, Llama 2, appendix A.6). Lines that many prompts of a task
have are its frame and say nothing. A prompt of short lines counts as one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

RUN = 13
FEWEST_WORDS = 6
"""A shorter prompt is not checked: it says nothing of its own."""
LEAST_SHARE = 0.9
FRAME_SHARE = 0.05
"""Share of the prompts above which a line is part of their frame; two prompts at least."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without blanks: each is a word
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W_{_IDEOGRAPHS}]+")

Words = tuple[str, ...]


class TextRuns:
    """The runs of words of texts, by length. Mutable: lengths are added when they are needed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._words = [list_words(text) for text in texts]
        self._texts = dict[int, dict[int, set[int]]]()  # length -> run -> numbers of texts

    def contain(self, words: Words) -> bool:
        """Return whether one text has at least 90 % of the words, in runs."""
        length = min(RUN, len(words))
        runs = hash_runs(words, length)
        known = self._find_runs(length)
        candidates = set[int]().union(*(known.get(run, ()) for run in runs))
        return any(
            count_covered([number in known.get(run, ()) for run in runs], length)
            >= LEAST_SHARE * len(words)
            for number in candidates
        )

    def _find_runs(self, length: int) -> dict[int, set[int]]:
        if length not in self._texts:
            owners = dict[int, set[int]]()  # run -> numbers of texts
            for number, words in enumerate(self._words):
                for run in hash_runs(words, length):
                    owners.setdefault(run, set()).add(number)
            self._texts[length] = owners
        return self._texts[length]


def count_overlaps(runs: TextRuns, prompts: Sequence[str]) -> int:
    """Return how many prompts of a task appear in the texts."""
    split = [split_prompt(prompt) for prompt in prompts]
    uses = Counter(line for lines in split for line in set(lines))
    most = max(2, FRAME_SHARE * len(prompts))
    return sum(
        any(runs.contain(line) for line in lines if uses[line] <= most or len(lines) == 1)
        for lines in split
    )


def split_prompt(prompt: str) -> list[Words]:
    """Return the lines of at least RUN words, or all words as one line; none of a tiny prompt."""
    lines = [list_words(line) for line in prompt.splitlines()]
    long = [line for line in lines if len(line) >= RUN]
    whole = list_words(prompt)
    return long or ([whole] if len(whole) >= FEWEST_WORDS else [])


def count_covered(is_shared: Sequence[bool], length: int) -> int:
    """Return how many words lie in shared runs; `is_shared` has one entry per run."""
    covered, end = 0, 0
    for start, shared in enumerate(is_shared):
        if shared:
            covered += start + length - max(start, end)
            end = start + length
    return covered


def list_words(text: str) -> Words:
    """Return the words of a text in lower case, without punctuation; an ideograph is a word."""
    return tuple(_WORD.findall(text.lower()))


def hash_runs(words: Words, length: int) -> list[int]:
    """Return a hash of every run of `length` words."""
    return [hash(words[i : i + length]) for i in range(len(words) - length + 1)]
