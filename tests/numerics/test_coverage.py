"""Coverage against an eigendecomposition in float64, and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from quantkit.numerics import coverage
from quantkit.numerics.coverage import DAMPING, CoverageFactor
from quantkit.numerics.gram import accumulate_gram, complete_gram


def make_inputs(tokens: int, channels: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Return correlated inputs [tokens, channels], channels of sizes over three decades."""
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, rank or channels, generator=g)
    mixing = torch.randn(rank or channels, channels, generator=g)
    sizes = 10 ** (3 * torch.rand(channels, generator=g) - 1)
    return factors * torch.logspace(0, -2, rank or channels) @ mixing * sizes


def size_one_channel(x: Tensor, share: float) -> Tensor:
    """Return x [n, in] with the energy of channel 0 at `share` of the mean over channels."""
    energy = x[:, 1:].square().sum() / x.shape[1]  # [n, in] -> []
    x[:, 0] = (share * energy / len(x)).sqrt()
    return x


def make_gram(x: Tensor) -> Tensor:
    """Return the gram of x [n, in] as a build sums it."""
    gram = torch.zeros(x.shape[1], x.shape[1])
    accumulate_gram(gram, torch.zeros(x.shape[1]), x)
    return complete_gram(gram)


def make_factor(x: Tensor) -> CoverageFactor:
    factor = coverage.factorize_coverage(make_gram(x))
    assert factor is not None
    return factor


