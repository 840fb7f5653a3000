"""Error propagation against least squares on activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.gptq_cases import make_correlated_inputs, scheme
from torch import Tensor

from quantkit.contracts import InputStats
from quantkit.methods import gptq
from quantkit.models import scaling
from quantkit.numerics import affine, cholesky, error_propagation, gram


def perturb(x: Tensor, size: float = 0.1, seed: int = 5) -> Tensor:
    """Return inputs as after quantized blocks: each token has an error correlated with others."""
    g = torch.Generator().manual_seed(seed)
    width = x.shape[1]
    return (
        x
        + size * x @ torch.randn(width, width, generator=g) / width**0.5
        + size * torch.randn(x.shape, generator=g)
    )


def stats_of(original: Tensor, x: Tensor) -> InputStats:
    width = x.shape[1]
    total, cross, absolute = (
        torch.zeros(width, width),
        torch.zeros(width, width),
        torch.zeros(width),
    )
    for now, before in zip(x.split(70), original.split(70), strict=True):
        gram.accumulate_gram(total, absolute, now)
        gram.accumulate_cross(cross, now, before)
    counts = torch.tensor(len(x))
    return InputStats(
        gram=gram.complete_gram(total), mean_abs=absolute / len(x), n_tokens=counts, cross=cross
    )


def output_loss(weight: Tensor, original: Tensor, stored: Tensor, x: Tensor) -> float:
    """Return the squared distance of outputs to those of the original model, in float64."""
    return float(
        (original.double() @ weight.double().T - x.double() @ stored.double().T).square().sum()
    )


def test_cross_equals_sum_over_tokens() -> None:
    _, original = make_correlated_inputs(4, 48)
    x = perturb(original)
    o, q = original.double().numpy(), x.double().numpy()
    result = stats_of(original, x).cross
    assert result is not None
    assert np.allclose(
        result.numpy(), (o - q).T @ q, rtol=1e-4, atol=1e-3 * np.abs((o - q).T @ q).max()
    )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_correction_equals_ridge_regression_on_changed_inputs(share: float) -> None:
    weight, original = make_correlated_inputs(8, 192)  # more columns than one lazy batch
    x = perturb(original)
    stats = stats_of(original, x)
    assert stats.cross is not None
    result = error_propagation.correct_weight(
        weight, stats.cross, cholesky.factorize_gram(stats.gram), None, (share, 0.0)
    )
    o, q, w = (tensor.double().numpy() for tensor in (original, x, weight))
    ridge = np.sqrt(0.01 * np.square(q).sum() / 192) * np.eye(192)
    # W o is wanted of x; the ridge holds the weights near W
    expected = np.linalg.lstsq(
        np.vstack([q, ridge]), np.vstack([o @ w.T, ridge @ w.T]), rcond=None
    )[0].T
    assert np.allclose(
        result.double().numpy() - w, share * (expected - w), atol=2e-3 * np.abs(expected - w).max()
    )


def test_residual_correction_equals_least_squares() -> None:
    """|W o + s - V x - r|^2 by least squares on the tokens, for any batches of the sums."""
    weight, original = make_correlated_inputs(8, 192)
    x, g = perturb(original), torch.Generator().manual_seed(9)
    gap = original @ torch.randn(192, 8, generator=g) * 0.05 + 0.1 * torch.randn(
        len(x), 8, generator=g
    )
    stats, residual = stats_of(original, x), torch.zeros(8, 192)
    for now, lacking in zip(x.split(70), gap.split(70), strict=True):
        gram.accumulate_residual(residual, now, lacking)
    assert stats.cross is not None
    result = error_propagation.correct_weight(
        weight, stats.cross, cholesky.factorize_gram(stats.gram), residual, (1.0, 1.0)
    )
    o, q, w, e = (tensor.double().numpy() for tensor in (original, x, weight, gap))
    ridge = np.sqrt(0.01 * np.square(q).sum() / 192) * np.eye(192)
    expected = np.linalg.lstsq(
        np.vstack([q, ridge]), np.vstack([o @ w.T + e, ridge @ w.T]), rcond=None
    )[0].T
    assert np.allclose(
        result.double().numpy() - w, expected - w, atol=2e-3 * np.abs(expected - w).max()
    )
    scale = torch.rand(192, generator=g) + 0.5
    scaled = scaling.rescale_stats(replace(stats, residual=residual.clone()), scale).residual
    assert scaled is not None and torch.allclose(scaled * scale, residual, rtol=1e-5)


def test_unchanged_or_unseen_inputs_leave_the_weight_unchanged() -> None:
    weight, x = make_correlated_inputs(8, 64)
    stats = stats_of(x, x)
    assert stats.cross is not None
    assert torch.equal(
        error_propagation.correct_weight(weight, stats.cross, cholesky.factorize_gram(stats.gram)),
        weight,
    )
    no_change = torch.zeros(64, 64)
    assert torch.equal(
        error_propagation.correct_weight(weight, no_change, cholesky.factorize_gram(no_change)),
        weight,
    )


def test_batch_equals_its_matrices_and_may_share_a_gram() -> None:
    _, original = make_correlated_inputs(8, 64)
    stats = stats_of(original, perturb(original))
    assert stats.cross is not None
    weight = torch.stack([make_correlated_inputs(8, 64, seed=s)[0] for s in (1, 2)])
    factor = cholesky.factorize_gram(stats.gram)
    shared = error_propagation.correct_weight(weight, stats.cross, factor)
    for e in range(2):
        assert torch.allclose(
            shared[e],
            error_propagation.correct_weight(weight[e], stats.cross, factor),
            rtol=1e-5,
            atol=1e-8,
        )


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_with_cross_is_closer_to_original_outputs(bits: int) -> None:
    weight, original = make_correlated_inputs(64, 128, tokens=1000)
    x, spec = perturb(original), scheme(bits, 64)
    stats = stats_of(original, x)
    blind = InputStats(gram=stats.gram, mean_abs=stats.mean_abs, n_tokens=stats.n_tokens)
    seeing, without = (affine.dequantize(gptq.solve(weight, s, spec), spec) for s in (stats, blind))
    assert output_loss(weight, original, seeing, x) < 0.7 * output_loss(
        weight, original, without, x
    )


def test_input_scaling_and_correction_commute() -> None:
    """Except for the damping, a share of the diagonal, which scaling changes."""
    weight, original = make_correlated_inputs(8, 64, tokens=2000)
    x = perturb(original)
    scale = torch.exp2(
        torch.randint(-1, 2, (64,), generator=torch.Generator().manual_seed(0)).float()
    )
    stats = stats_of(original, x)
    assert stats.cross is not None
    first = (
        error_propagation.correct_weight(weight, stats.cross, cholesky.factorize_gram(stats.gram))
        * scale
    )
    wide = scaling.rescale_stats(stats, scale)
    assert wide.cross is not None
    second = error_propagation.correct_weight(
        weight * scale, wide.cross, cholesky.factorize_gram(wide.gram)
    )
    apart, step = (
        (x @ (corrected / scale).T).square().sum()
        for corrected in (second - first, first - weight * scale)
    )
    assert float(apart) < 0.01 * float(step)


def test_result_does_not_depend_on_threads() -> None:
    weight, original = make_correlated_inputs(256, 512, tokens=600)
    stats, before, result = stats_of(original, perturb(original)), torch.get_num_threads(), []
    assert stats.cross is not None
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result.append(
                error_propagation.correct_weight(
                    weight, stats.cross, cholesky.factorize_gram(stats.gram)
                )
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result[0], result[1])


def test_massive_activations_do_not_dominate_residual_gap() -> None:
    """One of 200 tokens has 400 times the norm of the others and a gap of 1 % of it."""
    g = torch.Generator().manual_seed(2)
    weight, x = torch.randn(24, 64, generator=g), torch.randn(200, 64, generator=g)
    stream = torch.randn(200, 24, generator=g)
    gap = 0.2 * x @ torch.randn(64, 24, generator=g) / 8 + 0.02 * torch.randn(200, 24, generator=g)
    stream[7] *= 400
    gap[7] = 0.01 * stream[7]
    result = error_propagation.compute_residual_gap(stream + gap, stream)
    ordinary = torch.arange(200) != 7
    assert torch.equal(result[7], torch.zeros(24))
    assert torch.allclose(result[ordinary], gap[ordinary], atol=1e-5)

    def left(residual: Tensor) -> float:
        """Return the remaining share of the gap of the other tokens."""
        factor = cholesky.factorize_gram(stats_of(x, x).gram)
        step = (
            error_propagation.correct_weight(
                weight, torch.zeros(64, 64), factor, residual, (0.0, 1.0)
            )
            - weight
        )
        return float((gap - x @ step.T)[ordinary].norm() / gap[ordinary].norm())

    assert left(result.T @ x) < 0.2
    assert left(gap.T @ x) > 1.2 * left(result.T @ x)
