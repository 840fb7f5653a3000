"""How far a quantized model's next-token distribution is from its source's: per token, and summed up.

p is the source, q the quantized model; both are teacher-forced on the same text. The figures are those of llama.cpp's
`--kl-divergence`, over the full vocabulary, each with a standard error where one is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

from quantkit.errors import NumericsError

CHUNK_TOKENS = 1024
"""Tokens whose float64 log-probabilities are held at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFidelity:
    """One value per scored token, [n] each."""

    kl: Tensor  # KL(p || q) over the full vocabulary, nats, float64
    nll_source: Tensor  # -log p(true token), nats, float64
    nll_quantized: Tensor  # -log q(true token), nats, float64
    same_top: Tensor  # whether the most probable token is the same, bool

    @property
    def delta_p(self) -> Tensor:
        """Change of the true token's probability, q - p: [n] float64."""
        return torch.exp(-self.nll_quantized) - torch.exp(-self.nll_source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its standard error (None where it has none, as for a maximum) and its number of samples."""

    value: float
    error: float | None
    n: int


def compare_logits(source: Tensor, quantized: Tensor, targets: Tensor) -> TokenFidelity:
    """Compare logits [n, vocab] of both models, any float dtype, at true next tokens [n] int64.

    KL and log-probabilities are taken in float64: at 8 bits the mean KL is near float32's rounding noise.
    """
    kl, first, second, same = [], [], [], []
    for p_rows, q_rows, true in zip(
        source.split(CHUNK_TOKENS),
        quantized.split(CHUNK_TOKENS),
        targets.split(CHUNK_TOKENS),
        strict=True,
    ):
        log_p = torch.log_softmax(p_rows.double(), dim=-1)
        log_q = torch.log_softmax(q_rows.double(), dim=-1)
        # a token that p excludes (-inf) adds nothing, whatever q thinks of it
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        kl.append(terms.sum(dim=-1).clamp(min=0))  # [n, vocab] -> [n]
        index = true.unsqueeze(-1)  # [n] -> [n, 1]
        first.append(-log_p.gather(-1, index).squeeze(-1))
        second.append(-log_q.gather(-1, index).squeeze(-1))
        same.append(p_rows.argmax(dim=-1) == q_rows.argmax(dim=-1))
    return TokenFidelity(
        kl=torch.cat(kl),
        nll_source=torch.cat(first),
        nll_quantized=torch.cat(second),
        same_top=torch.cat(same),
    )


def concatenate_tokens(parts: list[TokenFidelity]) -> TokenFidelity:
    """Join the tokens of several chunks, in order."""
    return TokenFidelity(
        kl=torch.cat([part.kl for part in parts]),
        nll_source=torch.cat([part.nll_source for part in parts]),
        nll_quantized=torch.cat([part.nll_quantized for part in parts]),
        same_top=torch.cat([part.same_top for part in parts]),
    )


def estimate_mean(values: Tensor) -> Estimate:
    """Mean of values [n] with its standard error sd / sqrt(n)."""
    n = values.numel()
    error = float(values.double().std()) / sqrt(n) if n > 1 else None
    return Estimate(value=float(values.double().mean()), error=error, n=n)


def estimate_quantile(values: Tensor, share: float) -> Estimate:
    """The value that `share` of values [n] do not exceed (linear between ranks).

    Its standard error is half the distance between the order statistics one binomial standard deviation below and above
    the rank, which needs no assumption on the distribution; None when the sample cannot tell those ranks apart or does
    not reach them.
    """
    ordered = values.double().sort().values
    n = ordered.numel()
    rank, spread = share * (n - 1), sqrt(share * (1 - share) * n)
    below = int(rank)
    value = torch.lerp(ordered[below], ordered[min(below + 1, n - 1)], rank - below)
    lower, upper = round(rank - spread), round(rank + spread)
    inside = 0 <= lower < upper < n
    return Estimate(
        value=float(value),
        error=float(ordered[upper] - ordered[lower]) / 2 if inside else None,
        n=n,
    )


def estimate_maximum(values: Tensor) -> Estimate:
    """The largest of values [n]; a maximum has no standard error."""
    return Estimate(value=float(values.double().max()), error=None, n=values.numel())


def estimate_rms(values: Tensor) -> Estimate:
    """Root mean square of values [n], with the delta method's standard error."""
    square = estimate_mean(values.double().square())
    root = sqrt(square.value)
    return Estimate(
        value=root,
        error=None if square.error is None or root == 0 else square.error / (2 * root),
        n=square.n,
    )


def estimate_proportion(hits: Tensor) -> Estimate:
    """Share of true values in hits [n] bool, with its binomial standard error."""
    n, share = hits.numel(), float(hits.double().mean())
    return Estimate(value=share, error=sqrt(share * (1 - share) / n), n=n)


def estimate_perplexity(nll: Tensor) -> Estimate:
    """exp(mean nll) of per-token nll [n] in nats, with the delta method's standard error."""
    log = estimate_mean(nll)
    value = exp(log.value)
    return Estimate(value=value, error=None if log.error is None else value * log.error, n=log.n)


def summarize_tokens(tokens: TokenFidelity) -> dict[str, Estimate]:
    """Every figure of the report for a set of tokens, under the names the report uses.

    The perplexity ratio's standard error comes from paired differences: both models see the same tokens. Raises
    NumericsError for a set without tokens.
    """
    if not tokens.kl.numel():
        raise NumericsError(
            "no token to compare two models on; the text must have at least one token with a successor"
        )
    return {
        "kl_mean": estimate_mean(tokens.kl),
        "kl_median": estimate_quantile(tokens.kl, 0.5),
        "kl_p99": estimate_quantile(tokens.kl, 0.99),
        "kl_p999": estimate_quantile(tokens.kl, 0.999),
        "kl_max": estimate_maximum(tokens.kl),
        "ppl_source": estimate_perplexity(tokens.nll_source),
        "ppl_artifact": estimate_perplexity(tokens.nll_quantized),
        "ppl_ratio": estimate_perplexity(tokens.nll_quantized - tokens.nll_source),
        "top1": estimate_proportion(tokens.same_top),
        "mean_delta_p": estimate_mean(tokens.delta_p),
        "rms_delta_p": estimate_rms(tokens.delta_p),
    }


def compute_router_agreement(source: Tensor, quantized: Tensor) -> Tensor:
    """Share of a token's top-k experts that both models pick: indices [n, k] each -> [n] float64, order ignored."""
    hits = source.unsqueeze(-1) == quantized.unsqueeze(-2)  # [n, k, 1] == [n, 1, k] -> [n, k, k]
    return hits.any(dim=-1).double().mean(dim=-1)  # [n, k, k] -> [n]
