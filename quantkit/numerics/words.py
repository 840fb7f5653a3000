"""Packing n-bit codes into 32-bit words, in any slot order and along any axis.

Slot i of a word is its bits [i * bits, (i + 1) * bits), lowest first, and holds code order[i] of the word's run of
codes. The order is sequential for GPTQ and compressed-tensors, `AWQ_ORDER` for AWQ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import NumericsError

WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's "gemm" layout: the order in which its kernel wants the eight codes of a word."""


def per_word(bits: int) -> int:
    """Codes in one word; raises NumericsError for widths that do not fill 32 bits."""
    if bits < 1 or WORD_BITS % bits:
        raise NumericsError(f"codes of {bits} bits do not fill a 32-bit word; choose 1, 2, 4, 8, 16 or 32 bits")
    return WORD_BITS // bits


def slots(bits: int, order: Sequence[int] | None) -> tuple[int, ...]:
    """The slot order for `bits`-bit codes, sequential by default; raises NumericsError unless it is a permutation."""
    chosen = tuple(range(per_word(bits)) if order is None else order)
    if sorted(chosen) != list(range(per_word(bits))):
        raise NumericsError(f"slot order {list(chosen)} is not a permutation of 0 .. {per_word(bits) - 1}")
    return chosen


def pack(codes: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes in 0 .. 2**bits - 1, any integer dtype -> int32 words; `axis` shrinks by 32 / bits.

    Raises NumericsError when a code does not fit its slot (it would corrupt its neighbours) or the axis is no whole
    number of words.
    """
    order, count = slots(bits, order), per_word(bits)
    if codes.shape[axis] % count:
        raise NumericsError(f"axis of {codes.shape[axis]} codes is no multiple of the {count} codes in a 32-bit word")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise NumericsError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    runs = codes.movedim(axis, -1).unflatten(-1, (-1, count))  # [..., n] -> [..., words, count]
    words = torch.zeros(runs.shape[:-1], dtype=torch.int32, device=codes.device)
    for slot, code in enumerate(order):
        words |= runs[..., code].to(torch.int32) << slot * bits  # the top slot reaches the sign bit, as engines expect
    return words.movedim(-1, axis).contiguous()


def unpack(words: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 words -> codes, uint8 for up to 8 bits and int64 above; `axis` grows by 32 / bits. Inverse of `pack`."""
    order = slots(bits, order)
    last = words.movedim(axis, -1)
    dtype = torch.uint8 if bits <= 8 else torch.int64
    codes = torch.empty((*last.shape, len(order)), dtype=dtype, device=words.device)  # [..., words, count]
    for slot, code in enumerate(order):
        codes[..., code] = ((last.to(torch.int64) >> slot * bits) & (2**bits - 1)).to(dtype)
    return codes.flatten(-2).movedim(-1, axis).contiguous()  # [..., words, count] -> [..., n]
