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
from quantkit.recipe.schema import Quantize

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


def solved(
    chosen: Decision,
    weight: torch.Tensor,
    stats: InputStats | None,
    fallbacks: tuple[str, ...] = (),
) -> QuantizedLinear:
    asked = QuantizeRequest(
        decision=chosen, weight=weight, stats=stats, tokens=7, rescaled=False, fallbacks=fallbacks
    )
    (found,) = quantize_group([asked], (registry.get_format("dense"),))
    return found


def problem() -> tuple[torch.Tensor, InputStats]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    stats = InputStats(gram=x.T @ x, mean_abs=x.abs().mean(0), n_tokens=torch.tensor(200))
    return torch.randn(32, 64, generator=g), stats


def test_valid_combinations() -> None:
    assert Quantize().rounding == "nearest"
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
    weight, stats = problem()
    found = solved(decision(method, "gptq"), weight, stats)
    told = affine.dequantize(gptq.solve(weight, stats, SCHEME), SCHEME).bfloat16().float()
    assert torch.equal(found.weight, told)
    assert found.record.rounding == "gptq" and found.record.fallbacks == ()


def test_missing_statistics_fall_back_to_nearest() -> None:
    weight, _ = problem()
    found = solved(decision("awq", "gptq"), weight, None, fallbacks=("mtp-rtn",))
    plain = solved(decision("rtn", "nearest"), weight, None)
    assert torch.equal(found.weight, plain.weight)
    assert (found.record.method, found.record.rounding, found.record.tokens) == (
        "rtn",
        "nearest",
        7,
    )
    assert found.record.fallbacks == ("mtp-rtn",)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_gptq_once_is_gptq_without_refinement(method: str) -> None:
    """Errors under the gram fall from nearest to gptq_once to gptq."""
    weight, stats = problem()
    roundings = ("nearest", "gptq_once", "gptq")
    found = {
        name: solved(decision("awq" if name == "nearest" else method, name), weight, stats)
        for name in roundings
    }
    errors = [found[name].record.output_error or 0.0 for name in roundings]
    assert errors[0] > errors[1] > errors[2] > 0
    ranges = range_search.search_ranges_by_diagonal(weight, stats.gram.diagonal(), SCHEME)
    fed = affine.dequantize(
        rounding.round_with_feedback(weight, cholesky.factorize_gram(stats.gram), ranges, SCHEME),
        SCHEME,
    )
    same = (found["gptq_once"].weight == fed.bfloat16().float()).all(
        dim=-1
    )  # the other rows took RTN's
    assert float(same.float().mean()) > 0.8
    assert found["gptq_once"].record.rounding == "gptq_once"


@pytest.mark.parametrize("way", ["nearest", "gptq", "gptq_once"])
def test_linears_of_one_input_get_the_same_codes_as_alone(way: str) -> None:
    """Together or alone, in any order, with one of another scheme: the same codes."""
    weight, stats = problem()
    other = replace(decision("awq", way), scheme=replace(SCHEME, bits=3))
    chosen = [decision("awq", way), other, decision("awq", way)]
    weights = [weight[:12], weight[:8], weight[12:]]
    asked = [
        QuantizeRequest(decision=d, weight=w, stats=stats, tokens=7, rescaled=False, fallbacks=())
        for d, w in zip(chosen, weights)
    ]
    together = quantize_group(asked, (registry.get_format("dense"),))
    for found, one in zip(together, asked):
        alone = solved(one.decision, one.weight, stats)
        assert torch.equal(found.weight, alone.weight) and found.record == alone.record


def test_raised_damping_is_a_named_fallback() -> None:
    weight, stats = problem()
    stats.gram[0, 1] = stats.gram[1, 0] = 1.3 * stats.gram.diagonal().max()
    found = solved(decision("awq", "gptq"), weight, stats)
    assert "damping-raised" in found.record.fallbacks and "damping-raised" in FALLBACKS
