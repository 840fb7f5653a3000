"""Tokens as text: the pieces of a text joined are the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from quantkit.io import package_data
from quantkit.texts import corpora
from quantkit.texts.pieces import name_tokens, split_text

TEXTS = ("def add(a, b):\n    return a + b\n", "naïve 火星 \U0001f680 x", "  two  spaces ", "a")


class ByteTokenizer:
    """A token per byte of UTF-8; decoding drops a space at the start, as SentencePiece does."""

    bos_token_id = eos_token_id = None

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace").removeprefix(" ")

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(line.encode()) for line in text]}


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_bytes_join_to_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = list(text.encode())
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_real_tokenizer_join_to_the_text(text: str) -> None:
    tokenizer = corpora.load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    (ids,) = tokenizer([text], add_special_tokens=True, verbose=False)["input_ids"]
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)


def test_text_that_ends_inside_a_character_keeps_its_last_bytes() -> None:
    pieces = split_text(ByteTokenizer(), list("ab火".encode())[:-1])
    assert pieces == ["a", "b", "", "\ufffd"]


def test_tokens_are_named_as_they_continue_a_text() -> None:
    """With the leading space that decoding them alone would drop; bytes have no text."""
    names = name_tokens(ByteTokenizer(), [ord("x"), ord(" "), 0xE7, 0xE7], list(" 火b".encode()))
    assert names == {ord("x"): "x", ord(" "): " ", 0xE7: "<token 231>"}
