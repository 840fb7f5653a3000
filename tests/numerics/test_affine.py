"""Affine quantization against the oracle, and codes and scales at the limits of their range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from quantkit.contracts import Scheme
from quantkit.errors import NumericsError
from quantkit.methods.rtn import METHOD
from quantkit.numerics import affine


def scheme(
    bits: int = 4, group: int = 32, symmetric: bool = False, dtype: str = "bfloat16"
) -> Scheme:
    return Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_equals_oracle(bits: int, symmetric: bool, dtype: str) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits)) * 0.1
    spec = scheme(bits, 32, symmetric, dtype)
    result = METHOD.solve(weight, None, spec)
    codes, dequantized = oracle.rtn(weight.double().numpy(), bits, 32, symmetric, dtype)
    steps = weight.double().numpy() / np.repeat(result.scale.double().numpy(), 32, axis=1)
    clear = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-5  # not half way between two codes
    assert clear.mean() > 0.9
    assert np.array_equal(result.codes.numpy()[clear], codes[clear])
    assert np.allclose(
        affine.dequantize(result, spec).numpy()[clear], dequantized[clear], rtol=1e-6, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_error_is_at_most_one_step(values: list[float], bits: int, symmetric: bool) -> None:
    """Half a step from rounding, half from the zero point or the top code, some for the scale."""
    weight, spec = torch.tensor([values]), scheme(bits, -1, symmetric, "float32")
    result = METHOD.solve(weight, None, spec)
    assert int(result.codes.max()) < 2**bits
    if float(weight.abs().max()) > 1e-30:
        lost = (affine.dequantize(result, spec) - weight).abs().max()
        assert float(lost) <= 1.001 * float(result.scale)


def test_range_includes_zero() -> None:
    """Without zero in the range the group 1, 1.5, 1.25, 2 becomes 1, 1, 1, 1."""
    weight, spec = torch.tensor([[1.02, 1.5, 1.25, 2]]), scheme(group=4, dtype="float32")
    result = METHOD.solve(weight, None, spec)
    assert result.codes.tolist() == [[8, 11, 9, 15]]
    assert torch.allclose(affine.dequantize(result, spec), weight, atol=2 / 15 / 2 + 1e-6)


def test_scale_is_rounded_before_codes() -> None:
    """max / 15 = 0.0667.. is 0.06689 in bfloat16.

    0.234 is code 4 under the exact scale and 3 under the stored one.
    """
    weight, spec = torch.tensor([[0.2338, 1.0]]), scheme(group=2)
    result = METHOD.solve(weight, None, spec)
    assert float(result.scale) == 0.06689453125
    assert result.codes.tolist() == [[3, 15]]
    assert round(0.2338 / (1 / 15)) == 4


def test_codes_are_clamped_after_scale_rounds_down() -> None:
    """A stored scale below max / 15 gives code 16, which would corrupt its 4-bit neighbor."""
    for top in torch.linspace(0.5, 2, 200).tolist():
        result = METHOD.solve(torch.tensor([[-top, top]]), None, scheme(group=2))
        assert int(result.codes.max()) <= 15


def test_group_of_zeros_is_exact_and_counted() -> None:
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    weight[1, 2, 32:] = 0
    for symmetric in (False, True):
        spec = scheme(symmetric=symmetric)
        result = METHOD.solve(weight, None, spec)
        assert torch.equal(affine.dequantize(result, spec)[1, 2, 32:], torch.zeros(32))
        counts = affine.count_fallbacks(result, spec)
        assert {name: count.tolist() for name, count in counts.items()} == {
            "zero-group": [0, 1],
            "scale-clamped": [0, 0],
        }


@pytest.mark.parametrize(
    ("magnitude", "dtype", "limit"),
    [(1e-7, "float16", 2.0**-14), (1e7, "float16", 65504.0), (1e-38, "bfloat16", 2.0**-126)],
)
def test_scale_out_of_range_is_clamped_and_counted(
    magnitude: float, dtype: str, limit: float
) -> None:
    spec = scheme(dtype=dtype)
    result = METHOD.solve(torch.full((1, 32), magnitude), None, spec)
    assert float(result.scale) == limit
    assert affine.count_fallbacks(result, spec)["scale-clamped"].item() == 1
    assert bool(torch.isfinite(affine.dequantize(result, spec)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ranges_reject_weight_that_is_not_finite(bad: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 7] = bad
    with pytest.raises(NumericsError, match="NaN or infinite"):
        METHOD.solve(weight, None, scheme())


def test_invalid_scheme_is_rejected() -> None:
    with pytest.raises(NumericsError, match="group size 48 does not divide 64 input features"):
        METHOD.solve(torch.ones(1, 64), None, scheme(group=48))
    with pytest.raises(NumericsError, match="bits = 9: integer codes have 2 to 8 bits"):
        METHOD.solve(torch.ones(1, 64), None, scheme(bits=9))


def test_batch_equals_its_matrices() -> None:
    weight = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1))
    whole = METHOD.solve(weight, None, scheme())
    for index, matrix in enumerate(weight):
        single = METHOD.solve(matrix, None, scheme())
        assert torch.equal(whole.codes[index], single.codes) and torch.equal(
            whole.scale[index], single.scale
        )
        assert (
            whole.zero is not None
            and single.zero is not None
            and torch.equal(whole.zero[index], single.zero)
        )


def test_group_size_minus_one_is_one_group_per_row() -> None:
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    result, explicit = (
        METHOD.solve(weight, None, scheme(group=-1)),
        METHOD.solve(weight, None, scheme(group=96)),
    )
    assert result.scale.shape == (4, 1) and torch.equal(result.codes, explicit.codes)
