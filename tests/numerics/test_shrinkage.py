"""Shrinkage of a gram towards an isotropic input, against activations in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.build.quantize_linear import compute_codes, shrink_stats
from quantkit.contracts import InputStats, Scheme
from quantkit.numerics import affine
from quantkit.numerics.gram import shrink_gram

SCHEME = Scheme(bits=3, group_size=32, symmetric=True, scale_dtype="bfloat16")


def make_inputs(n: int, seed: int) -> torch.Tensor:
    """Inputs [n, 64] in a few directions, which the seed chooses."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 64, generator=random, dtype=torch.float64)
    return torch.randn(n, 6, generator=random, dtype=torch.float64) @ basis


@pytest.mark.parametrize("shrinkage", [0.05, 0.1, 0.5])
def test_shrunk_gram_is_that_of_isotropic_tokens_added(shrinkage: float) -> None:
    """The oracle appends isotropic tokens to the activations: no gram is scaled."""
    x = make_inputs(200, 0)
    energy = shrinkage / (1 - shrinkage) * x.square().sum() / x.shape[1]
    extra = torch.eye(64, dtype=torch.float64) * energy.sqrt()
    expected = torch.cat([x, extra]).T @ torch.cat([x, extra])
    torch.testing.assert_close(
        shrink_gram((x.T @ x).float(), shrinkage), expected.float(), rtol=1e-5, atol=1e-3
    )


def test_shrinkage_of_a_batch_is_that_of_each_and_leaves_the_input_alone() -> None:
    grams = torch.stack([(x.T @ x).float() for x in (make_inputs(90, 1), make_inputs(90, 2))])
    before = grams.clone()
    shrunk = shrink_gram(grams, 0.1)
    assert torch.equal(grams, before)
    assert torch.equal(shrunk, torch.stack([shrink_gram(gram, 0.1) for gram in grams]))


def test_no_shrinkage_is_the_same_gram() -> None:
    gram = torch.eye(3)
    assert shrink_gram(gram, 0.0) is gram
    assert shrink_stats(None, 0.1) is None


def test_shrunk_statistics_lose_less_on_unseen_inputs() -> None:
    """Codes that are chosen for six directions alone lose more on six others."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=random)
    seen, unseen = make_inputs(300, 4), make_inputs(300, 5)
    gram = (seen.T @ seen).float()
    stats = InputStats(
        gram=gram, mean_abs=seen.abs().mean(dim=0).float(), n_tokens=torch.tensor(300)
    )

    def measure_error(shrinkage: float) -> float:
        shrunk = shrink_stats(stats, shrinkage)
        assert shrunk is not None
        codes = compute_codes("gptq", "gptq", weight, replace(shrunk), SCHEME).quantized
        delta = (weight - affine.dequantize(codes, SCHEME)).double()
        return float(
            (unseen @ delta.T).square().sum() / (unseen @ weight.double().T).square().sum()
        )

    assert measure_error(0.1) < 0.9 * measure_error(0.0)
