"""oneDNN products: correct, symmetric from one half, the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.numerics import gram, matmul

SHAPES = [
    (7, 256, 512),
    (100, 256, 70),
    (1, 576, 576),
    (513, 1111, 257),
    (16, 16384, 16),
    (576, 1536, 1536),
]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def has_amx() -> bool:
    """Return whether this CPU has tiles for products of bfloat16."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("left", "right"), [((5, 7), (3, 7)), ((2, 5, 7), (3, 7)), ((2, 1, 5, 7), (4, 3, 7))]
)
def test_leading_dimensions_broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = random(0, *left), random(1, *right)
    result, expected = matmul.matmul_transposed(x, y), x.double() @ y.double().mT
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_slices_and_transposed_tensors_multiply_correctly() -> None:
    x, y = random(2, 40, 60), random(3, 60, 50)
    result = matmul.matmul_transposed(x[10:, ::2], y.T[5:, ::2])
    assert torch.allclose(
        result.double(), x.double()[10:, ::2] @ y.double()[::2, 5:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("width", [16, matmul.TILE, matmul.TILE + 1, 3 * matmul.TILE - 5])
def test_half_gram_and_its_mirror_equal_the_full_gram(width: int) -> None:
    x = random(4, 300, width)
    total, absolute = torch.zeros(width, width), torch.zeros(width)
    for part in x.split(100):
        gram.accumulate_gram(total, absolute, part)
    result = gram.complete_gram(total)
    assert np.allclose(result.numpy(), (x.double().T @ x.double()).numpy(), rtol=1e-5, atol=1e-4)
    assert torch.equal(result, result.T)


def test_bfloat16_tokens_are_multiplied_exactly() -> None:
    """Products of bfloat16 values fit float32; only their sum is rounded."""
    x = random(5, 200, 24).bfloat16()
    total, absolute = torch.zeros(24, 24), torch.zeros(24)
    gram.accumulate_gram(total, absolute, x)
    assert np.allclose(total.numpy(), (x.double().T @ x.double()).numpy(), rtol=1e-6, atol=1e-4)
    assert np.allclose(absolute.numpy(), x.double().abs().sum(0).numpy(), rtol=1e-6)


@pytest.mark.usefixtures("threads")
def test_products_do_not_depend_on_threads() -> None:
    """Float32 of grams and errors, bfloat16 of the layers of the calibration stream.

    oneDNN's AMX products of bfloat16 do depend on them (numerics/README.md).
    """
    result = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        pairs = [(random(m, m, k), random(n, n, k)) for m, k, n in SHAPES]
        exact = [matmul.matmul_transposed(x, y) for x, y in pairs]
        result.append((
            exact,
            [torch.nn.functional.linear(x.bfloat16(), y.bfloat16()) for x, y in pairs],
        ))
    for exact, coarse in result[1:]:
        assert all(a.equal(b) for a, b in zip(exact, result[0][0], strict=True))
        if not has_amx():
            assert all(a.equal(b) for a, b in zip(coarse, result[0][1], strict=True))
