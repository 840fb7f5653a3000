"""The contract of every registered method, and properties of AWQ."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from support.method_cases import peak_bytes
from torch import Tensor

from quantkit import registry
from quantkit.contracts import InputStats, Linear, Method, Quantized, Scheme
from quantkit.dtypes import FloatDtype
from quantkit.errors import NumericsError
from quantkit.methods import awq
from quantkit.numerics import affine, gram
from quantkit.plan.memory import estimate_solve_bytes

METHODS = tuple(
    name for name in registry.list_names("methods") if name != "nf4"
)  # integers; tests/formats/test_bitsandbytes.py has nf4


def scheme(
    bits: int = 4, group: int = 32, symmetric: bool = False, dtype: FloatDtype = "bfloat16"
) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)


def make_problem(*shape: int, seed: int = 0) -> tuple[Tensor, InputStats]:
    """Return weights [..., out, in] and statistics of 200 tokens with a few large channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-2], 200, shape[-1], generator=g)
    x[..., :3] *= 10
    counts = torch.full(shape[:-2], 200)
    return torch.randn(shape, generator=g) * 0.02, InputStats(
        gram=x.mT @ x, mean_abs=x.abs().mean(-2), n_tokens=counts
    )


def is_equal(first: Quantized, second: Quantized) -> bool:
    zeros = (first.zero is None and second.zero is None) or (
        first.zero is not None and second.zero is not None and torch.equal(first.zero, second.zero)
    )
    return (
        torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale) and zeros
    )


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return registry.get_method(request.param)


@pytest.mark.parametrize("dtype", get_args(FloatDtype))
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, False), (3, -1, True), (8, 64, False), (2, 32, True)]
)
def test_solve_returns_contract_shapes_and_keeps_inputs(
    method: Method, bits: int, group: int, symmetric: bool, dtype: FloatDtype
) -> None:
    weight, stats = make_problem(2, 10, 64)
    copies = weight.clone(), stats.gram.clone()
    spec = scheme(bits, group, symmetric, dtype)
    quantized = method.solve(weight, stats, spec)
    groups = spec.groups(64)
    assert (
        quantized.codes.shape == (2, 10, 64)
        and quantized.codes.dtype == torch.uint8
        and int(quantized.codes.max()) < 2**bits
    )
    assert quantized.scale.shape == (
        2,
        10,
        groups,
    ) and quantized.scale.dtype == affine.get_scale_dtype(spec)
    assert bool((quantized.scale > 0).all())
    assert (quantized.zero is None) == symmetric
    if quantized.zero is not None:
        assert quantized.zero.shape == (2, 10, groups) and quantized.zero.dtype == torch.uint8
    assert torch.equal(weight, copies[0]) and torch.equal(stats.gram, copies[1]), (
        "inputs were changed"
    )
    assert is_equal(quantized, method.solve(weight, stats, spec)), "not deterministic"


def test_solve_of_batch_equals_its_matrices(method: Method) -> None:
    weight, stats = make_problem(3, 8, 64)
    quantized = method.solve(weight, stats, scheme())
    for e in range(3):
        single_stats = InputStats(
            gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e]
        )
        single = method.solve(weight[e], single_stats, scheme())
        zero = None if quantized.zero is None else quantized.zero[e]
        assert is_equal(
            Quantized(codes=quantized.codes[e], scale=quantized.scale[e], zero=zero), single
        )


@pytest.mark.parametrize(
    "name", [name for name in METHODS if registry.get_method(name).needs_stats]
)
def test_calibrated_method_is_never_worse_than_rtn(name: str) -> None:
    weight, stats = make_problem(4, 32, 128, seed=1)
    for bits in (3, 4):
        spec = scheme(bits, 64)
        plain = registry.get_method("rtn").solve(weight, None, spec)
        quantized = registry.get_method(name).solve(weight, stats, spec)
        method_error, rtn_error = (
            gram.compute_error(affine.dequantize(q, spec) - weight, stats.gram)
            for q in (quantized, plain)
        )
        assert bool((method_error <= 1.001 * rtn_error).all())


def test_solve_without_statistics_raises_or_succeeds(method: Method) -> None:
    weight, _ = make_problem(8, 64)
    if method.needs_stats:
        with pytest.raises(NumericsError, match="use method rtn"):
            method.solve(weight, None, scheme())
    else:
        assert method.solve(weight, None, scheme()).codes.shape == weight.shape


