"""Input scaling of linear groups: search scales on the gram, absorb them in earlier tensors.

For a group of linears that read x, W x = (W s)(x / s) for any positive s [in]. The readers are
multiplied by s; the absorber (a norm, or the rows of an earlier linear) is divided by it. Every
reader must follow, including the router and unquantized linears. AWQ (arXiv 2306.00978, section
3.2) chooses s so that rounding W s costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from quantkit.contracts import Absorber, InputStats, LinearGroup, Rescale, Scheme
from quantkit.errors import NumericsError
from quantkit.numerics.awq_scales import round_to_powers_of_two

FLOAT32_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 3e-2
ROUTING_TOLERANCE = 2e-2
"""Relative change of a block's output, and of its routing weights, that rounding in the compute
dtype explains. Routing has more tolerance, because a token whose two best experts tie may switch;
an unscaled router changes the routing weights by the order of one."""

SEARCH_STRIDE = 4
"""Distance between the candidates that are tried first."""


@dataclass(frozen=True, kw_only=True)
class ScaleChoice:
    """The scale that the search chose for one group: candidate 0 is "no scaling"."""

    group: str
    candidate: int
    error_plain: float
    error_chosen: float

    @property
    def is_rescaled(self) -> bool:
        """Whether the input is scaled."""
        return self.candidate != 0


def compute_group_candidates(
    rescale: Rescale, mean_abs: Tensor, absorber: Absorber, into_norm: bool
) -> Tensor:
    """Return the scales to try, [n, in].

    Scales that a norm absorbs are rounded to powers of two: norm, router and every other kept
    reader then change exponents only, and scaling costs nothing where nothing is quantized.
    Channels that one row of a linear produces share their scale.
    """
    if into_norm:
        return round_to_powers_of_two(rescale.candidates(mean_abs))
    if absorber.rows is None:
        return rescale.candidates(mean_abs)
    index = torch.tensor(absorber.rows.index(), device=mean_abs.device)
    rows, channel = torch.unique(index, return_inverse=True)  # [rows], [in]
    zeros = torch.zeros(len(rows), device=mean_abs.device)
    total = zeros.index_add(0, channel, mean_abs)  # [in] -> [rows]
    repeats = torch.bincount(channel, minlength=len(rows))
    return rescale.candidates(total / repeats)[:, channel]  # [n, rows] -> [n, in]


def check_input(where: str, mean_abs: Tensor, gram: Tensor) -> None:
    """Check that a linear's input and its gram are finite: mean_abs [in], gram [in, in].

    Raises NumericsError.
    """
    if not bool(mean_abs.isfinite().all() & gram.diagonal().isfinite().all()):
        raise NumericsError(
            f"{where}: expected inputs of a size that float32 can square and sum, found NaN or "
            "infinity; look for huge values among the weights up to there"
        )


def compute_scale_errors(
    rescale: Rescale, weight: Tensor, gram: Tensor, scales: Tensor, scheme: Scheme | None
) -> Tensor:
    """Return the error under the gram per candidate, of a matrix or of each of a batch.

    scales [n, in] -> [n, ...] float64.
    """
    return torch.stack([rescale.error(weight, gram, scale, scheme) for scale in scales])


def search_scales(
    group: str,
    added: Tensor,
    batches: Sequence[tuple[Tensor, Scheme | None]],
    gram: Tensor,
    rescale: Rescale,
    scales: Tensor,
) -> ScaleChoice:
    """Search the best of the scales [n, in] for readers of one input.

    Every SEARCH_STRIDE-th scale is tried first, then scales closer around the best: the error over
    AWQ's ratios has one valley, so 9 of 20 scales are enough. batches: weights [..., out, in] with
    their scheme; added [n] float64 is the error of other readers. Candidate 0 wins ties.
    """
    error_by_candidate: dict[int, float] = {}
    tried, stride = list(range(0, len(scales), SEARCH_STRIDE)), SEARCH_STRIDE
    while tried:
        for n in tried:
            errors = [
                rescale.error(weights, gram, scales[n], scheme).sum() for weights, scheme in batches
            ]
            error_by_candidate[n] = float(added[n]) + sum(map(float, errors))
        best = min(error_by_candidate, key=lambda n: (error_by_candidate[n], n))
        stride //= 2
        tried = [n for n in (best - stride, best + stride) if stride and 0 <= n < len(scales)]
    return ScaleChoice(
        group=group,
        candidate=best,
        error_plain=error_by_candidate[0],
        error_chosen=error_by_candidate[best],
    )


def divide_absorber(tensors: dict[str, Tensor], absorber: Absorber, scale: Tensor) -> None:
    """Divide the absorber by `scale` [in], in `tensors` (float32, full names).

    A norm stays exact in its own dtype, because its scales are powers of two.
    """
    name = f"{absorber.module}.weight"
    weight = tensors[name]
    bias = f"{absorber.module}.bias"
    if weight.dim() == 1:
        tensors[name] = weight / scale  # [in]
        if bias in tensors:
            tensors[bias] = tensors[bias] / scale
        return
    rows = (
        torch.arange(len(scale)) if absorber.rows is None else torch.tensor(absorber.rows.index())
    )
    inverse = torch.ones(weight.shape[0], device=weight.device)
    inverse[rows.to(weight.device)] = 1 / scale  # channels that share a row share their scale
    tensors[name] = weight * inverse[:, None]  # [rows, in]
    if bias in tensors:
        tensors[bias] = tensors[bias] * inverse


def multiply_readers(tensors: dict[str, Tensor], group: LinearGroup, scale: Tensor) -> None:
    """Multiply the input channels of every reader of the group by `scale`, in `tensors`."""
    for reader in group.readers:
        tensors[f"{reader}.weight"] = tensors[f"{reader}.weight"] * scale  # [out, in] * [in]


def rescale_stats(stats: InputStats, scale: Tensor) -> InputStats:
    """Return the statistics of x / scale [in] or [..., in]; the gram is divided in place."""
    # by [..., in, 1] and [..., 1, in]
    gram = stats.gram.div_(scale.unsqueeze(-1)).div_(scale.unsqueeze(-2))
    cross, residual = stats.cross, stats.residual
    if cross is not None:
        cross = cross.div_(scale.unsqueeze(-1)).div_(scale.unsqueeze(-2))
    if residual is not None:
        residual = residual.div_(scale.unsqueeze(-2))  # [out, in] / [1, in]
    mean = stats.mean_abs / scale
    return InputStats(
        gram=gram, mean_abs=mean, n_tokens=stats.n_tokens, cross=cross, residual=residual
    )


def check_unchanged(
    where: str, what: str, before: Tensor, after: Tensor, tolerance: float
) -> float:
    """Return ||after - before|| / ||before||; raises NumericsError above the tolerance."""
    before = before.to(after.device, torch.float32)
    change = float((after.float() - before).norm() / before.norm().clamp(min=1e-30))
    if not isfinite(change):
        raise NumericsError(
            f"{where}: expected {what} to be finite, found NaN or infinity; look for huge values "
            "among the weights up to this block, and at rms_norm_eps, rope_theta and rope_scaling "
            "in config.json"
        )
    if change > tolerance:
        raise NumericsError(
            f"{where}: folding the scales changed {what} by {change:.2e} "
            f"(allowed {tolerance:.0e}): a tensor that reads the rescaled input was not "
            "rescaled; the architecture table lacks a reader"
        )
    return change


def make_routing_matrix(index: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return routing weights as [tokens, experts], independent of the order of the top k."""
    return torch.zeros(len(index), count, dtype=weight.dtype, device=weight.device).scatter(
        1, index, weight
    )
