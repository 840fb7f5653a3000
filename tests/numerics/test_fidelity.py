"""Fidelity figures against their definitions, and against scipy where it has them."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from scipy import stats
from support import oracle

from quantkit.errors import NumericsError
from quantkit.numerics import fidelity
from quantkit.numerics.fidelity import TokenFidelity


def logits(
    seed: int, n: int = 40, vocabulary: int = 30
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(n, vocabulary, generator=g) * 4
    q = p + torch.randn(n, vocabulary, generator=g) * 0.3
    return p, q, torch.randint(0, vocabulary, (n,), generator=g)


def test_kl_equals_its_definition() -> None:
    p, q, true = logits(0)
    result = fidelity.compare_logits(p, q, true)
    expected = [
        oracle.kl(a, b) for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)
    ]
    assert np.allclose(result.kl.numpy(), expected, rtol=1e-9)
    assert float(result.kl.mean()) != pytest.approx(
        float(fidelity.compare_logits(q, p, true).kl.mean()), rel=1e-6
    )


def test_kl_resolves_differences_below_float32_noise() -> None:
    """One logit shifted by 1e-5 over 50,000 tokens: KL 1e-15; equal logits give exactly 0."""
    p = torch.zeros(1, 50_000, dtype=torch.float64)
    q = p.clone()
    q[0, 0] += 1e-3
    share = 1 / 50_000
    assert float(fidelity.compare_logits(p, q, torch.tensor([0])).kl) == pytest.approx(
        share * (1 - share) * 1e-6 / 2, rel=1e-3
    )
    assert float(fidelity.compare_logits(p, p, torch.tensor([0])).kl) == 0


def test_excluded_token_adds_nothing() -> None:
    p, q = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, 1.0, -3.0]])
    result = float(fidelity.compare_logits(p, q, torch.tensor([1])).kl)
    assert result == pytest.approx(log(1 + exp(-3) / (1 + exp(1))), rel=1e-6)


def test_true_token_figures_equal_their_definitions() -> None:
    p, q, true = logits(1)
    result = fidelity.compare_logits(p, q, true)
    probability = torch.softmax(p.double(), -1)[torch.arange(40), true]
    changed = torch.softmax(q.double(), -1)[torch.arange(40), true]
    assert torch.allclose(result.nll_source, -probability.log())
    assert torch.allclose(result.delta_p, changed - probability)
    assert torch.equal(result.same_top, p.argmax(-1) == q.argmax(-1)) and not bool(
        result.same_top.all()
    )


def test_figures_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, true = logits(2)
    whole = fidelity.compare_logits(p, q, true)
    monkeypatch.setattr(fidelity, "CHUNK_TOKENS", 7)
    joined = fidelity.concatenate_tokens([
        fidelity.compare_logits(*(t[part] for t in (p, q, true)))
        for part in (slice(0, 9), slice(9, 40))
    ])
    for name in ("kl", "nll_source", "nll_quantized", "same_top"):
        assert torch.equal(getattr(whole, name), getattr(joined, name))


def test_summary_equals_scipy() -> None:
    tokens = fidelity.compare_logits(*logits(3, n=2000))
    result = fidelity.summarize_tokens(tokens)
    kl = tokens.kl.numpy()
    assert result["kl_mean"].value == pytest.approx(kl.mean())
    assert result["kl_mean"].error == pytest.approx(stats.sem(kl))
    for name, share in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        assert result[name].value == pytest.approx(np.quantile(kl, share))
    assert (result["kl_max"].value, result["kl_max"].error, result["kl_max"].n) == (
        kl.max(),
        None,
        2000,
    )
    difference = (tokens.nll_quantized - tokens.nll_source).numpy()
    ratio = result["ppl_artifact"].value / result["ppl_source"].value
    assert result["ppl_ratio"].value == pytest.approx(ratio) and ratio == pytest.approx(
        exp(difference.mean())
    )
    assert result["ppl_ratio"].error == pytest.approx(ratio * stats.sem(difference))
    assert result["top1"].value == tokens.same_top.double().mean()
    assert result["rms_delta_p"].value == pytest.approx(
        sqrt(np.square(tokens.delta_p.numpy()).mean())
    )


def test_interval_of_a_quantile_covers_it() -> None:
    """Medians of 400 normal values: at least 93 % of the intervals hold the true 0."""
    values = torch.randn(400, 400, generator=torch.Generator().manual_seed(4))
    intervals = [fidelity.estimate_quantile(row, 0.5).interval or (1.0, 1.0) for row in values]
    inside = sum(
        low <= 0 <= high for low, high in intervals if low is not None and high is not None
    )
    assert 0.93 <= inside / 400 <= 0.98


def test_interval_of_a_quantile_is_open_for_a_small_sample() -> None:
    """The 99.9 % of 100 values may lie above the largest."""
    quantile = fidelity.estimate_quantile(torch.arange(100.0), 0.999)
    assert quantile.error is None and quantile.interval is not None and quantile.interval[1] is None


def test_intervals_of_the_summary_follow_from_that_of_a_mean() -> None:
    tokens = fidelity.compare_logits(*logits(6, n=600))
    documents = torch.arange(600) // 20
    result = fidelity.summarize_tokens(tokens, documents)
    change = (tokens.nll_quantized - tokens.nll_source).reshape(30, 20).mean(dim=1).numpy()
    half = stats.t.ppf(0.975, 29) * stats.sem(change)
    ends = (exp(change.mean() - half), exp(change.mean() + half))
    assert result["ppl_ratio"].interval == pytest.approx(ends)
    assert result["kl_max"].interval is None
    for name in ("kl_mean", "kl_median", "top1", "rms_delta_p", "mean_delta_p"):
        low, high = result[name].interval or (None, None)
        assert low is not None and high is not None and low <= result[name].value <= high


def test_one_token_has_no_error_and_zero_tokens_are_rejected() -> None:
    p, q, true = logits(5, n=1)
    assert fidelity.summarize_tokens(fidelity.compare_logits(p, q, true))["kl_mean"].error is None
    empty = torch.zeros(0)
    with pytest.raises(NumericsError, match="no token to compare"):
        fidelity.summarize_tokens(
            TokenFidelity(kl=empty, nll_source=empty, nll_quantized=empty, same_top=empty.bool())
        )


def test_router_agreement_ignores_order() -> None:
    source = torch.tensor([[0, 1], [2, 3], [4, 5]])
    quantized = torch.tensor([[1, 0], [2, 7], [6, 7]])
    assert fidelity.compute_router_agreement(source, quantized).tolist() == [1, 0.5, 0]


def test_interval_of_a_mean_that_is_not_negative_is_not_negative() -> None:
    """One value is nearly all of the mean: the symmetric interval would reach below 0."""
    values = torch.tensor([1e-6] * 200 + [1.0])
    positive, plain = fidelity.estimate_positive_mean(values), fidelity.estimate_mean(values)
    assert positive.interval is not None and plain.interval is not None
    (low, high), (below, above) = positive.interval, plain.interval
    assert low is not None and high is not None and above is not None and below is not None
    assert below < 0 < low < positive.value < high
    half = (above - positive.value) / positive.value
    assert (low, high) == pytest.approx((positive.value * exp(-half), positive.value * exp(half)))
