"""Packing of n-bit codes into 32-bit words, in any slot order and along any axis.

Slot i of a word is its bits [i * bits, (i + 1) * bits), lowest first, and holds code order[i] of
the word's run of codes. The order is sequential for GPTQ and compressed-tensors, `AWQ_ORDER` for
AWQ. Codes whose width does not divide 32 (3 bits in GPTQ; 3, 5, 6 and 7 in compressed-tensors)
cross the ends of words without a gap: 32 codes fill as many words as a code has bits.

torch is imported by the two functions that pack: plans count codes without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor

WORD_BITS = 32

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's "gemm" layout: the order in which its kernel expects the eight codes of a word."""


def count_codes_per_run(bits: int) -> int:
    """Return the number of codes in the shortest run that ends with a word.

    That is one word's codes if `bits` divides 32, else 32 codes in `bits` words.
    """
    return WORD_BITS if WORD_BITS % bits else WORD_BITS // bits


def count_codes_per_word(bits: int) -> int:
    """Return the number of codes in one word; raises NumericsError if `bits` does not divide 32."""
    if bits < 1 or WORD_BITS % bits:
        raise NumericsError(
            f"codes of {bits} bits do not fill a 32-bit word; choose 1, 2, 4, 8, 16 or 32 bits"
        )
    return WORD_BITS // bits


def resolve_slot_order(bits: int, order: Sequence[int] | None) -> tuple[int, ...]:
    """Return the slot order of `bits`-bit codes, sequential if `order` is None.

    Raises NumericsError unless `order` is a permutation of a word's codes.
    """
    if order is None:
        return tuple(range(count_codes_per_run(bits)))
    slots = tuple(order)
    if sorted(slots) != list(range(count_codes_per_word(bits))):
        raise NumericsError(
            f"slot order {list(slots)} is not a permutation of 0 .. "
            f"{count_codes_per_word(bits) - 1}"
        )
    return slots


def pack(codes: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack codes in 0 .. 2**bits - 1, any integer dtype, into int32 words.

    `axis` shrinks by 32 / bits. Raises NumericsError if a code does not fit its slot (it would
    corrupt its neighbours) or if the axis is not a whole number of runs.
    """
    import torch

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
    runs = codes.movedim(axis, -1)
    runs = runs.unflatten(-1, (-1, len(order)))  # [..., n] -> [..., runs, codes of a run]
    count = len(order) * bits // WORD_BITS
    shape = (*runs.shape[:-1], count)  # [..., runs, words]
    words = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for slot, code in enumerate(order):
        word, shift = divmod(slot * bits, WORD_BITS)
        value = runs[..., code].to(torch.int32)
        # bits shifted past the top of the word are cut off; the sign is the word's last bit
        words[..., word] |= value << shift
        if shift + bits > WORD_BITS:
            words[..., word + 1] |= value >> WORD_BITS - shift
    return words.flatten(-2).movedim(-1, axis).contiguous()  # [..., runs, words] -> [..., words]


def unpack(words: Tensor, bits: int, axis: int, order: Sequence[int] | None = None) -> Tensor:
    """Unpack int32 words into codes, uint8 for up to 8 bits and int64 above; inverse of `pack`.

    `axis` grows by 32 / bits.
    """
    import torch

    if bits == 4 and order is None:
        return _unpack_nibbles(words, axis)
    order = resolve_slot_order(bits, order)
    count = len(order) * bits // WORD_BITS
    runs = words.movedim(axis, -1)
    runs = runs.unflatten(-1, (-1, count))  # [..., words] -> [..., runs, words]
    dtype = torch.uint8 if bits <= 8 else torch.int64
    shape = (*runs.shape[:-1], len(order))  # [..., runs, codes of a run]
    codes = torch.empty(shape, dtype=dtype, device=words.device)
    for slot, code in enumerate(order):
        word, shift = divmod(slot * bits, WORD_BITS)
        value = (runs[..., word].to(torch.int64) & 0xFFFFFFFF) >> shift
        if shift + bits > WORD_BITS:
            value |= runs[..., word + 1].to(torch.int64) << WORD_BITS - shift
        codes[..., code] = (value & (2**bits - 1)).to(dtype)
    codes = codes.flatten(-2)  # [..., runs, codes of a run] -> [..., n]
    return codes.movedim(-1, axis).contiguous()


def _unpack_nibbles(words: Tensor, axis: int) -> Tensor:
    """Unpack sequential 4-bit codes byte by byte, ten times as fast as word by word."""
    import torch

    # a copy: `contiguous` may keep another stride of an axis of size 1, and bytes need stride 1
    runs = words.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
    data = runs.view(torch.uint8)  # [..., words] -> [..., 4 words]
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)  # [..., 8 words]
    return codes.movedim(-1, axis).contiguous()


def unpack_first(words: Tensor, bits: int, axis: int, count: int) -> Tensor:
    """Unpack the first `count` sequential codes along an axis whose last run may be cut short."""
    import torch

    per_run = count_codes_per_run(bits) * bits // WORD_BITS
    lacking = -words.shape[axis] % per_run
    if lacking:
        padding = [0, 0] * (words.ndim - 1 - axis % words.ndim) + [0, lacking]
        words = torch.nn.functional.pad(words, padding)  # zeros after the last word of the axis
    return unpack(words, bits, axis).narrow(axis, 0, count)