def decompose(
    x: NDArray[np.float64], tokens: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return the unspanned share of each token and the effective rank, from the singular values of
    the calibration inputs x [n, in] themselves.
    """
    energy = np.square(x).sum(0)
    energy = np.maximum(energy, 1e-8 * energy.mean())
    _, singular, directions = np.linalg.svd(x / np.sqrt(energy), full_matrices=True)
    values = np.zeros(x.shape[1])
    values[: len(singular)] = singular**2
    parts = np.square((tokens / np.sqrt(energy)) @ directions.T)  # [k, in]
    shares = (parts * (DAMPING / (values + DAMPING))).sum(1) / parts.sum(1)
    return shares, float((values / (values + DAMPING)).sum())


@pytest.mark.parametrize(
    ("tokens", "channels", "rank"),
    [(1000, 300, None), (40, 129, None), (1, 128, None), (3000, 500, 60)],
)
def test_shares_and_rank_equal_an_eigendecomposition(
    tokens: int, channels: int, rank: int | None
) -> None:
    x, judged = make_inputs(tokens, channels, 0, rank), make_inputs(50, channels, seed=1)
    x[:, 3] = 0  # a channel that calibration never excites
    factor = make_factor(x)
    shares, effective = decompose(x.double().numpy(), judged.double().numpy())
    actual = coverage.compute_unspanned_shares(factor, judged)
    assert actual.numpy() == pytest.approx(shares, abs=1e-5)
    assert coverage.compute_effective_rank(factor) == pytest.approx(effective, abs=1e-2, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 300),
    channels=st.integers(1, 200),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_share_is_between_0_and_1_and_rank_at_most_tokens_and_channels(
    tokens: int, channels: int, size: float, seed: int
) -> None:
    x = size * make_inputs(tokens, channels, seed)
    factor = make_factor(x)
    shares = coverage.compute_unspanned_shares(factor, make_inputs(20, channels, seed + 1))
    assert bool(((shares >= 0) & (shares <= 1)).all())
    rank = coverage.compute_effective_rank(factor)
    assert 0 < rank <= min(tokens, channels)
    # over calibration itself, the energy outside is tr(C d (C + d I)^-1) = d r. The energy in all
    # is tr(C), which is n unless a channel has less than the least energy.
    energy = (x.double() ** 2 / factor.energy.double()).sum(1)  # [tokens]
    outside = float((energy * coverage.compute_unspanned_shares(factor, x)).sum())
    assert outside == pytest.approx(DAMPING * rank, rel=1e-2)


def test_channel_below_the_least_energy_keeps_the_energy_outside() -> None:
    x = size_one_channel(make_inputs(1, 29), share=0.5 * coverage.LEAST_ENERGY)
    factor = make_factor(x)
    energy = (x.double() ** 2 / factor.energy.double()).sum()
    assert 28.1 < float(energy) < 28.9  # tr(C): the channel counts only in part
    outside = float(energy * coverage.compute_unspanned_shares(factor, x)[0])
    assert outside == pytest.approx(DAMPING * coverage.compute_effective_rank(factor), rel=1e-3)


def test_gram_is_restored_bit_for_bit() -> None:
    for channels in (1, 127, 192, 385, 700):
        gram = make_gram(make_inputs(100, channels))
        before = gram.clone()
        factor = coverage.factorize_coverage(gram)
        assert factor is not None and not torch.equal(gram, before)
        coverage.restore_gram(factor)
        assert torch.equal(gram, before)


def test_triangles_that_differ_in_a_tile_are_restored_too() -> None:
    """Within a tile of a sum of outer products the two triangles are separate sums."""
    gram = make_gram(make_inputs(500, 192))
    gram[150, 20] *= 1 + 1e-6
    before = gram.clone()
    factor = coverage.factorize_coverage(gram)
    assert factor is not None
    coverage.restore_gram(factor)
    assert torch.equal(gram, before)


def test_directions_of_calibration_are_spanned_and_others_are_not() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    factor = make_factor(torch.randn(5000, 16, generator=g) @ basis[:16])
    inside = coverage.compute_unspanned_shares(
        factor, torch.randn(99, 16, generator=g) @ basis[:16]
    )
    outside = coverage.compute_unspanned_shares(
        factor, torch.randn(99, 48, generator=g) @ basis[16:]
    )
    assert float(inside.max()) < 0.1 < 0.7 < float(outside.min())
    assert coverage.compute_effective_rank(factor) == pytest.approx(16, abs=1)


def test_channel_that_calibration_never_excites_is_not_spanned() -> None:
    """Also if its activation is small next to the others."""
    x = make_inputs(1000, 64)
    x[:, 7] = 0
    token = x[:1].clone()
    before = coverage.compute_unspanned_shares(make_factor(x), token)
    token[0, 7] = 0.1 * float(x.square().mean().sqrt())
    after = coverage.compute_unspanned_shares(make_factor(x), token)
    assert float(before) < 0.5 and float(after) > 0.99


def test_scale_of_channels_changes_nothing() -> None:
    x, tokens = make_inputs(400, 150), make_inputs(30, 150, seed=1)
    scale = 2.0 ** torch.randint(-2, 3, (150,), generator=torch.Generator().manual_seed(0))
    one, two = (
        coverage.compute_unspanned_shares(make_factor(x * s), tokens * s)
        for s in (torch.ones(150), scale)
    )
    assert torch.allclose(one, two, atol=1e-5)


def test_zero_token_has_share_0_and_zero_gram_spans_nothing() -> None:
    zeros = torch.zeros(2, 40)
    assert coverage.compute_unspanned_shares(make_factor(make_inputs(99, 40)), zeros).eq(0).all()
    factor = make_factor(zeros)
    assert coverage.compute_unspanned_shares(factor, torch.ones(1, 40)) == pytest.approx(1)
    assert coverage.compute_effective_rank(factor) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
def test_gram_without_a_factor_is_reported_and_stays(value: float) -> None:
    gram = make_gram(make_inputs(100, 200))
    gram[150, 150] = value
    before = gram.clone()
    assert coverage.factorize_coverage(gram) is None
    assert torch.equal(gram.nan_to_num(-3), before.nan_to_num(-3))


def test_tokens_are_not_changed() -> None:
    tokens = make_inputs(5, 40)
    before = tokens.clone()
    coverage.compute_unspanned_shares(make_factor(make_inputs(99, 40)), tokens)
    assert torch.equal(tokens, before)
