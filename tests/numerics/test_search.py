"""Gram, AWQ scales and range search against oracles on activations, and inequalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from torch import Tensor

from quantkit.contracts import Quantized, Scheme
from quantkit.numerics import affine, awq_scales, gram, range_search


def scheme(bits: int = 4, group: int = 32, symmetric: bool = False) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16")


def tokens(seed: int, n: int, width: int, outliers: int = 3) -> Tensor:
    """Return activations with correlated channels, an offset and a few large channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g) @ (
        torch.eye(width) + 0.3 * torch.randn(width, width, generator=g)
    )
    x[:, torch.randperm(width, generator=g)[:outliers]] *= 12
    return x + 0.5 * torch.randn(width, generator=g)


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed)) * 0.05


def gram_of(x: Tensor) -> Tensor:
    return (x.double().mT @ x.double()).float()


def dequantize_stored(scale: Tensor, zero: Tensor | None, weight: Tensor, spec: Scheme) -> Tensor:
    return affine.dequantize(affine.quantize(weight, scale, zero, spec), spec)


# --------------------------------------------------------------------------------------------- gram


def test_gram_accumulated_in_parts_equals_the_whole() -> None:
    x, weight = tokens(0, 50, 16), torch.rand(50, generator=torch.Generator().manual_seed(1))
    total, absolute = torch.zeros(16, 16), torch.zeros(16)
    for rows, part in zip(x.split(17), weight.split(17), strict=True):
        gram.accumulate_gram(total, absolute, rows, part)
    expected = sum(
        w * np.outer(row, row) for w, row in zip(weight.double().numpy(), x.double().numpy())
    )
    assert np.allclose(total.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert np.allclose(absolute.numpy(), np.abs(x.double().numpy()).sum(0), rtol=1e-5)


def test_error_equals_output_error() -> None:
    x = torch.stack([tokens(seed, 80, 32) for seed in range(2)])
    delta = weights(0, 2, 600, 32)  # more rows than one chunk
    result = gram.compute_error(delta, x.mT @ x)
    expected = [
        oracle.output_error(d.double().numpy(), t.double().numpy())
        for d, t in zip(delta, x, strict=True)
    ]
    assert result.dtype == torch.float64 and np.allclose(result.numpy(), expected, rtol=1e-4)


def test_error_sums_in_float64() -> None:
    """4096 x 1024 terms of one size: a float32 sum is wrong in the fifth digit."""
    result = gram.compute_error(torch.full((4096, 1024), 0.1), torch.eye(1024))
    assert float(result) == pytest.approx(4096 * 1024 * float(torch.tensor(0.1)) ** 2, rel=1e-7)


def test_relative_error_and_sqnr_equal_definitions() -> None:
    weight, x = weights(1, 8, 32), tokens(1, 60, 32)
    assert float(gram.compute_relative_error(weight, 0.9 * weight, gram_of(x))) == pytest.approx(
        0.1, rel=1e-3
    )
    near, (w, t) = (4 * weight).round() / 4, (weight.double().numpy(), x.double().numpy())
    outputs, lost = t @ w.T, t @ (w - near.double().numpy()).T  # [tokens, out]
    assert float(gram.compute_relative_error(weight, near, gram_of(x))) == pytest.approx(
        np.linalg.norm(lost) / np.linalg.norm(outputs), rel=1e-4
    )
    assert float(gram.compute_sqnr_db(weight, 0.9 * weight)) == pytest.approx(20, rel=1e-4)
    assert float(gram.compute_relative_error(weight, weight, torch.zeros(32, 32))) == 0


def test_diagonal_blocks_and_rescaled_gram() -> None:
    g = gram_of(tokens(2, 60, 64))
    assert torch.equal(gram.extract_diagonal_blocks(g, 32), torch.stack([g[:32, :32], g[32:, 32:]]))
    assert torch.equal(gram.extract_diagonal_blocks(g, -1), g[None])
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.allclose(
        gram.rescale_gram(g, scale), gram_of(tokens(2, 60, 64) / scale), rtol=1e-4, atol=1e-3
    )


# ------------------------------------------------------------------------------------- range search


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (3, False), (2, True)])
def test_range_search_equals_oracle(bits: int, symmetric: bool) -> None:
    weight, x, spec = weights(bits, 6, 96), tokens(bits, 120, 96), scheme(bits, 32, symmetric)
    result = dequantize_stored(*range_search.search_ranges(weight, gram_of(x), spec), weight, spec)
    w, t = weight.double().numpy(), x.double().numpy()
    expected = oracle.clip_search(w, t, bits, 32, symmetric, "bfloat16")
    # a float32 tie may give one row another optimum; nearly all weights and the error agree
    assert np.isclose(result.numpy(), expected, rtol=1e-5, atol=1e-9).mean() > 0.9
    error, expected_error = (
        oracle.output_error(q - w, t) for q in (result.double().numpy(), expected)
    )
    assert error == pytest.approx(expected_error, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([32, 64, -1]),
)
def test_range_search_is_never_worse_than_min_max(
    seed: int, bits: int, symmetric: bool, group: int
) -> None:
    weight, x, spec = weights(seed, 4, 64), tokens(seed, 40, 64), scheme(bits, group, symmetric)
    g = gram_of(x)
    plain = dequantize_stored(
        *affine.compute_qparams(*affine.compute_min_max(weight, group), spec), weight, spec
    )
    result = dequantize_stored(*range_search.search_ranges(weight, g, spec), weight, spec)
    before, after = (
        (x @ (q - weight).T).double().square().sum(0) for q in (plain, result)
    )  # [out]
    assert bool((after <= before * 1.001 + 1e-9).all())


