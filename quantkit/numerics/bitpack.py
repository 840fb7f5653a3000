"""Packing n-bit codes into 32-bit words, in any slot order and along any axis.

Slot i of a word is its bits [i * bits, (i + 1) * bits), lowest first, and holds code order[i] of the word's run of
codes. The order is sequential for GPTQ and compressed-tensors, `AWQ_ORDER` for AWQ. Codes of widths that do not divide
32 (3 bits in GPTQ; 3, 5, 6 and 7 in compressed-tensors) run on over the words' ends without a gap: 32 codes in as many
words as a code has bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics.runs import WORD_BITS, count_codes_per_run

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's "gemm" layout: the order in which its kernel wants the eight codes of a word."""


def count_codes_per_word(bits: int) -> int:
    """Codes in one word; raises NumericsError for widths that do not fill 32 bits."""
    if bits < 1 or WORD_BITS % bits:
        raise NumericsError(
            f"codes of {bits} bits do not fill a 32-bit word; choose 1, 2, 4, 8, 16 or 32 bits"
        )
    return WORD_BITS // bits


def resolve_slot_order(bits: int, order: Sequence[int] | None) -> tuple[int, ...]:
    """The slot order for `bits`-bit codes, sequential by default; raises NumericsError unless it is a permutation."""
    if order is None:
        return tuple(range(count_codes_per_run(bits)))
    chosen = tuple(order)
    if sorted(chosen) != list(range(count_codes_per_word(bits))):
        raise NumericsError(
            f"slot order {list(chosen)} is not a permutation of 0 .. {count_codes_per_word(bits) - 1}"
        )
    return chosen


def pack(codes: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes in 0 .. 2**bits - 1, any integer dtype -> int32 words; `axis` shrinks by 32 / bits.

    Raises NumericsError when a code does not fit its slot (it would corrupt its neighbours) or the axis is no whole
    number of runs.
    """
    order = resolve_slot_order(bits, order)
    if codes.shape[axis] % len(order):
        run = "a 32-bit word" if WORD_BITS % bits == 0 else f"{bits} 32-bit words"
        raise NumericsError(
            f"axis of {codes.shape[axis]} codes is no multiple of the {len(order)} codes in {run}"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise NumericsError(
            f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits"
        )
    runs = codes.movedim(axis, -1).unflatten(
        -1, (-1, len(order))
    )  # [..., n] -> [..., runs, codes of a run]
    count = len(order) * bits // WORD_BITS
    words = torch.zeros(
        (*runs.shape[:-1], count), dtype=torch.int32, device=codes.device
    )  # [..., runs, words]
    for slot, code in enumerate(order):
        word, shift = divmod(slot * bits, WORD_BITS)
        value = runs[..., code].to(torch.int32)
        words[..., word] |= (
            value << shift
        )  # what leaves a word at its top is cut off; the sign is its last bit
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= value >> WORD_BITS - shift
    return words.flatten(-2).movedim(-1, axis).contiguous()  # [..., runs, words] -> [..., words]


def unpack(words: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 words -> codes, uint8 for up to 8 bits and int64 above; `axis` grows by 32 / bits. Inverse of `pack`."""
    order = resolve_slot_order(bits, order)
    runs = words.movedim(axis, -1).unflatten(
        -1, (-1, len(order) * bits // WORD_BITS)
    )  # [..., words] -> [..., runs, words]
    dtype = torch.uint8 if bits <= 8 else torch.int64
    codes = torch.empty(
        (*runs.shape[:-1], len(order)), dtype=dtype, device=words.device
    )  # [..., runs, codes of a run]
    for slot, code in enumerate(order):
        word, shift = divmod(slot * bits, WORD_BITS)
        value = (runs[..., word].to(torch.int64) & 0xFFFFFFFF) >> shift
        if shift + bits > WORD_BITS:
            value |= runs[..., word + 1].to(torch.int64) << WORD_BITS - shift
        codes[..., code] = (value & (2**bits - 1)).to(dtype)
    return (
        codes.flatten(-2).movedim(-1, axis).contiguous()
    )  # [..., runs, codes of a run] -> [..., n]
