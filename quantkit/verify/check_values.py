"""Are the numbers of a tensor what its format asks for? numpy on the stored bits, piece by piece; no torch.

bfloat16 and FP8 are unknown to numpy, so every dtype is looked at as unsigned integers: above the sign bit, a larger
exponent is a larger integer, and NaN and infinity are the largest. One minimum or maximum answers for a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantkit.contracts import TensorSpec
from quantkit.formats.common.checks import ValueCheck

Words = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


@dataclass(frozen=True, kw_only=True)
class Bits:
    """A floating dtype as unsigned words: mask without the sign; smallest word that is not finite; smallest normal."""

    words: str
    mask: int
    special: int
    normal: int


FLOATS: Mapping[str, Bits] = {
    "BF16": Bits(words="<u2", mask=0x7FFF, special=0x7F80, normal=0x0080),
    "F16": Bits(words="<u2", mask=0x7FFF, special=0x7C00, normal=0x0400),
    "F32": Bits(words="<u4", mask=0x7FFFFFFF, special=0x7F800000, normal=0x00800000),
    "F64": Bits(words="<u8", mask=(1 << 63) - 1, special=0x7FF << 52, normal=1 << 52),
    "F8_E4M3": Bits(
        words="u1", mask=0x7F, special=0x7F, normal=0x08
    ),  # all ones is NaN, there is no infinity
    "F8_E5M2": Bits(words="u1", mask=0x7F, special=0x7C, normal=0x04),
}
WHOLE_LIMIT_BYTES = 1 << 20
"""A tensor that is looked at as a whole is smaller than this."""

MEANING = {
    "finite": "a finite number",
    "scale": "a normal number above 0",
    "magnitude": "a finite number of 0 or more",
    "rising": "numbers that rise",
}


@dataclass(kw_only=True)
class Watch:
    """One tensor under scrutiny: pieces come in order, `fault` is the first thing that is wrong."""

    spec: TensorSpec
    wanted: ValueCheck
    fault: str | None = None
    whole: bytearray = field(default_factory=bytearray)

    def see(self, begin: int, piece: memoryview) -> None:
        """Look at the bytes that begin at byte `begin` of the tensor."""
        if self.fault is not None:
            return
        kind = self.wanted.kind
        if kind in {"whole", "rising"}:
            if len(self.whole) < WHOLE_LIMIT_BYTES:
                self.whole += piece
        elif kind == "repeated":
            self.repeated(begin, piece)
        elif kind == "groups":
            self.groups(begin, piece)
        else:
            self.numbers(begin, piece)

    def close(self) -> str | None:
        """The sentence for what is wrong, once every piece was seen; None when all is well."""
        if self.fault is None and self.wanted.kind == "whole" and self.wanted.find_fault:
            self.fault = self.wanted.find_fault(bytes(self.whole))
        if self.fault is None and self.wanted.kind == "rising":
            self.rising()
        return None if self.fault is None else f"tensor {self.spec.name}: {self.fault}"

    def numbers(self, begin: int, piece: memoryview) -> None:
        """finite, scale and magnitude: words of a floating dtype."""
        bits = FLOATS.get(self.spec.dtype)
        if bits is None:
            self.fault = f"expected a floating dtype, found {self.spec.dtype}"
            return
        words: Words = np.frombuffer(piece, dtype=bits.words)
        kind = self.wanted.kind
        if kind == "scale":
            good = int(words.min()) >= bits.normal and int(words.max()) < bits.special
        elif kind == "magnitude":
            good = int(words.max()) < bits.special
        else:
            good = int((words & words.dtype.type(bits.mask)).max()) < bits.special
        if not good:
            self.fault = self.first_bad(words, bits, begin // words.itemsize)

    def first_bad(self, words: Words, bits: Bits, first: int) -> str:
        """What is wrong with which element."""
        if self.wanted.kind == "scale":
            wrong = (words < bits.normal) | (words >= bits.special)
        elif self.wanted.kind == "magnitude":
            wrong = words >= bits.special
        else:
            wrong = (words & words.dtype.type(bits.mask)) >= bits.special
        index = int(np.flatnonzero(wrong)[0])
        found = decimal(int(words[index]), self.spec.dtype)
        return f"expected {MEANING[self.wanted.kind]}, found {found} at {self.place(first + index)}"

    def repeated(self, begin: int, piece: memoryview) -> None:
        """A pattern over and over: the zero points of a symmetric scheme."""
        pattern = self.wanted.pattern
        words, one = np.frombuffer(piece, dtype="u1"), np.frombuffer(pattern, dtype="u1")
        expected = np.resize(np.roll(one, -(begin % len(pattern))), words.shape)
        if not np.array_equal(words, expected):
            byte = begin + int(np.flatnonzero(words != expected)[0])
            self.fault = f"expected the symmetric scheme's zero point, found another at {self.place(byte // 4)}"

    def groups(self, begin: int, piece: memoryview) -> None:
        """g_idx: the group of each input channel."""
        found = np.frombuffer(piece, dtype="<i4")
        first = begin // 4
        expected = np.arange(first, first + len(found)) // self.wanted.group
        if not np.array_equal(found, expected):
            index = int(np.flatnonzero(found != expected)[0])
            self.fault = f"expected group {expected[index]}, found {found[index]} at {self.place(first + index)}"

    def rising(self) -> None:
        """A table of values."""
        values = np.frombuffer(bytes(self.whole), dtype="<f4")
        if not bool(np.isfinite(values).all() and (np.diff(values) > 0).all()):
            self.fault = f"expected {MEANING['rising']}, found others"

    def place(self, element: int) -> str:
        """An element's index: [3, 17]."""
        return (
            str([int(i) for i in np.unravel_index(element, self.spec.shape)])
            if self.spec.shape
            else "its one place"
        )


def decimal(word: int, dtype: str) -> str:
    """The number that a word stands for: "nan", "-inf", "0.0"."""
    if dtype.startswith("F8"):
        return "nan" if dtype == "F8_E4M3" or word & 3 else "inf"
    if dtype == "BF16":
        return f"{np.array([word << 16], dtype='<u4').view('<f4')[0]:g}"
    kind = {"F16": ("<u2", "<f2"), "F32": ("<u4", "<f4"), "F64": ("<u8", "<f8")}[dtype]
    return f"{np.array([word], dtype=kind[0]).view(kind[1])[0]:g}"