def counts(seed: int, width: int) -> Tensor:
    """Return a gram's diagonal: a few columns a hundred times the others, one 0."""
    diagonal = tokens(seed, 60, width).square().sum(0)
    diagonal[seed % width] = 0
    return diagonal


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, False), (4, True), (3, False), (2, True), (8, False)]
)
def test_diagonal_search_equals_oracle(bits: int, symmetric: bool) -> None:
    weight, columns, spec = weights(bits, 24, 96), counts(bits, 96), scheme(bits, 32, symmetric)
    result = dequantize_stored(
        *range_search.search_ranges_by_diagonal(weight, columns, spec), weight, spec
    )
    w, c = weight.double().numpy(), columns.double().numpy()
    expected = oracle.weighted_search(w, c, bits, 32, symmetric, "bfloat16")
    # a tie in float32 may send a group to another of two equally good ranges
    assert np.isclose(result.numpy(), expected, rtol=1e-5, atol=1e-9).mean() > 0.95
    error, expected_error = (
        (c * np.square(q - w)).sum() for q in (result.double().numpy(), expected)
    )
    assert error == pytest.approx(expected_error, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([32, 64, -1]),
)
def test_diagonal_search_is_never_worse_than_min_max(
    seed: int, bits: int, symmetric: bool, group: int
) -> None:
    weight, columns, spec = (
        weights(seed, 2, 4, 64),
        counts(seed, 64).expand(2, 64),
        scheme(bits, group, symmetric),
    )
    plain = dequantize_stored(
        *affine.compute_qparams(*affine.compute_min_max(weight, group), spec), weight, spec
    )
    result = dequantize_stored(
        *range_search.search_ranges_by_diagonal(weight, columns, spec), weight, spec
    )
    before, after = (
        affine.split_groups((q - weight).double().square() * columns.unsqueeze(-2), group).sum(-1)
        for q in (plain, result)
    )  # [2, out, n_groups]
    assert bool((after <= before * (1 + 1e-5)).all())


