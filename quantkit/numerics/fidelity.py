"""Fidelity figures: how far a quantized model's next-token distribution is from its source's.

p is the source's distribution, q the quantized model's; both are teacher-forced on the same text.
The figures are those of llama.cpp's `--kl-divergence`, over the full vocabulary, each with a
standard error where one is defined.
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
    """A figure with its standard error and its number of samples.

    The error is None for a figure without one, such as a maximum.
    """

    value: float
    error: float | None
    n: int


def compare_logits(source: Tensor, quantized: Tensor, targets: Tensor) -> TokenFidelity:
    """Compare logits [n, vocab] of both models, any float dtype, at true next tokens [n] int64.

    KL and log-probabilities are computed in float64: at 8 bits the mean KL is close to float32's
    rounding noise.
    """
    kl, nll_source, nll_quantized, same_top = [], [], [], []
    for p_rows, q_rows, true in zip(
        source.split(CHUNK_TOKENS),
        quantized.split(CHUNK_TOKENS),
        targets.split(CHUNK_TOKENS),
        strict=True,
    ):
        log_p = torch.log_softmax(p_rows.double(), dim=-1)
        log_q = torch.log_softmax(q_rows.double(), dim=-1)
        # a token that p excludes (-inf) adds nothing, whatever q gives it
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        kl.append(terms.sum(dim=-1).clamp(min=0))  # [n, vocab] -> [n]
        index = true.unsqueeze(-1)  # [n] -> [n, 1]
        nll_source.append(-log_p.gather(-1, index).squeeze(-1))
        nll_quantized.append(-log_q.gather(-1, index).squeeze(-1))
        same_top.append(p_rows.argmax(dim=-1) == q_rows.argmax(dim=-1))
    return TokenFidelity(
        kl=torch.cat(kl),
        nll_source=torch.cat(nll_source),
        nll_quantized=torch.cat(nll_quantized),
        same_top=torch.cat(same_top),
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
    """Estimate the mean of values [n]; its standard error is sd / sqrt(n)."""
    n = values.numel()
    error = float(values.double().std()) / sqrt(n) if n > 1 else None
    return Estimate(value=float(values.double().mean()), error=error, n=n)


def estimate_quantile(values: Tensor, share: float) -> Estimate:
    """Estimate the quantile of values [n] at `share` (linear between ranks).

    Its standard error is half the distance between the order statistics one binomial standard
    deviation below and above the rank, which needs no assumption on the distribution. It is None if
    the sample is too small to separate or to contain those ranks.
    """
    ordered = values.double().sort().values
    n = ordered.numel()
    rank, spread = share * (n - 1), sqrt(share * (1 - share) * n)
    below = int(rank)
    value = torch.lerp(ordered[below], ordered[min(below + 1, n - 1)], rank - below)
    lower, upper = round(rank - spread), round(rank + spread)
    is_inside = 0 <= lower < upper < n
    error = float(ordered[upper] - ordered[lower]) / 2 if is_inside else None
    return Estimate(value=float(value), error=error, n=n)


def estimate_maximum(values: Tensor) -> Estimate:
    """Return the largest of values [n]; a maximum has no standard error."""
    return Estimate(value=float(values.double().max()), error=None, n=values.numel())


def estimate_rms(values: Tensor) -> Estimate:
    """Estimate the root mean square of values [n], with the delta method's standard error."""
    square = estimate_mean(values.double().square())
    root = sqrt(square.value)
    error = None if square.error is None or root == 0 else square.error / (2 * root)
    return Estimate(value=root, error=error, n=square.n)


def estimate_proportion(hits: Tensor) -> Estimate:
    """Estimate the share of true values in hits [n] bool, with its binomial standard error."""
    n, share = hits.numel(), float(hits.double().mean())
    return Estimate(value=share, error=sqrt(share * (1 - share) / n), n=n)


def estimate_perplexity(nll: Tensor) -> Estimate:
    """Estimate exp(mean nll) of nll [n] in nats, with the delta method's standard error."""
    log = estimate_mean(nll)
    value = exp(log.value)
    return Estimate(value=value, error=None if log.error is None else value * log.error, n=log.n)


def summarize_tokens(tokens: TokenFidelity) -> dict[str, Estimate]:
    """Return every figure of the report for a set of tokens, by the report's key.

    The perplexity ratio's standard error comes from paired differences: both models see the same
    tokens. Raises NumericsError for a set without tokens.
    """
    if not tokens.kl.numel():
        raise NumericsError(
            "no token to compare two models on; the text must have at least one token with a "
            "successor"
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
    """Return the share of a token's top-k experts that both models select: [n] float64.

    source, quantized: expert indices [n, k] each; their order is ignored.
    """
    hits = source.unsqueeze(-1) == quantized.unsqueeze(-2)  # [n, k, 1] == [n, 1, k] -> [n, k, k]
    return hits.any(dim=-1).double().mean(dim=-1)  # [n, k, k] -> [n]