def group_errors(quantized: Quantized, weight: Tensor, spec: Scheme) -> Tensor:
    """Return the squared error of each group in float64: [..., out, n_groups]."""
    delta = (affine.dequantize(quantized, spec) - weight).double()
    return affine.split_groups(delta, spec.group_size).square().sum(-1)


@pytest.mark.parametrize("dtype", get_args(FloatDtype))
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, False), (3, -1, True), (8, 64, False), (2, 32, True)]
)
def test_rtn_mse_is_never_worse_than_rtn(
    bits: int, group: int, symmetric: bool, dtype: FloatDtype
) -> None:
    """In the squared error of bell-shaped, heavy-tailed, one-sided and empty groups."""
    weight, _ = make_problem(4, 24, 128, seed=5)
    weight[1], weight[2], weight[3, :12] = weight[1] ** 3, weight[2].abs(), 0
    spec = scheme(bits, group, symmetric, dtype)
    plain, quantized = (
        registry.get_method(name).solve(weight, None, spec) for name in ("rtn", "rtn_mse")
    )
    before, after = group_errors(plain, weight, spec), group_errors(quantized, weight, spec)
    assert bool((after <= before * (1 + 1e-5) + 1e-12).all())
    assert is_equal(quantized, registry.get_method("rtn_mse").solve(weight, None, spec))
    if bits < 8:
        assert float(after[0].sum()) < 0.99 * float(before[0].sum())


def test_rtn_mse_lowers_error_by_a_fifth_with_one_outlier() -> None:
    weight, _ = make_problem(16, 128, seed=6)
    weight[:, 5] = 0.12  # six standard deviations
    spec = scheme(3, 128, symmetric=True)
    plain, quantized = (
        registry.get_method(name).solve(weight, None, spec) for name in ("rtn", "rtn_mse")
    )
    assert float(group_errors(quantized, weight, spec).sum()) < 0.8 * float(
        group_errors(plain, weight, spec).sum()
    )


def test_awq_without_tokens_equals_rtn() -> None:
    weight, stats = make_problem(8, 64)
    zero_stats = InputStats(
        gram=torch.zeros_like(stats.gram), mean_abs=torch.zeros(64), n_tokens=torch.tensor(0)
    )
    assert is_equal(
        awq.METHOD.solve(weight, zero_stats, scheme()),
        registry.get_method("rtn").solve(weight, None, scheme()),
    )


def test_awq_lowers_error_by_a_third() -> None:
    weight, stats = make_problem(64, 256, seed=2)
    spec = scheme(4, 128)
    method_error, rtn_error = (
        gram.compute_error(
            affine.dequantize(m.solve(weight, stats, spec), spec) - weight, stats.gram
        )
        for m in (awq.METHOD, registry.get_method("rtn"))
    )
    assert float(method_error) < 0.67 * float(rtn_error)


def test_first_awq_candidate_is_no_scaling() -> None:
    assert awq.METHOD.rescale is not None
    weight, stats = make_problem(64, 256, seed=3)
    scales = awq.METHOD.rescale.candidates(stats.mean_abs)
    assert torch.equal(scales[0], torch.ones(256))
    losses = [
        float(awq.METHOD.rescale.error(weight, stats.gram, scale, scheme(group=128)))
        for scale in scales
    ]
    assert min(losses) < losses[0]


@pytest.mark.parametrize(
    ("out", "width", "group"),
    [(256, 1024, 128), (2048, 512, 128), (300, 512, -1), (2048, 1024, 32)],
)
@pytest.mark.parametrize("name", ["awq", "gptq", "rtn", "rtn_mse"])
def test_peak_memory_is_within_plan(name: str, out: int, width: int, group: int) -> None:
    method, (weight, stats) = registry.get_method(name), make_problem(out, width, seed=4)
    spec = scheme(4, group)
    linear = Linear(name="l", in_features=width, out_features=out, role="mlp")
    counted = estimate_solve_bytes([linear], feedback=name == "gptq")
    assert (
        peak_bytes(lambda: method.solve(weight, stats if method.needs_stats else None, spec))
        <= counted
    )
    if method.rescale is not None:
        scale = method.rescale.candidates(stats.mean_abs)[5]
        rescale = method.rescale
        assert peak_bytes(lambda: rescale.error(weight, stats.gram, scale, spec)) <= counted