def test_range_search_uses_errors_of_other_groups() -> None:
    """Errors of two groups with the same channels can cancel, which blocks alone do not show."""
    half = tokens(7, 200, 32)
    x, weight, spec = torch.cat([half, half], dim=1), weights(7, 32, 64), scheme(3)
    g = gram_of(x)
    blocks = g * torch.block_diag(torch.ones(32, 32), torch.ones(32, 32))
    with_others, blind = (
        gram.compute_error(
            dequantize_stored(*range_search.search_ranges(weight, used, spec), weight, spec)
            - weight,
            g,
        )
        for used in (g, blocks)
    )
    assert float(with_others) < 0.9 * float(blind)


def test_unseen_input_keeps_min_max_ranges() -> None:
    weight, spec = weights(3, 4, 64), scheme()
    scale, zero = range_search.search_ranges(weight, torch.zeros(64, 64), spec)
    plain_scale, plain_zero = affine.compute_qparams(*affine.compute_min_max(weight, 32), spec)
    assert zero is not None and plain_zero is not None
    assert torch.equal(scale, plain_scale) and torch.equal(zero, plain_zero)


def test_range_search_keeps_groups_of_zeros() -> None:
    weight, spec = weights(4, 4, 64), scheme()
    weight[1, :32] = 0
    weight[2] = 0
    result = dequantize_stored(
        *range_search.search_ranges(weight, gram_of(tokens(4, 50, 64)), spec), weight, spec
    )
    assert torch.equal(result[1, :32], torch.zeros(32)) and torch.equal(result[2], torch.zeros(64))


# ------------------------------------------------------------------------------------- scale search


def test_candidates_equal_oracle() -> None:
    mean_abs = tokens(5, 50, 64).abs().mean(0)
    result = awq_scales.compute_scale_candidates(mean_abs)
    assert result.shape == (20, 64) and torch.equal(result[0], torch.ones(64))
    assert np.allclose(result.numpy(), oracle.awq_scales(mean_abs.double().numpy()), rtol=1e-5)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.0], [0.0, 1.0, 1e30], [1e-38, 1e-38, 1e-38], [0.0, 1e-30, 1.0]]
)
def test_candidates_are_positive_and_finite(values: list[float]) -> None:
    result = awq_scales.compute_scale_candidates(torch.tensor(values))
    assert bool(torch.isfinite(result).all()) and bool((result > 0).all())
    assert torch.equal(result[0], torch.ones(3))


def test_powers_of_two_scale_without_rounding() -> None:
    candidates = awq_scales.compute_scale_candidates(tokens(5, 50, 64).abs().mean(0))
    exact = awq_scales.round_to_powers_of_two(candidates)
    assert bool((torch.log2(exact / candidates).abs() <= 0.5001).all()) and torch.equal(
        exact[0], torch.ones(64)
    )
    norm, reader = weights(5, 64).bfloat16(), weights(6, 8, 64).bfloat16()
    for scale in exact:
        assert torch.equal((norm.float() / scale).bfloat16().float() * scale, norm.float())
        assert (
            float(
                awq_scales.compute_scaling_error(
                    reader.float(), gram_of(tokens(5, 50, 64)), scale, None
                )
            )
            == 0
        )


def test_candidates_of_batch_equal_those_of_its_inputs() -> None:
    mean_abs = torch.stack([tokens(seed, 50, 64).abs().mean(0) for seed in range(3)])
    batch = awq_scales.compute_scale_candidates(mean_abs)
    assert torch.equal(
        batch, torch.stack([awq_scales.compute_scale_candidates(row) for row in mean_abs], dim=1)
    )


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True)])
def test_scaling_error_equals_oracle(bits: int, symmetric: bool) -> None:
    weight, x, spec = weights(6, 5, 64), tokens(6, 90, 64), scheme(bits, 32, symmetric)
    candidates = awq_scales.compute_scale_candidates(x.abs().mean(0))
    result = [
        float(awq_scales.compute_scaling_error(weight, gram_of(x), candidate, spec))
        for candidate in candidates
    ]
    w, t = weight.double().numpy(), x.double().numpy()
    expected = [
        oracle.awq_error(w, t, s.double().numpy(), bits, 32, symmetric, "bfloat16")
        for s in candidates
    ]
    assert np.allclose(result, expected, rtol=0.02)
    assert np.argmin(result) == np.argmin(expected)


