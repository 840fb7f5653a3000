"""MXFP4 and NVFP4 against slow float64 references and compressed-tensors' own rounding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fp4 import VALUES, back, decode_e4m3, scale_step, search, textbook
from support.gptq_cases import make_correlated_inputs
from support.method_cases import peak_bytes
from support.oracle import output_error
from torch import Tensor

from quantkit import registry
from quantkit.contracts import InputStats, Linear, Quantized, Scheme
from quantkit.errors import NumericsError
from quantkit.methods import awq, gptq, rtn, rtn_mse
from quantkit.numerics import cholesky, coordinate_descent, fp4, gram, grids
from quantkit.numerics import gptq as rounding
from quantkit.numerics.microscaling import (
    decode_e2m1,
    encode_e2m1,
    pack_e2m1,
    round_to_e2m1,
    unpack_e2m1,
)
from quantkit.plan.memory import estimate_solve_bytes

SCHEMES = {
    "mxfp4": Scheme(bits=4, group_size=32, symmetric=True, scale_dtype="uint8", kind="mxfp4"),
    "nvfp4": Scheme(
        bits=4, group_size=16, symmetric=True, scale_dtype="float8_e4m3fn", kind="nvfp4"
    ),
}


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return SCHEMES[request.param]


def make_stats(x: Tensor) -> InputStats:
    return InputStats(gram=x.T @ x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(len(x)))


def decode_all(quantized: Quantized, scheme: Scheme) -> np.ndarray:
    """Return the weight [out, in] float64 by the definition of the formats, without quantkit."""
    bits = quantized.scale.view(torch.uint8).numpy()
    steps = np.vectorize(scale_step(scheme.kind))(bits)
    if quantized.global_scale is not None:
        steps = steps / quantized.global_scale.double().numpy()
    values = np.array([*VALUES, *(-v for v in VALUES)])[quantized.codes.numpy()]
    return values * np.repeat(steps, scheme.group_size, axis=-1)


# ------------------------------------------------------------------------------------------- values


def test_rounding_to_e2m1_takes_the_nearest_value_and_an_even_code_on_ties() -> None:
    grid = torch.linspace(-9, 9, 36 * 1024 + 1)
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(VALUES)])
    assert torch.equal(round_to_e2m1(ties.clone()), torch.tensor([0, 1, 1, 2, 2, 4, 4.0]))
    for values in (grid, ties, -ties, torch.tensor([1e-38, 1e38, 5.0001, 4.9999, -0.0])):
        table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64)
        distance = (values.double().unsqueeze(-1) - table).abs()
        nearest = distance.amin(-1)
        rounded = round_to_e2m1(values.clone()).double()
        assert torch.equal((rounded - values.double()).abs(), nearest)
        assert torch.equal(round_to_e2m1(-values), -round_to_e2m1(values.clone()))


def test_rounding_to_e2m1_works_in_place_on_a_column() -> None:
    values = torch.randn(5, 7) * 4
    expected = round_to_e2m1(values[:, 3].clone())
    column = values[:, 3]
    assert round_to_e2m1(column) is column and torch.equal(values[:, 3], expected)


def test_codes_of_values_and_bytes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(codes)
    assert values.tolist() == [*VALUES, *(-v for v in VALUES)]
    assert encode_e2m1(values).tolist() == [*range(8), 0, *range(9, 16)]  # one zero
    packed = pack_e2m1(codes)
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack_e2m1(packed), values)


# ------------------------------------------------------------------------------------------- scales


def test_mxfp4_scales_of_rtn_are_those_of_compressed_tensors() -> None:
    maxima = torch.exp2(torch.linspace(-60, 60, 4001))
    maxima = torch.cat([maxima, torch.exp2(torch.arange(-20.0, 20)) * 1.75])
    weight = torch.zeros(len(maxima), 32)
    weight[:, 5] = -maxima
    scale = grids.quantize_rtn(weight, SCHEMES["mxfp4"]).scale[:, 0]
    assert torch.equal(scale.float(), generate_mx_scales(maxima).float())


def test_global_scale_is_the_largest_power_of_two_that_leaves_room_for_four_over_six() -> None:
    for largest in (1e-20, 0.013, 0.02, 1.0, 447.0, 3e38):
        weight = torch.full((2, 3, 32), largest / 7)
        weight[:, 1, 4] = largest
        quantized = rtn.solve(weight, None, SCHEMES["nvfp4"])
        assert quantized.global_scale is not None
        assert quantized.global_scale.shape == (2, 1, 1)
        shared = quantized.global_scale.double()
        assert bool((torch.log2(shared) % 1 == 0).all())
        assert bool((largest / 4 * shared <= 448).all())
        assert bool((largest / 4 * shared * 2 > 448).all())


@pytest.mark.parametrize("method", [rtn, rtn_mse, gptq])
def test_weights_are_exact_in_bfloat16(method, scheme: Scheme) -> None:
    weight, x = make_correlated_inputs(16, 64, seed=3)
    quantized = method.solve(weight, make_stats(x), scheme)
    dequantized = fp4.dequantize(quantized, scheme)
    assert torch.equal(dequantized.bfloat16().float(), dequantized)
    assert np.array_equal(dequantized.double().numpy(), decode_all(quantized, scheme))


def test_search_takes_the_best_scale_of_each_group(scheme: Scheme) -> None:
    weight, x = make_correlated_inputs(12, 128, seed=5)
    weight[3, 7] *= 30
    counts = (x.T @ x).diagonal()
    scale, shared = fp4.search_scales(weight, counts, scheme)
    plain = rtn.solve(weight, None, scheme)
    bits, first = (s.view(torch.uint8).numpy().astype(int) for s in (scale, plain.scale))
    whole = 1.0 if shared is None else float(shared)
    moved = 0
    for row in range(12):
        for group in range(bits.shape[1]):
            part = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
            target, own = weight[row, part].double().numpy(), counts[part].double().numpy()
            errors = search(target, own, int(first[row, group]), scheme.kind, whole)
            chosen = errors[int(bits[row, group])]
            assert chosen <= min(errors.values()) * (1 + 1e-5)
            moved += int(bits[row, group] != first[row, group])
    assert moved > bits.size // 10


def test_a_block_may_map_its_maximum_to_four() -> None:
    """[4, 3, 3, ...] is exact with the scale 1 and not with 4 / 6 (arXiv 2512.02010)."""
    weight = torch.tensor([4.0, *[3.0] * 15]).unsqueeze(0)
    plain = rtn.solve(weight, None, SCHEMES["nvfp4"])
    best = rtn_mse.solve(weight, None, SCHEMES["nvfp4"])
    errors = [
        (fp4.dequantize(q, SCHEMES["nvfp4"]) - weight).abs().max().item() for q in (plain, best)
    ]
    assert errors[0] > 0.1 and errors[1] == 0


# --------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_equals_textbook_gptq(scheme: Scheme, seed: int) -> None:
    weight, x = make_correlated_inputs(16, 192, seed=seed)  # more columns than one lazy batch
    scales = fp4.search_scales(weight, (x.T @ x).diagonal(), scheme)
    quantized = rounding.round_fp4_with_feedback(weight, cholesky.factorize_gram(x.T @ x), scales)
    steps = np.vectorize(scale_step(scheme.kind))(scales[0].view(torch.uint8).numpy())
    if scales[1] is not None:
        steps = steps / float(scales[1])
    inputs = x.double().numpy()
    expected = textbook(weight.double().numpy(), inputs, steps, scheme.group_size, 0.01)
    result = decode_all(quantized, scheme)
    # a near-tie that falls otherwise moves later columns
    assert np.isclose(result, expected, atol=1e-9).mean() > 0.98
    losses = [output_error(q - weight.double().numpy(), inputs) for q in (result, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(SCHEMES)),
    tokens=st.integers(1, 80),
    outliers=st.integers(0, 3),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_gptq_and_awq_are_never_worse_than_rtn(
    kind: str, tokens: int, outliers: int, size: float, seed: int
) -> None:
    weight, x = make_correlated_inputs(8, 64, tokens, seed)
    weight[:, :outliers] *= 50
    stats, spec = make_stats(size * x), SCHEMES[kind]
    by_gptq, by_awq, by_rtn = (
        gram.compute_row_errors(
            fp4.dequantize(method.solve(weight, stats, spec), spec) - weight, stats.gram
        )
        for method in (gptq, awq, rtn)
    )
    allowed = by_rtn * (1 + 1e-3) + 1e-9 * gram.compute_row_errors(weight, stats.gram)
    assert bool((by_gptq <= allowed).all()) and bool((by_awq <= allowed).all())


def test_each_step_lowers_the_error(scheme: Scheme) -> None:
    """Nearest with searched scales, feedback, descent: each ends below the one before."""
    weight, x = make_correlated_inputs(32, 128, seed=8)
    stats = make_stats(x)
    factor = cholesky.factorize_gram(stats.gram)
    damped = coordinate_descent.add_damping(stats.gram, factor.damping)
    scales = fp4.search_scales(weight, stats.gram.diagonal(), scheme)
    nearest = fp4.quantize(weight, *scales, scheme)
    fed = rounding.round_fp4_with_feedback(weight, factor, scales)
    refined = coordinate_descent.refine_codes_and_scales(weight, damped, fed, scheme)
    rows = [
        gram.compute_row_errors(fp4.dequantize(q, scheme) - weight, damped)
        for q in (rtn.solve(weight, None, scheme), nearest, fed, refined)
    ]
    totals = [float(errors.sum()) for errors in rows]
    assert totals[0] > totals[1] > 1.5 * totals[2] > totals[3]
    assert bool((rows[3] <= rows[2] * (1 + 1e-4)).all()) and totals[3] < 0.98 * totals[2]


def test_a_batch_equals_its_matrices_and_inputs_stay(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 10, 64, generator=generator)
    weight[1] *= 100
    x = torch.randn(3, 90, 64, generator=generator)
    x[..., :3] *= 10
    stats = InputStats(gram=x.mT @ x, mean_abs=x.abs().mean(-2), n_tokens=torch.full((3,), 90))
    copies = weight.clone(), stats.gram.clone()
    for method in (rtn, gptq):
        whole = method.solve(weight, stats, scheme)
        for e in range(3):
            own = InputStats(
                gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e]
            )
            single = method.solve(weight[e], own, scheme)
            assert torch.equal(whole.codes[e], single.codes)
            assert torch.equal(whole.scale[e], single.scale)
            if single.global_scale is not None and whole.global_scale is not None:
                assert torch.equal(whole.global_scale[e], single.global_scale)
    assert torch.equal(weight, copies[0]) and torch.equal(stats.gram, copies[1])


def test_codes_and_scales_have_the_dtypes_of_the_contract(scheme: Scheme) -> None:
    weight, x = make_correlated_inputs(6, 64)
    for name in ("rtn", "rtn_mse", "gptq", "awq"):
        method = registry.get_method(name)
        assert scheme.kind in method.kinds
        quantized = method.solve(weight, make_stats(x), scheme)
        assert quantized.codes.dtype == torch.uint8 and int(quantized.codes.max()) < 16
        assert str(quantized.scale.dtype) == f"torch.{scheme.scale_dtype}"
        assert quantized.scale.shape == (6, scheme.groups(64)) and quantized.zero is None
        assert (quantized.global_scale is None) == (scheme.kind == "mxfp4")


def test_error_of_an_input_scale_is_that_of_the_scaled_and_rounded_weight(scheme: Scheme) -> None:
    weight, x = make_correlated_inputs(6, 64, seed=9)
    stats = make_stats(x)
    candidate = awq.compute_candidates(stats.mean_abs)[8]
    error = float(awq.compute_error(weight, stats.gram, candidate, scheme))
    scale, inputs = candidate.double().numpy(), x.double().numpy()
    scaled = weight * candidate
    first = rtn.solve(scaled, None, scheme)
    whole = 1.0 if first.global_scale is None else float(first.global_scale)
    result = np.empty((6, 64))
    for row in range(6):
        for group in range(scheme.groups(64)):
            part = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
            target = scaled[row, part].double().numpy()
            counts = np.square(inputs[:, part] / scale[part]).sum(0)
            start = int(first.scale.view(torch.uint8)[row, group])
            errors = search(target, counts, start, scheme.kind, whole)
            best = min(errors, key=lambda bits: errors[bits])
            result[row, part] = back(target, scale_step(scheme.kind)(best) / whole) / scale[part]
    expected = output_error(result - weight.double().numpy(), inputs)
    assert error == pytest.approx(expected, rel=1e-3)


# --------------------------------------------------------------------------------------- edge cases


def test_zeros_are_exact_and_counted(scheme: Scheme) -> None:
    weight = torch.zeros(3, 64)
    for values in (weight, torch.cat([torch.full((1, 64), 6.0), weight])):
        quantized = rtn.solve(values, None, scheme)
        assert torch.equal(fp4.dequantize(quantized, scheme), values)
        counts = fp4.count_fallbacks(quantized, scheme)
        assert int(counts["zero-group"]) == 3 * scheme.groups(64)
        assert int(counts["scale-clamped"]) == 0


def test_an_unseen_input_gives_rtn(scheme: Scheme) -> None:
    weight, _ = make_correlated_inputs(8, 64)
    blind = make_stats(torch.zeros(4, 64))
    quantized, plain = gptq.solve(weight, blind, scheme), rtn.solve(weight, None, scheme)
    assert torch.equal(quantized.codes, plain.codes) and torch.equal(quantized.scale, plain.scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(scheme: Scheme, value: float) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5] = value
    with pytest.raises(NumericsError, match="NaN or infinite"):
        rtn.solve(weight, None, scheme)


def test_groups_far_below_the_matrix_maximum_keep_a_scale() -> None:
    """E4M3 spans 17 binades: smaller groups get the smallest scale, and are counted."""
    weight = torch.full((1, 64), 1.0)
    for group, size in enumerate((1.0, 1e-3, 1e-5, 1e-9)):
        weight[0, group * 16 : (group + 1) * 16] = size
    quantized = rtn.solve(weight, None, SCHEMES["nvfp4"])
    back_again = fp4.dequantize(quantized, SCHEMES["nvfp4"])
    assert torch.allclose(back_again[0, :32], weight[0, :32], rtol=0.07)
    assert back_again[0, 48:].tolist() == [0.0] * 16
    counts = fp4.count_fallbacks(quantized, SCHEMES["nvfp4"])
    assert (int(counts["zero-group"]), int(counts["scale-clamped"])) == (1, 2)


def test_memory_estimate_holds(scheme: Scheme) -> None:
    weight, x = make_correlated_inputs(512, 1024, tokens=32)
    stats = make_stats(x)
    peak = peak_bytes(lambda: gptq.solve(weight, stats, scheme))
    linear = Linear(name="l", in_features=1024, out_features=512, role="mlp")
    assert peak <= estimate_solve_bytes([linear], feedback=True)


def test_references_agree_with_torch() -> None:
    bits = torch.arange(127, dtype=torch.uint8)
    own = [decode_e4m3(int(b)) for b in bits]
    assert own == bits.view(torch.float8_e4m3fn).double().tolist()
    assert back(np.array([0.3, -2.4, 99.0]), 1.0).tolist() == [0.5, -2.0, 6.0]
