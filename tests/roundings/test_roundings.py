"""The contract of every registered rounding, and that a rounding is one file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit import registry, roundings
from quantkit.build.quantize_linear import FALLBACKS, QuantizeRequest, quantize_group
from quantkit.contracts import (
    FALLBACK_ROUNDING,
    InputStats,
    Linear,
    Quantized,
    Rounding,
    Scheme,
)
from quantkit.errors import NumericsError, UsageError
from quantkit.numerics import affine, gram
from quantkit.plan.decisions import Decision
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.quantize import Quantize

SOLVE = registry.get_method("awq").solve

DOWNWARD = """
from quantkit.contracts import Quantized, RoundedWeight, Rounding


def round_weight(weight, stats, scheme, solve):
    nearest = solve(weight, stats, scheme)
    codes = (nearest.codes.int() - 1).clamp(0, 2**scheme.bits - 1).to(nearest.codes.dtype)
    quantized = Quantized(codes=codes, scale=nearest.scale, zero=nearest.zero)
    return RoundedWeight(quantized=quantized, fallbacks=("zero-group",))


ROUNDING = Rounding(round_weight=round_weight, needs_stats=NEEDS_STATS)
"""
"""A rounding that stores the code below the method's."""


@pytest.fixture(params=registry.list_names("roundings"))
def rounding(request: pytest.FixtureRequest) -> Rounding:
    return registry.get_rounding(request.param)


def make_scheme(bits: int = 4, group_size: int = 32, symmetric: bool = False) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype="bfloat16")