def test_kept_matrix_counts_its_rounding() -> None:
    weight, x = weights(8, 5, 64).bfloat16().float(), tokens(8, 90, 64)
    ones, other = awq_scales.compute_scale_candidates(x.abs().mean(0))[[0, 10]]
    assert float(awq_scales.compute_scaling_error(weight, gram_of(x), ones, None)) == 0
    wide = oracle.bfloat16((weight * other).double().numpy()) / other.double().numpy()
    expected = oracle.output_error(wide - weight.double().numpy(), x.double().numpy())
    assert float(
        awq_scales.compute_scaling_error(weight, gram_of(x), other, None)
    ) == pytest.approx(expected, rel=1e-3)


def test_scaling_error_of_batch_with_one_or_many_scales() -> None:
    weight, spec = weights(9, 3, 300, 64), scheme()  # more rows than one chunk
    x = torch.stack([tokens(seed, 50, 64) for seed in range(3)])
    grams = x.mT @ x
    many = awq_scales.compute_scale_candidates(x.abs().mean(1))[7]  # [3, 64]
    result = awq_scales.compute_scaling_error(weight, grams, many, spec)
    single = torch.stack([
        awq_scales.compute_scaling_error(weight[e], grams[e], many[e], spec) for e in range(3)
    ])
    assert torch.allclose(result, single, rtol=1e-5)
    shared = awq_scales.compute_scaling_error(weight, grams, many[0], spec)
    assert torch.allclose(shared[0], result[0], rtol=1e-5) and not torch.allclose(
        shared[1], result[1], rtol=1e-3
    )


@pytest.mark.parametrize("seed", range(4))
def test_awq_beats_rtn_on_outlier_channels(seed: int) -> None:
    """Scale search and range search each lower the error after the other."""
    weight, x, spec = weights(seed, 64, 128), tokens(seed, 300, 128, outliers=6), scheme(4, 64)
    g = gram_of(x)
    candidates = awq_scales.compute_scale_candidates(x.abs().mean(0))
    scale = candidates[
        int(
            torch.stack([
                awq_scales.compute_scaling_error(weight, g, candidate, spec)
                for candidate in candidates
            ]).argmin()
        )
    ]

    def loss(s: Tensor, search: bool) -> float:
        wide, used = weight * s, gram.rescale_gram(g, s)
        qparams = (
            range_search.search_ranges(wide, used, spec)
            if search
            else affine.compute_qparams(*affine.compute_min_max(wide, 64), spec)
        )
        return float(gram.compute_error(dequantize_stored(*qparams, wide, spec) / s - weight, g))

    plain, scaled = loss(torch.ones(128), False), loss(scale, False)
    clipped, both = loss(torch.ones(128), True), loss(scale, True)
    assert scaled < 0.8 * plain
    assert both < 0.9 * clipped and both < 0.9 * scaled


def test_result_does_not_depend_on_cache_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, spec = weights(10, 40, 64), tokens(10, 50, 64), scheme()
    candidate = awq_scales.compute_scale_candidates(x.abs().mean(0))[9]
    whole = awq_scales.compute_scaling_error(weight, gram_of(x), candidate, spec)
    monkeypatch.setattr(gram, "BLOCK_ROWS", 7)
    assert torch.allclose(
        awq_scales.compute_scaling_error(weight, gram_of(x), candidate, spec), whole, rtol=1e-6
    )


def test_quantized_uses_the_searched_ranges() -> None:
    weight, spec = weights(11, 4, 64), scheme()
    scale, zero = range_search.search_ranges(weight, gram_of(tokens(11, 50, 64)), spec)
    result: Quantized = affine.quantize(weight, scale, zero, spec)
    assert (
        result.scale is scale
        and result.codes.dtype == torch.uint8
        and scale.dtype == torch.bfloat16
    )
