"""Checks of a tensor's values against its format, by numpy on the stored bits; no torch.

numpy lacks bfloat16 and FP8, so every dtype is read as unsigned integers: above the sign bit, a
larger exponent is a larger integer, and NaN and infinity are the largest. One minimum or maximum
decides for a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantkit.contracts import TensorSpec
from quantkit.formats.common.checks import ValueCheck

WordArray = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


@dataclass(frozen=True, kw_only=True)
class FloatBits:
    """A floating dtype as unsigned words.

    mask: all bits but the sign; special: the smallest word that is not finite; normal: the smallest
    normal number.
    """

    words: str
    mask: int
    special: int
    normal: int


FLOATS: Mapping[str, FloatBits] = {
    "BF16": FloatBits(words="<u2", mask=0x7FFF, special=0x7F80, normal=0x0080),
    "F16": FloatBits(words="<u2", mask=0x7FFF, special=0x7C00, normal=0x0400),
    "F32": FloatBits(words="<u4", mask=0x7FFFFFFF, special=0x7F800000, normal=0x00800000),
    "F64": FloatBits(words="<u8", mask=(1 << 63) - 1, special=0x7FF << 52, normal=1 << 52),
    "F8_E4M3": FloatBits(
        words="u1", mask=0x7F, special=0x7F, normal=0x08
    ),  # all ones is NaN; there is no infinity
    "F8_E5M2": FloatBits(words="u1", mask=0x7F, special=0x7C, normal=0x04),
}
WHOLE_LIMIT_BYTES = 1 << 20
"""Largest tensor that is checked as a whole."""

EXPECTED = {
    "finite": "a finite number",
    "scale": "a normal number above 0",
    "magnitude": "a finite number of 0 or more",
    "rising": "numbers that rise",
}


@dataclass(kw_only=True)
class ValueChecker:
    """Checks one tensor: pieces come in order, `fault` is the first thing that is wrong."""

    spec: TensorSpec
    check: ValueCheck
    fault: str | None = None
    whole: bytearray = field(default_factory=bytearray)

    def check_piece(self, begin: int, piece: memoryview) -> None:
        """Check the bytes that begin at byte `begin` of the tensor."""
        if self.fault is not None:
            return
        kind = self.check.kind
        if kind in {"whole", "rising"}:
            if len(self.whole) < WHOLE_LIMIT_BYTES:
                self.whole += piece
        elif kind == "repeated":
            self.check_repeated(begin, piece)
        elif kind == "groups":
            self.check_groups(begin, piece)
        else:
            self.check_numbers(begin, piece)

    def finish(self) -> str | None:
        """Return the fault after all pieces, or None."""
        if self.fault is None and self.check.kind == "whole" and self.check.find_fault:
            self.fault = self.check.find_fault(bytes(self.whole))
        if self.fault is None and self.check.kind == "rising":
            self.check_rising()
        return None if self.fault is None else f"tensor {self.spec.name}: {self.fault}"

    def check_numbers(self, begin: int, piece: memoryview) -> None:
        """Check words of a floating dtype: kinds finite, scale and magnitude."""
        bits = FLOATS.get(self.spec.dtype)
        if bits is None:
            self.fault = f"expected a floating dtype, found {self.spec.dtype}"
            return
        words: WordArray = np.frombuffer(piece, dtype=bits.words)
        kind = self.check.kind
        if kind == "scale":
            good = int(words.min()) >= bits.normal and int(words.max()) < bits.special
        elif kind == "magnitude":
            good = int(words.max()) < bits.special
        else:
            good = int((words & words.dtype.type(bits.mask)).max()) < bits.special
        if not good:
            self.fault = self.describe_first_bad(words, bits, begin // words.itemsize)

    def describe_first_bad(self, words: WordArray, bits: FloatBits, first: int) -> str:
        """Describe the first bad element."""
        if self.check.kind == "scale":
            wrong = (words < bits.normal) | (words >= bits.special)
        elif self.check.kind == "magnitude":
            wrong = words >= bits.special
        else:
            wrong = (words & words.dtype.type(bits.mask)) >= bits.special
        index = int(np.flatnonzero(wrong)[0])
        value = format_word(int(words[index]), self.spec.dtype)
        return (
            f"expected {EXPECTED[self.check.kind]}, found {value} at "
            f"{self.format_index(first + index)}"
        )

    def check_repeated(self, begin: int, piece: memoryview) -> None:
        """Check a repeated pattern: the zero points of a symmetric scheme."""
        pattern = self.check.pattern
        words, one = np.frombuffer(piece, dtype="u1"), np.frombuffer(pattern, dtype="u1")
        expected = np.resize(np.roll(one, -(begin % len(pattern))), words.shape)
        if not np.array_equal(words, expected):
            byte = begin + int(np.flatnonzero(words != expected)[0])
            self.fault = (
                "expected the symmetric scheme's zero point, found another at "
                f"{self.format_index(byte // 4)}"
            )

    def check_groups(self, begin: int, piece: memoryview) -> None:
        """Check g_idx: the group of each input channel."""
        indices = np.frombuffer(piece, dtype="<i4")
        first = begin // 4
        expected = np.arange(first, first + len(indices)) // self.check.group
        if not np.array_equal(indices, expected):
            index = int(np.flatnonzero(indices != expected)[0])
            self.fault = (
                f"expected group {expected[index]}, found {indices[index]} at "
                f"{self.format_index(first + index)}"
            )

    def check_rising(self) -> None:
        """Check a rising table of values."""
        values = np.frombuffer(bytes(self.whole), dtype="<f4")
        if not bool(np.isfinite(values).all() and (np.diff(values) > 0).all()):
            self.fault = f"expected {EXPECTED['rising']}, found others"

    def format_index(self, element: int) -> str:
        """Format an element's index: "[3, 17]"."""
        return (
            str([int(i) for i in np.unravel_index(element, self.spec.shape)])
            if self.spec.shape
            else "its one place"
        )


def format_word(word: int, dtype: str) -> str:
    """Format the number that a word stands for: "nan", "-inf", "0.0"."""
    if dtype.startswith("F8"):
        return "nan" if dtype == "F8_E4M3" or word & 3 else "inf"
    if dtype == "BF16":
        return f"{np.array([word << 16], dtype='<u4').view('<f4')[0]:g}"
    kind = {"F16": ("<u2", "<f2"), "F32": ("<u4", "<f4"), "F64": ("<u8", "<f8")}[dtype]
    return f"{np.array([word], dtype=kind[0]).view(kind[1])[0]:g}"
