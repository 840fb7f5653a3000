"""`rounding` in a recipe: valid and invalid combinations, the build's choice, the record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from quantkit import registry
from quantkit.build.quantize_linear import (
    FALLBACKS,
    QuantizedLinear,
    QuantizeRequest,
    quantize_group,
)
from quantkit.contracts import InputStats, Linear, Scheme
from quantkit.methods import gptq
from quantkit.numerics import affine, cholesky, range_search
from quantkit.numerics import gptq as rounding
from quantkit.plan.decisions import Decision
from quantkit.recipe.quantize import Quantize

SCHEME = Scheme(bits=4, group_size=32, symmetric=False, scale_dtype="bfloat16")


def decision(method: str, rounding: str) -> Decision:
    linear = Linear(name="x", out_features=32, in_features=64, role="mlp")
    return Decision(
        linear=linear,
        block="b",
        action="quantize",
        rule="r",
        method=method,
        rounding=rounding,
        scheme=SCHEME,
    )


def quantize_one(
    choices: Decision,
    weight: torch.Tensor,
    stats: InputStats | None,
    fallbacks: tuple[str, ...] = (),
) -> QuantizedLinear:
    requests = QuantizeRequest(
        decision=choices, weight=weight, stats=stats, tokens=7, rescaled=False, fallbacks=fallbacks
    )
    (results,) = quantize_group([requests], (registry.get_format("dense"),))
    return results


def make_problem() -> tuple[torch.Tensor, InputStats]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    stats = InputStats(gram=x.T @ x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(200))
    return torch.randn(32, 64, generator=g), stats


def test_valid_combinations() -> None:
    assert Quantize().rounding == "gptq"
    assert Quantize(method="awq", rounding="nearest").rounding == "nearest"
    assert Quantize(method="rtn").rounding == "nearest"
    assert Quantize(method="awq", rounding="gptq").rounding == "gptq"
    assert Quantize(method="gptq").rounding == "gptq"
    assert Quantize(method="gptq", rounding="gptq_once").rounding == "gptq_once"


@pytest.mark.parametrize(
    ("method", "rounding", "message"),
    [
        (
            "rtn",
            "gptq",
            "rounding gptq learns from calibration, and method rtn does without; set "
            "rounding: nearest",
        ),
        (
            "rtn",
            "gptq_once",
            "rounding gptq_once learns from calibration, and method rtn does without; set rounding",
        ),
        (
            "gptq",
            "nearest",
            "method gptq is a rounding, found rounding: nearest; set rounding: gptq",
        ),
    ],
)
def test_invalid_combinations_are_rejected(method: str, rounding: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quantize.model_validate({"method": method, "rounding": rounding})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_build_uses_the_rounding_of_the_decision(method: str) -> None:
    weight, stats = make_problem()
    results = quantize_one(decision(method, "gptq"), weight, stats)
    expected = affine.dequantize(gptq.solve(weight, stats, SCHEME), SCHEME).bfloat16().float()
    assert torch.equal(results.weight, expected)
    assert results.record.rounding == "gptq" and results.record.fallbacks == ()


def test_missing_statistics_fall_back_to_nearest() -> None:
    weight, _ = make_problem()
    results = quantize_one(decision("awq", "gptq"), weight, None, fallbacks=("mtp-rtn",))
    plain = quantize_one(decision("rtn", "nearest"), weight, None)
    assert torch.equal(results.weight, plain.weight)
    assert (results.record.method, results.record.rounding, results.record.tokens) == (
        "rtn",
        "nearest",
        7,
    )
    assert results.record.fallbacks == ("mtp-rtn",)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_gptq_once_is_gptq_without_refinement(method: str) -> None:
    """Errors under the gram fall from nearest to gptq_once to gptq."""
    weight, stats = make_problem()
    roundings = ("nearest", "gptq_once", "gptq")
    results = {
        name: quantize_one(decision("awq" if name == "nearest" else method, name), weight, stats)
        for name in roundings
    }
    errors = [results[name].record.output_relative_error or 0.0 for name in roundings]
    assert errors[0] > errors[1] > errors[2] > 0
    ranges = range_search.search_ranges_by_diagonal(weight, stats.gram.diagonal(), SCHEME)
    unrefined = affine.dequantize(
        rounding.round_with_feedback(weight, cholesky.factorize_gram(stats.gram), ranges, SCHEME),
        SCHEME,
    )
    equal_rows = (results["gptq_once"].weight == unrefined.bfloat16().float()).all(
        dim=-1
    )  # the other rows took RTN's
    assert float(equal_rows.float().mean()) > 0.8
    assert results["gptq_once"].record.rounding == "gptq_once"


@pytest.mark.parametrize("way", ["nearest", "gptq", "gptq_once"])
def test_linears_of_one_input_get_the_same_codes_as_alone(way: str) -> None:
    """Together or alone, in any order, with one of another scheme: the same codes."""
    weight, stats = make_problem()
    other = replace(decision("awq", way), scheme=replace(SCHEME, bits=3))
    choices = [decision("awq", way), other, decision("awq", way)]
    weights = [weight[:12], weight[:8], weight[12:]]
    requests = [
        QuantizeRequest(decision=d, weight=w, stats=stats, tokens=7, rescaled=False, fallbacks=())
        for d, w in zip(choices, weights)
    ]
    together = quantize_group(requests, (registry.get_format("dense"),))
    for results, request in zip(together, requests):
        separate = quantize_one(request.decision, request.weight, stats)
        assert torch.equal(results.weight, separate.weight) and results.record == separate.record


def test_raised_damping_is_a_named_fallback() -> None:
    weight, stats = make_problem()
    stats.gram[0, 1] = stats.gram[1, 0] = 1.3 * stats.gram.diagonal().max()
    results = quantize_one(decision("awq", "gptq"), weight, stats)
    assert "damping-raised" in results.record.fallbacks and "damping-raised" in FALLBACKS
