"""Lower bound: CPU seconds of the matrix products that one pass over the calibration text needs.

    OMP_NUM_THREADS=1 taskset --cpu-list 1 .venv/bin/python tests/external/real_model/floor.py

Times SmolLM2-135M's linears in bfloat16 and torch's attention over 32 x 512 tokens once, and the
grams of their inputs in float32, as in a build. No build that calibrates on the whole text is
faster than this. Compare it with a quarter of the fastest peer's CPU time (`make bench-peers`) on
the same machine.
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
"""[out, in] of q, k, v, o, gate, up and down. Attention repeats keys and values to all heads, as
transformers does."""
INPUTS = (576, 576, 576, 1536)
"""Input widths of (q, k, v), o, (gate, up) and down; one gram each."""
SEQUENCES, LENGTH, BATCH = 32, 512, 8
REPEATS = 6


def measure_cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, averaged after a warm-up call."""
    work()
    start = time.process_time()
    for _ in range(REPEATS):
        work()
    return (time.process_time() - start) / REPEATS


def time_linear(out: int, width: int) -> float:
    """Time a linear layer on one batch."""
    x, weight = (torch.randn(rows, width).bfloat16() for rows in (BATCH * LENGTH, out))
    return measure_cpu_seconds(lambda: functional.linear(x, weight))


def time_gram(width: int) -> float:
    """Time the accumulation of the gram of one batch of inputs."""
    x, total = torch.randn(width, BATCH * LENGTH), torch.zeros(width, width)
    return measure_cpu_seconds(lambda: matmul.add_symmetric(total, x, x))


def time_attention() -> float:
    """Time causal attention on one batch."""
    x = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM).bfloat16()
    return measure_cpu_seconds(
        lambda: functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    )


def main() -> None:
    """Measure and print the CPU seconds."""
    torch.set_num_threads(1)
    runs = BLOCKS * SEQUENCES // BATCH
    linears, grams = (
        runs * sum(time_linear(*shape) for shape in LINEARS),
        runs * sum(map(time_gram, INPUTS)),
    )
    attentions = runs * time_attention()
    sys.stdout.write(
        f"CPU s: linears {linears:.1f}, grams {grams:.1f}, attention {attentions:.1f}; "
        f"total {linears + grams + attentions:.1f}\n"
    )


if __name__ == "__main__":
    main()
