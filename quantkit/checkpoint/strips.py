"""Decoding of a weight in strips of rows, so that memory holds little more than the result."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from quantkit.checkpoint.tensors import TORCH_DTYPES

STRIP_ELEMENTS = 1 << 20
"""Elements of a strip; its float32 values take 4 MB."""


def decode_strips(
    strip: Callable[[int, int], Tensor],
    start: int,
    stop: int,
    shape: tuple[int, ...],
    dtype: str,
) -> Tensor:
    """Return rows start .. stop-1 of a weight: [stop - start, *shape] in a safetensors dtype.

    strip(i, j): rows i .. j-1, [j - i, *shape] float32. They are rounded once.
    """
    result = torch.empty(stop - start, *shape, dtype=TORCH_DTYPES[dtype])
    step = max(1, STRIP_ELEMENTS // max(1, prod(shape)))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        result[first - start : last - start] = strip(first, last)
    return result
