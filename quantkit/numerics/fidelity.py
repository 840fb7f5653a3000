"""Fidelity figures: how far a quantized model's next-token distribution is from its source's.

p is the source's distribution, q the quantized model's; both are teacher-forced on the same text.
The figures are those of llama.cpp's `--kl-divergence`, over the full vocabulary, each with an
interval where one is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.numerics import clustered
from quantkit.numerics.clustered import Interval

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
    """A figure with its standard error, its 95 % interval and its number of samples.

    The error is None for a figure without one, such as a quantile, and the interval for one without
    any, such as a maximum. An end of an interval is None if the sample is too small for it.
    """

    value: float
    error: float | None
    n: int
    interval: Interval | None = None


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


def rank_predictions(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` most probable tokens of logits [n, vocab], most probable first.

    Returns ids [n, count] int64 and probabilities [n, count] float64; equal logits are in ascending
    order of ids.
    """
    count = min(count, logits.shape[-1])
    values, ids = logits.double().topk(count, dim=-1)
    order = ids.argsort(dim=-1)
    values, ids = values.gather(-1, order), ids.gather(-1, order)
    order = values.argsort(dim=-1, descending=True, stable=True)
    values, ids = values.gather(-1, order), ids.gather(-1, order)
    total = torch.logsumexp(logits.double(), dim=-1, keepdim=True)  # [n, 1]
    return ids, torch.exp(values - total)


def estimate_mean(values: Tensor, documents: Tensor | None = None) -> Estimate:
    """Estimate the mean of values [n] of `documents` [n], by default each on its own."""
    n = values.numel()
    if n < 2:
        return Estimate(value=float(values.double().mean()), error=None, n=n)
    error, interval = clustered.compute_mean_interval(_to_array(values), _to_groups(documents))
    return Estimate(
        value=float(values.double().mean()),
        error=error if isfinite(error) else None,
        n=n,
        interval=interval if isfinite(error) else None,
    )


def estimate_positive_mean(values: Tensor, documents: Tensor | None = None) -> Estimate:
    """Estimate the mean of values [n] that are not negative, with an interval that is not either:
    that of its logarithm by the delta method.
    """
    mean = estimate_mean(values, documents)
    if mean.interval is None or mean.interval[1] is None or mean.value <= 0:
        return mean
    spread = exp(min(700.0, (mean.interval[1] - mean.value) / mean.value))
    interval = (mean.value / spread, mean.value * spread)
    return Estimate(value=mean.value, error=mean.error, n=mean.n, interval=interval)


def estimate_quantile(values: Tensor, share: float, documents: Tensor | None = None) -> Estimate:
    """Estimate the quantile of values [n] at `share` (linear between ranks).

    Its interval is two order statistics (`clustered.compute_quantile_interval`).
    """
    array = _to_array(values)
    interval = clustered.compute_quantile_interval(array, share, _to_groups(documents))
    value = float(np.quantile(array, share))
    return Estimate(value=value, error=None, n=len(array), interval=interval)


def estimate_maximum(values: Tensor) -> Estimate:
    """Return the largest of values [n]; a maximum has no standard error."""
    return Estimate(value=float(values.double().max()), error=None, n=values.numel())


def estimate_rms(values: Tensor, documents: Tensor | None = None) -> Estimate:
    """Estimate the root mean square of values [n]: error by the delta method, interval of the mean
    square's.
    """
    square = estimate_positive_mean(values.double().square(), documents)
    root = sqrt(square.value)
    error = None if square.error is None or root == 0 else square.error / (2 * root)
    ends = square.interval or (None, None)
    low, high = (None if end is None else sqrt(max(end, 0.0)) for end in ends)
    interval = None if square.interval is None else (low, high)
    return Estimate(value=root, error=error, n=square.n, interval=interval)


def estimate_proportion(hits: Tensor, documents: Tensor | None = None) -> Estimate:
    """Estimate the share of true values in hits [n] bool, with its standard error and the interval
    of `clustered.compute_share_interval`.
    """
    mean = estimate_mean(hits.double(), documents)
    if mean.error is None:
        return mean
    array = _to_array(hits)
    interval = clustered.compute_share_interval(array, _to_groups(documents))
    return Estimate(value=mean.value, error=mean.error, n=mean.n, interval=interval)


def estimate_perplexity(nll: Tensor, documents: Tensor | None = None) -> Estimate:
    """Estimate exp(mean nll) of nll [n] in nats: error by the delta method, interval exp of the
    mean's.
    """
    log = estimate_mean(nll, documents)
    value = exp(log.value)
    error = None if log.error is None else value * log.error
    low, high = (None if end is None else exp(end) for end in log.interval or (None, None))
    interval = None if log.interval is None else (low, high)
    return Estimate(value=value, error=error, n=log.n, interval=interval)


def _to_array(values: Tensor) -> clustered.Array:
    return values.double().numpy()


def _to_groups(documents: Tensor | None) -> clustered.Array | None:
    return None if documents is None else documents.numpy()


def summarize_tokens(tokens: TokenFidelity, documents: Tensor | None = None) -> dict[str, Estimate]:
    """Return every figure of the report for a set of tokens, by the report's key.

    documents: [n] int64, the document of each token; intervals take documents as the independent
    units. The perplexity ratio's interval comes from paired differences: both models see the same
    tokens. Raises NumericsError for a set without tokens.
    """
    if not tokens.kl.numel():
        raise NumericsError(
            "no token to compare two models on; the text must have at least one token with a "
            "successor"
        )
    return {
        "kl_mean": estimate_positive_mean(tokens.kl, documents),
        "kl_median": estimate_quantile(tokens.kl, 0.5, documents),
        "kl_p99": estimate_quantile(tokens.kl, 0.99, documents),
        "kl_p999": estimate_quantile(tokens.kl, 0.999, documents),
        "kl_max": estimate_maximum(tokens.kl),
        "ppl_source": estimate_perplexity(tokens.nll_source, documents),
        "ppl_artifact": estimate_perplexity(tokens.nll_quantized, documents),
        "ppl_ratio": estimate_perplexity(tokens.nll_quantized - tokens.nll_source, documents),
        "top1": estimate_proportion(tokens.same_top, documents),
        "mean_delta_p": estimate_mean(tokens.delta_p, documents),
        "rms_delta_p": estimate_rms(tokens.delta_p, documents),
    }


def compute_router_agreement(source: Tensor, quantized: Tensor) -> Tensor:
    """Return the share of a token's top-k experts that both models select: [n] float64.

    source, quantized: expert indices [n, k] each; their order is ignored.
    """
    hits = source.unsqueeze(-1) == quantized.unsqueeze(-2)  # [n, k, 1] == [n, 1, k] -> [n, k, k]
    return hits.any(dim=-1).double().mean(dim=-1)  # [n, k, k] -> [n]