def make_problem(*shape: int, seed: int = 0) -> tuple[Tensor, InputStats]:
    """Return random weights [..., out, in] and statistics of 200 tokens, channels correlated."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape[:-2], 200, shape[-1], generator=g)
    x = x @ torch.randn(shape[-1], shape[-1], generator=g)
    counts = torch.full(shape[:-2], 200)
    stats = InputStats(gram=x.mT @ x, mean_abs=x.abs().mean(-2), n_tokens=counts)
    return torch.randn(shape, generator=g) * 0.02, stats


def is_equal(first: Quantized, second: Quantized) -> bool:
    if (first.zero is None) != (second.zero is None):
        return False
    zeros = first.zero is None or second.zero is None or torch.equal(first.zero, second.zero)
    return (
        zeros and torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, False), (3, -1, True), (8, 64, False)]
)
def test_codes_and_scales_have_the_contract_shapes(
    rounding: Rounding, bits: int, group_size: int, symmetric: bool
) -> None:
    """Shapes, dtypes and code range; inputs stay unchanged; the same call gives the same codes."""
    weight, stats = make_problem(2, 10, 64)
    before = weight.clone(), stats.gram.clone()
    scheme = make_scheme(bits, group_size, symmetric)
    rounded = rounding.round_weight(weight, stats, scheme, SOLVE)
    quantized, shape = rounded.quantized, (2, 10, scheme.groups(64))
    assert quantized.codes.shape == (2, 10, 64) and quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert quantized.scale.shape == shape and quantized.scale.dtype == torch.bfloat16
    assert bool((quantized.scale > 0).all())
    assert (quantized.zero is None) == symmetric
    if quantized.zero is not None:
        assert quantized.zero.shape == shape and quantized.zero.dtype == torch.uint8
    assert set(rounded.fallbacks) <= set(FALLBACKS)
    assert torch.equal(weight, before[0]) and torch.equal(stats.gram, before[1])
    assert is_equal(quantized, rounding.round_weight(weight, stats, scheme, SOLVE).quantized)


def test_batch_equals_its_matrices(rounding: Rounding) -> None:
    weight, stats = make_problem(3, 8, 64)
    batch = rounding.round_weight(weight, stats, make_scheme(), SOLVE).quantized
    assert batch.zero is not None
    for e in range(3):
        one = InputStats(gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e])
        single = rounding.round_weight(weight[e], one, make_scheme(), SOLVE).quantized
        zero, codes, scale = batch.zero[e], batch.codes[e], batch.scale[e]
        assert is_equal(Quantized(codes=codes, scale=scale, zero=zero), single)


def test_error_under_the_gram_is_at_most_that_of_rtn(rounding: Rounding) -> None:
    weight, stats = make_problem(2, 32, 128, seed=1)
    for bits in (3, 4):
        scheme = make_scheme(bits, 64)
        plain = registry.get_method("rtn").solve(weight, None, scheme)
        rounded = rounding.round_weight(weight, stats, scheme, SOLVE).quantized
        errors, baseline = (
            gram.compute_error(affine.dequantize(q, scheme) - weight, stats.gram)
            for q in (rounded, plain)
        )
        assert bool((errors <= 1.001 * baseline).all())


def test_missing_statistics_raise_or_give_the_methods_codes(rounding: Rounding) -> None:
    weight, _ = make_problem(8, 64)
    solve = registry.get_method("rtn").solve
    if rounding.needs_stats:
        with pytest.raises(NumericsError, match="use method rtn"):
            rounding.round_weight(weight, None, make_scheme(), solve)
    else:
        rounded = rounding.round_weight(weight, None, make_scheme(), solve)
        assert is_equal(rounded.quantized, solve(weight, None, make_scheme()))


def test_fallback_rounding_needs_no_statistics() -> None:
    assert FALLBACK_ROUNDING in registry.list_names("roundings")
    assert not registry.get_rounding(FALLBACK_ROUNDING).needs_stats
    assert Quantize(method="rtn").rounding == FALLBACK_ROUNDING


def test_unknown_rounding_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        registry.get_rounding("gptq_onse")
    assert str(caught.value) == (
        "no rounding named 'gptq_onse'. Did you mean 'gptq_once'? Known: gptq, gptq_once, nearest."
    )
    with pytest.raises(UsageError, match=r"no rounding named 'gtpq'\. Did you mean 'gptq'\?"):
        parse_recipe(
            "version: 1\nsource: {model: m}\nquantize: {rounding: gtpq}\nfidelity: none\n"
            "output: {path: out}\n",
            "recipe.yaml",
        )


@pytest.mark.parametrize("needs_stats", [True, False])
def test_new_rounding_is_one_file(
    needs_stats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the folder is a recipe value, and a build rounds with it and records it."""
    text = DOWNWARD.replace("NEEDS_STATS", str(needs_stats))
    (tmp_path / "downward.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(roundings, "__path__", [*roundings.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "quantkit.roundings.downward", raising=False)
    monkeypatch.setattr(registry, "list_names", registry.list_names.__wrapped__)  # kept per process
    assert "downward" in registry.list_names("roundings")
    assert Quantize(method="awq", rounding="downward").rounding == "downward"

    weight, stats = make_problem(8, 64)
    linear = Linear(name="x", out_features=8, in_features=64, role="mlp")
    decision = Decision(
        linear=linear,
        block="b",
        action="quantize",
        rule="r",
        method="awq",
        rounding="downward",
        scheme=make_scheme(),
    )
    assert decision.has_error_feedback == needs_stats
    requests = [
        QuantizeRequest(
            decision=decision, weight=weight, stats=s, tokens=7, rescaled=False, fallbacks=()
        )
        for s in (stats, None)
    ]
    with_stats, without = (
        quantize_group([request], (registry.get_format("dense"),))[0] for request in requests
    )
    nearest = SOLVE(weight, stats, make_scheme())
    below = Quantized(
        codes=(nearest.codes.int() - 1).clamp(0, 15).byte(), scale=nearest.scale, zero=nearest.zero
    )
    assert torch.equal(
        with_stats.weight, affine.dequantize(below, make_scheme()).bfloat16().float()
    )
    assert with_stats.record.rounding == "downward"
    assert "zero-group" in with_stats.record.fallbacks
    assert without.record.rounding == (FALLBACK_ROUNDING if needs_stats else "downward")
    monkeypatch.delitem(sys.modules, "quantkit.roundings.downward")
