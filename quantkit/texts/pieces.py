"""The text that each token of a sequence adds, and single tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.texts.corpora import Tokenizer

CUT = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""


def split_text(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each of `ids` adds to that of the tokens before it.

    A token that ends inside a character adds nothing; the token that completes it adds the
    character. Tokens are decoded after their predecessors, because some tokenizers drop the space
    before the first token of a text.
    """
    pieces = list[str]()
    first, shown = 0, 0  # the predecessors whose text is known are ids[first:shown]
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[first:shown]) if shown > first else ""
        text = tokenizer.decode(ids[first:end])
        is_whole = len(text) > len(before) and not text.endswith(CUT)
        if is_whole or end == len(ids):
            pieces.append(text[len(before) :])
            first, shown = shown, end
        else:
            pieces.append("")
    return pieces


def name_tokens(tokenizer: Tokenizer, ids: Iterable[int], text: Sequence[int]) -> dict[int, str]:
    """Return each of `ids` as text, as it would continue a text: with its leading space.

    text: ids of any text, to decode after one of its tokens. A token without a text of whole
    characters is named by its number: "<token 17>".
    """
    anchor = next((x for x in text if is_plain(tokenizer.decode([x]))), None)
    before = "" if anchor is None else tokenizer.decode([anchor])
    names = dict[int, str]()
    for number in sorted(set(ids)):
        tokens = [number] if anchor is None else [anchor, number]
        try:
            after = tokenizer.decode(tokens)[len(before) :]
        except (IndexError, KeyError, TypeError):  # rows of the head that the tokenizer lacks
            after = ""
        names[number] = after if after and CUT not in after else f"<token {number}>"
    return names


def is_plain(text: str) -> bool:
    """Return whether a token's text is whole characters without white space at its end."""
    return bool(text) and CUT not in text and text == text.rstrip()
