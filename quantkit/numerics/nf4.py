"""NF4 (arXiv 2305.14314, section 3, appendix E): the nearest of 16 values times a block's absmax.

The values are quantiles of a normal distribution, as bitsandbytes defines them. Its codes are
reproduced bit for bit: a code is the number of midpoints between neighboring values that lie below
weight * (1 / absmax), in float32.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.contracts import Quantized
from quantkit.errors import NumericsError

BLOCK_SIZE = 64
"""Weights that share a scale; a row is a whole number of blocks, so that no block crosses rows."""

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of codes 0 .. 15; code 7 is zero."""

MIN_ABSMAX = 1e-38
"""Smallest absmax whose reciprocal is taken, so that a block of zeros has code 7."""

PIECE_BLOCKS = 1024
"""Blocks that are quantized at once: their float32 copy, 256 kB, stays in a core's cache."""


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., out, in] uint8 and absmax [..., out, in / 64] float32 of a weight.

    weight [..., out, in]. On a CPU the midpoints are counted one by one: bitsandbytes bisects for
    each weight, which takes 20 ns of one core instead of 2. Other devices use its kernel. Raises
    NumericsError if a weight is not finite or a row is not a whole number of blocks.
    """
    if weight.shape[-1] % BLOCK_SIZE:
        raise NumericsError(
            f"NF4 has blocks of {BLOCK_SIZE} weights, found rows of {weight.shape[-1]}; "
            "keep this linear"
        )
    is_cpu = weight.device.type == "cpu"
    codes, absmax = quantize_on_cpu(weight) if is_cpu else quantize_with_kernel(weight)
    if not bool(torch.isfinite(absmax).all()):
        raise NumericsError(
            "a weight to be quantized is NaN or infinite; every weight must be finite: check the "
            "source tensor"
        )
    groups = (*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE)
    return codes.reshape(weight.shape), absmax.reshape(groups)


def quantize_on_cpu(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [n, 64] and absmax [n], computed in pieces with numpy's vector comparisons."""
    blocks = weight.reshape(-1, BLOCK_SIZE)  # [..., out, in] -> [n, 64]
    codes, absmax = np.empty(blocks.shape, np.uint8), np.empty(len(blocks), np.float32)
    values = np.array(CODEBOOK, np.float32)
    midpoints = (values[:-1] + values[1:]) / 2
    buffer = np.empty((min(PIECE_BLOCKS, len(blocks)), BLOCK_SIZE), np.bool_)
    for first in range(0, len(blocks), PIECE_BLOCKS):
        piece = blocks[first : first + PIECE_BLOCKS].float().numpy()
        count, above = codes[first : first + len(piece)], buffer[: len(piece)]
        largest = absmax[first : first + len(piece)]
        np.abs(piece).max(axis=1, out=largest)  # [n, 64] -> [n]
        with np.errstate(invalid="ignore"):  # infinity times 0: `quantize_nf4` checks absmax
            x = piece * (1 / np.maximum(largest, np.float32(MIN_ABSMAX)))[:, None]
        np.greater(x, midpoints[0], out=count.view(np.bool_))
        for midpoint in midpoints[1:]:
            np.greater(x, midpoint, out=above)
            count += above.view(np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def quantize_with_kernel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [n, 64] and absmax [n] of a weight on an accelerator."""
    packed, state = import_bitsandbytes("functional").quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4"
    )
    pairs = torch.cat([packed >> 4, packed & 15], dim=1)  # [n * 32, 1] -> [n * 32, 2]
    return pairs.reshape(-1, BLOCK_SIZE), state.absmax


@cache  # called twice per matrix
def import_bitsandbytes(part: str) -> Any:
    """Import bitsandbytes.functional or bitsandbytes.nn; heavy, so imported on first use.

    On CPUs with bfloat16 instructions it logs the advice to install a package that would download
    compiled code; that message is suppressed.
    """
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        return import_module(f"bitsandbytes.{part}")
    finally:
        advice.setLevel(level)


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack two codes into a byte, the first in its high bits, row after row.

    [..., out, in] uint8 -> [n / 2, 1] uint8.
    """
    # [n / 2], the first code in the low byte; faster than every second byte
    both = codes.reshape(-1).view(torch.int16)
    return ((both << 4) | (both >> 8)).to(torch.uint8).unsqueeze(1)


def compute_mean(values: Tensor) -> Tensor:
    """Return the mean of [n] float32 as [] float32.

    It is summed in float64, in an order that does not depend on the number of threads.
    """
    total = values.double()
    while total.numel() > 1:
        padded = torch.nn.functional.pad(total, (0, -total.numel() % 256))
        total = padded.reshape(-1, 256).sum(dim=1)  # [n] -> [n / 256]
    return (total.reshape(()) / values.numel()).float()


def count_fallbacks(quantized: Quantized) -> dict[str, Tensor]:
    """Count the blocks of each matrix that took a named fallback; [...] int64.

    zero-group: every weight is zero.
    """
    return {"zero-group": (quantized.scale == 0).sum(dim=(-2, -1))}  # [..., out, n_groups] -> [...]
