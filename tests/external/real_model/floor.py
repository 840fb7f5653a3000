"""CPU seconds of the products alone that one run of the calibration text needs, on this machine.

    OMP_NUM_THREADS=1 taskset --cpu-list 1 .venv/bin/python tests/external/real_model/floor.py

SmolLM2-135M's linears in bfloat16 and torch's attention over 32 x 512 tokens once, and the grams of their inputs in
float32, as a build computes them: what no build that learns from all of the text goes below, whatever it does beside.
Compare it with a quarter of the fastest peer's CPU time (`make bench-peers`) on the same machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from quantkit.numerics import matmul

BLOCKS, HEADS, HEAD_DIM = 30, 9, 64
LINEARS = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""[out, in] of q, k, v, o, gate, up and down; keys and values are repeated to all heads, as transformers does."""
INPUTS = (576, 576, 576, 1536)
"""Widths of what q, k and v, what o, what gate and up, and what down read: a gram each."""
SEQUENCES, LENGTH, TOGETHER = 32, 512, 8
REPEATS = 6


def measure_cpu_seconds(work: Callable[[], object]) -> float:
    """Of one call, after one that warms up."""
    work()
    began = time.process_time()
    for _ in range(REPEATS):
        work()
    return (time.process_time() - began) / REPEATS


def time_linear(out: int, width: int) -> float:
    """A linear layer over the tokens that are run together."""
    x, weight = (torch.randn(rows, width).bfloat16() for rows in (TOGETHER * LENGTH, out))
    return measure_cpu_seconds(lambda: functional.linear(x, weight))


def time_gram(width: int) -> float:
    """The gram of their inputs, added up."""
    x, total = torch.randn(width, TOGETHER * LENGTH), torch.zeros(width, width)
    return measure_cpu_seconds(lambda: matmul.add_symmetric(total, x, x))


def time_attention() -> float:
    """Causal attention of the sequences that are run together."""
    x = torch.randn(TOGETHER, HEADS, LENGTH, HEAD_DIM).bfloat16()
    return measure_cpu_seconds(
        lambda: functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    runs = BLOCKS * SEQUENCES // TOGETHER
    linears, grams = (
        runs * sum(time_linear(*shape) for shape in LINEARS),
        runs * sum(map(time_gram, INPUTS)),
    )
    attended = runs * time_attention()
    sys.stdout.write(
        f"CPU s: linears {linears:.1f}, grams {grams:.1f}, attention {attended:.1f}; "
        f"together {linears + grams + attended:.1f}\n"
    )


if __name__ == "__main__":
    main()
