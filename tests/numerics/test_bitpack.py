"""Packing against the golden words of the format descriptions, and round trips."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import NumericsError
from quantkit.numerics import bitpack

MATRIX = torch.tensor([[(3 * (8 * k + n) + 1) % 16 for n in range(8)] for k in range(8)])
"""The example matrix M [in, out] of quantkit/formats/README.md."""


def test_sequential_words_along_in_equal_gptq() -> None:
    """The words of the `gptq` layout."""
    expected = [
        -1852730991,
        -993737532,
        -134744073,
        707406378,
        1566399837,
        -2139062144,
        -1280068685,
        -421075226,
    ]
    assert bitpack.pack(MATRIX, 4, axis=0).tolist() == [expected]
    assert bitpack.pack(MATRIX.T, 4, axis=1).tolist() == [
        [word] for word in expected
    ]  # compressed-tensors: [out, in / 8]


def test_sequential_zero_points_of_gptq_v2() -> None:
    """The words of the `gptq_v2` layout: zeros 8 1 2 3 4 5 6 15 are 0xF6543218."""
    assert (
        bitpack.pack(torch.tensor([[8, 1, 2, 3, 4, 5, 6, 15]]), 4, axis=1).item() & 0xFFFFFFFF
        == 0xF6543218
    )


@given(st.data(), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([0, 1, -1]))
def test_unpack_inverts_pack(data: st.DataObject, bits: int, axis: int) -> None:
    count = 32 // bits
    order = data.draw(st.permutations(range(count)))
    shape = [3, 3]
    shape[axis] = 2 * count
    codes = torch.randint(
        0, 2**bits, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    packed = bitpack.pack(codes, bits, axis, order)
    assert packed.dtype == torch.int32 and packed.shape[axis] == 2
    assert torch.equal(bitpack.unpack(packed, bits, axis, order).long(), codes)


def gptq_three_bits(codes: list[int]) -> list[int]:
    """Pack 32 codes in three words as AutoGPTQ does: ten, one across, ten, one across, ten."""
    first = sum(codes[i] << 3 * i for i in range(11)) & 0xFFFFFFFF
    second = codes[10] >> 2 | sum(codes[11 + i] << 3 * i + 1 for i in range(11)) & 0xFFFFFFFF
    third = codes[21] >> 1 | sum(codes[22 + i] << 3 * i + 2 for i in range(10))
    return [first, second, third]


@given(st.lists(st.integers(0, 7), min_size=64, max_size=64))
def test_three_bit_codes_cross_word_ends(codes: list[int]) -> None:
    packed = bitpack.pack(torch.tensor([codes]), 3, axis=1)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == gptq_three_bits(
        codes[:32]
    ) + gptq_three_bits(codes[32:])
    assert bitpack.unpack(packed, 3, axis=1)[0].tolist() == codes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_pack_equals_compressed_tensors_at_any_width(bits: int, axis: Literal[0, 1]) -> None:
    """Its codes are signed: the middle of the range is subtracted."""
    codes = torch.randint(0, 2**bits, (64, 96), generator=torch.Generator().manual_seed(bits))
    packed = bitpack.pack(codes, bits, axis)
    assert torch.equal(
        packed, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits, packed_dim=axis)
    )
    assert torch.equal(bitpack.unpack(packed, bits, axis).long(), codes)


def test_pack_rejects_codes_that_do_not_fit() -> None:
    with pytest.raises(NumericsError, match="codes from 0 to 16 do not fit 4 bits"):
        bitpack.pack(torch.tensor([[0] * 7 + [16]]), 4, axis=1)
    with pytest.raises(NumericsError, match="codes from -1 to 0 do not fit"):
        bitpack.pack(torch.tensor([[0] * 7 + [-1]]), 4, axis=1)
    with pytest.raises(NumericsError, match="axis of 9 codes is no multiple of the 8 codes"):
        bitpack.pack(torch.zeros(1, 9, dtype=torch.int64), 4, axis=1)
    with pytest.raises(
        NumericsError, match=r"axis of 8 codes is no multiple of the 32 codes in 3 32-bit words"
    ):
        bitpack.pack(torch.zeros(1, 8, dtype=torch.int64), 3, axis=1)
    with pytest.raises(NumericsError, match="codes of 3 bits do not fill a 32-bit word"):
        bitpack.pack(torch.zeros(1, 32, dtype=torch.int64), 3, axis=1, order=tuple(range(32)))
    with pytest.raises(NumericsError, match="not a permutation of 0 .. 7"):
        bitpack.pack(
            torch.zeros(1, 8, dtype=torch.int64), 4, axis=1, order=(0, 1, 2, 3, 4, 5, 6, 6)
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_first_codes_of_a_cut_run_are_unpacked(bits: int, axis: int) -> None:
    """compressed-tensors cuts the words after the last code; one word along the axis is enough."""
    for count in (1, 7, 32, 33):
        shape = (3, count) if axis else (count, 3)
        codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(count))
        padding = [0, -count % 32] if axis else [0, 0, 0, -count % 32]
        words = bitpack.pack(torch.nn.functional.pad(codes, padding), bits, axis)
        cut = words.narrow(axis, 0, -(-count * bits // 32))
        assert torch.equal(bitpack.unpack_first(cut, bits, axis, count).long(), codes)
