"""GPTQ rounding against textbook GPTQ (arXiv 2210.17323, algorithm 1), and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gptq_cases import make_correlated_inputs, scheme
from support.oracle import Array, back, bfloat16, output_error

from quantkit.contracts import InputStats
from quantkit.errors import NumericsError
from quantkit.methods import gptq, rtn
from quantkit.numerics import affine, cholesky, gram, range_search
from quantkit.numerics import gptq as rounding
from quantkit.plan.memory import SOLVE_COPIES, estimate_solve_bytes


def textbook(
    weight: Array, x: Array, scale: Array, zero: Array, bits: int, group: int, damping: float
) -> Array:
    """Return the weight of float64 GPTQ with an inverse Hessian, column by column, act-order."""
    hessian = x.T @ x
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    factor = np.linalg.cholesky(
        np.linalg.inv(hessian[np.ix_(order, order)])
    ).T  # upper, of the inverse
    left, result = weight[:, order].copy(), np.empty_like(weight)
    for k, column in enumerate(order):
        for row in range(len(weight)):
            s, z = scale[row, column // group], zero[row, column // group]
            result[row, column] = back(left[row, k : k + 1], s, z, bits)[0]
            wrong = (left[row, k] - result[row, column]) / factor[k, k]
            left[row, k:] -= wrong * factor[k, k:]
    return result


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, False), (3, 64, True), (2, -1, False)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_equals_textbook_gptq(bits: int, group: int, symmetric: bool, seed: int) -> None:
    weight, x = make_correlated_inputs(16, 192, seed=seed)  # more columns than one lazy batch
    spec = scheme(bits, group, symmetric)
    scale, zero = affine.compute_qparams(*affine.compute_min_max(weight, group), spec)
    factor = cholesky.factorize_gram(x.T @ x)
    quantized = rounding.round_with_feedback(weight, factor, (scale, zero), spec)
    zeros = np.full(scale.shape, 2 ** (bits - 1)) if zero is None else zero.numpy().astype(int)
    width = 192 if group == -1 else group
    expected = textbook(
        weight.double().numpy(),
        x.double().numpy(),
        scale.double().numpy(),
        zeros,
        bits,
        width,
        0.01,
    )
    error = affine.dequantize(quantized, spec).double().numpy()
    assert np.array_equal(bfloat16(scale.double().numpy()), scale.double().numpy())
    assert (
        np.isclose(error, expected, atol=1e-6).mean() > 0.98
    )  # a near-tie that falls otherwise moves later columns
    losses = [
        output_error(q - weight.double().numpy(), x.double().numpy()) for q in (error, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert float(factor.damping) == pytest.approx(0.01)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    tokens=st.integers(1, 80),
    outliers=st.integers(0, 3),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_gptq_is_never_worse_than_rtn(
    bits: int, symmetric: bool, tokens: int, outliers: int, size: float, seed: int
) -> None:
    weight, x = make_correlated_inputs(8, 64, tokens, seed)
    weight[:, :outliers] *= 50
    gram_x = (size * x).T @ (size * x)
    spec = scheme(bits, 32, symmetric)
    stats = InputStats(gram=gram_x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(tokens))
    error, baseline = (
        float(
            gram.compute_error(affine.dequantize(solve(weight, stats, spec), spec) - weight, gram_x)
        )
        for solve in (gptq.solve, rtn.solve)
    )
    energy = float(gram.compute_error(weight, gram_x))
    assert error <= baseline * (1 + 1e-3) + 1e-9 * energy


def test_gptq_has_less_than_half_the_error_of_range_search() -> None:
    weight, x = make_correlated_inputs(64, 256)
    spec = scheme(4, 128)
    gram_x = x.T @ x
    ranges = range_search.search_ranges(weight, gram_x, spec)
    with_feedback = rounding.round_with_feedback(
        weight, cholesky.factorize_gram(gram_x), ranges, spec
    )
    losses = [
        float(gram.compute_error(affine.dequantize(q, spec) - weight, gram_x))
        for q in (with_feedback, affine.quantize(weight, *ranges, spec))
    ]
    assert losses[0] < 0.5 * losses[1]


@pytest.mark.parametrize("tokens", [1, 5])
def test_gram_of_few_tokens_has_a_factor(tokens: int) -> None:
    """Rank 1 and rank 5 of 64: damping makes them definite; outputs are almost exact."""
    weight, x = make_correlated_inputs(16, 64, tokens)
    ranges = affine.compute_qparams(*affine.compute_min_max(weight, 32), scheme())
    quantized = rounding.round_with_feedback(
        weight, cholesky.factorize_gram(x.T @ x), ranges, scheme()
    )
    back_again = affine.dequantize(quantized, scheme())
    plain = affine.dequantize(rtn.solve(weight, None, scheme()), scheme())
    assert gram.compute_error(back_again - weight, x.T @ x) < 0.2 * gram.compute_error(
        plain - weight, x.T @ x
    )


def test_gram_of_zeros_rounds_to_nearest() -> None:
    weight, _ = make_correlated_inputs(16, 64)
    stats = InputStats(gram=torch.zeros(64, 64), mean_abs=torch.zeros(64), n_tokens=torch.tensor(0))
    assert torch.equal(
        gptq.solve(weight, stats, scheme()).codes, rtn.solve(weight, None, scheme()).codes
    )


def test_unused_columns_round_to_nearest() -> None:
    weight, x = make_correlated_inputs(16, 64)
    x[:, 10:20] = 0
    ranges = affine.compute_qparams(*affine.compute_min_max(weight, 32), scheme())
    quantized = rounding.round_with_feedback(
        weight, cholesky.factorize_gram(x.T @ x), ranges, scheme()
    )
    plain = affine.quantize(weight, *ranges, scheme())
    assert torch.equal(quantized.codes[:, 10:20], plain.codes[:, 10:20])
    assert not torch.equal(quantized.codes, plain.codes)
    rest = [c for c in range(64) if not 10 <= c < 20]
    order = cholesky.factorize_gram(x.T @ x).order
    assert set(order[:54].tolist()) == set(rest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_is_rejected(value: float) -> None:
    weight, x = make_correlated_inputs(4, 64)
    gram_x = x.T @ x
    gram_x[3, 5] = value
    with pytest.raises(NumericsError, match="Gram matrix holds NaN or infinity"):
        cholesky.factorize_gram(gram_x)


def test_damping_grows_only_for_the_matrix_that_needs_it() -> None:
    """An indefinite gram takes 10 % damping; its neighbor in the batch keeps 1 %."""
    _, x = make_correlated_inputs(4, 32)
    sound = x.T @ x
    mean = sound.diagonal().mean()
    pushed = torch.diag(torch.full((32,), float(mean)))
    pushed[0, 1] = pushed[1, 0] = 1.05 * mean  # smallest eigenvalue -0.05 of the mean
    damping = cholesky.factorize_gram(torch.stack([sound, pushed])).damping
    assert damping.tolist() == pytest.approx([0.01, 0.1])


def test_gram_far_from_definite_is_rejected() -> None:
    with pytest.raises(NumericsError, match="far from positive semi-definite"):
        cholesky.factorize_gram(torch.tensor([[1.0, 1e7], [1e7, 1.0]]))


def test_batch_may_share_one_gram() -> None:
    _, x = make_correlated_inputs(8, 64)
    weight = torch.stack([make_correlated_inputs(8, 64, seed=s)[0] for s in (1, 2)])
    ranges = affine.compute_qparams(*affine.compute_min_max(weight, 32), scheme())
    shared = rounding.round_with_feedback(
        weight, cholesky.factorize_gram(x.T @ x), ranges, scheme()
    )
    each = rounding.round_with_feedback(
        weight, cholesky.factorize_gram((x.T @ x).expand(2, 64, 64)), ranges, scheme()
    )
    assert torch.equal(shared.codes, each.codes)


@pytest.mark.parametrize("tokens", [300, 20])
def test_own_equals_energy_unexplained_by_later_columns(tokens: int) -> None:
    """Per column: the damped input energy that no linear combination of later columns explains."""
    _, x = make_correlated_inputs(4, 48, tokens)
    factor = cholesky.factorize_gram(x.T @ x)
    rows = x.double().numpy()
    ridge = np.sqrt(0.01 * np.square(rows).sum() / 48) * np.eye(48)
    inputs, order = np.concatenate([rows, ridge]), factor.order.tolist()
    for place, column in enumerate(order):
        later = inputs[:, order[place + 1 :]]
        solution = np.linalg.lstsq(later, inputs[:, column], rcond=None)[0]
        left = np.square(inputs[:, column] - later @ solution).sum()
        assert float(factor.own[column]) == pytest.approx(left, rel=1e-3)


def test_codes_do_not_depend_on_threads() -> None:
    weight, x = make_correlated_inputs(256, 768, tokens=1000)
    gram_x, before, quantized = x.T @ x, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stats = InputStats(gram=gram_x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(1000))
            quantized.append(gptq.solve(weight, stats, scheme(group=128)).codes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(quantized[0], quantized[1]) and torch.equal(quantized[0], quantized[2])


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("out", "width"), [(64, 1024), (1024, 512)])
def test_working_memory_is_within_plan(out: int, width: int, crossed: bool) -> None:
    from support.method_cases import peak_bytes

    from quantkit.contracts import Linear

    weight, x = make_correlated_inputs(out, width)
    gram_x = x.T @ x
    cross = 0.01 * gram_x if crossed else None
    stats = InputStats(
        gram=gram_x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(len(x)), cross=cross
    )
    peak = peak_bytes(lambda: gptq.solve(weight, stats, scheme(group=128)))
    linear = Linear(name="x", out_features=out, in_features=width, role="mlp")
    assert peak <= estimate_solve_bytes(
        [linear], True
    ) and SOLVE_COPIES * 4 * weight.numel() == estimate_solve_bytes([linear], False)
