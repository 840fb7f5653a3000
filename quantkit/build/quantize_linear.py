"""Quantization of linears that read one input: codes, packed, read back and measured as stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan

import torch
from torch import Tensor

from quantkit import registry
from quantkit.artifact.records import ModuleRecord
from quantkit.contracts import (
    FALLBACK_ROUNDING,
    Format,
    InputStats,
    Quantized,
    RoundedWeight,
    Scheme,
)
from quantkit.errors import NumericsError
from quantkit.numerics import gram as grams
from quantkit.numerics import grids, nf4
from quantkit.plan.decisions import Decision

FALLBACKS: Mapping[str, str] = {
    "zero-group": "a group whose weights all round to zero is stored as zeros",
    "scale-clamped": (
        "a group whose scale leaves the scale dtype's normal range takes the nearest "
        "scale inside it"
    ),
    "shared-gram": (
        "an expert with too few calibration tokens is calibrated on all tokens of its layer"
    ),
    "rtn-too-few-tokens": "an expert with too few calibration tokens is rounded to nearest",
    "damping-raised": "a Gram matrix had no Cholesky factor with 1 % of its mean diagonal added: "
    "ten times as much was "
    "added until it had one",
    "fp8-unscaled": (
        "an input is not rescaled, because a linear that reads or produces it keeps its stored bits"
    ),
    "mtp-rtn": "no forward pass reaches an MTP block: its linears are rounded to nearest",
}
"""Every fallback and its meaning: the manifest names them per module, the report counts them."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """A quantized linear: tensors by full name for each format, the weight as stored [out, in]
    float32, and its figures.
    """

    tensors: tuple[Mapping[str, Tensor], ...]
    weight: Tensor
    record: ModuleRecord


def select_expert_stats(stats: InputStats | None, e: int) -> InputStats | None:
    """Return the statistics of matrix `e` of a batch; the only ones if the matrices share their
    input.
    """
    if stats is None:
        return None
    e = e if len(stats.gram) > 1 else 0
    cross = None if stats.cross is None else stats.cross[e]
    return InputStats(
        gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e], cross=cross
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """A linear to quantize: its weight [out, in] float32 and the statistics of its input, None
    without any.
    """

    decision: Decision
    weight: Tensor
    stats: InputStats | None
    tokens: int  # that reached the input, whether statistics are used or not
    rescaled: bool
    fallbacks: tuple[str, ...]

    @property
    def scheme(self) -> Scheme:
        """The scheme; a request is only made for a quantize decision."""
        assert self.decision.scheme is not None
        return self.decision.scheme

    @property
    def method(self) -> str:
        """Effective method: RTN if a method that needs statistics has none."""
        name = self.decision.method
        assert name is not None
        return "rtn" if self.stats is None and registry.get_method(name).needs_stats else name

    @property
    def rounding(self) -> str:
        """Effective rounding: FALLBACK_ROUNDING if a rounding that needs statistics has none."""
        name = self.decision.rounding or FALLBACK_ROUNDING
        is_blind = self.stats is None and registry.get_rounding(name).needs_stats
        return FALLBACK_ROUNDING if is_blind else name


def quantize_group(
    requests: Sequence[QuantizeRequest], formats: Sequence[Format]
) -> list[QuantizedLinear]:
    """Quantize linears that read one input, pack them in each format, read them back and measure
    them.

    Linears of one scheme, method, rounding and statistics are solved as one matrix, because rows
    are quantized independently of each other: what depends on the input alone, such as the factor
    of its gram, is computed once. Raises NumericsError if two formats would not store the same
    weight, because their artifacts share one set of figures. The caller names the fallback of a
    method without statistics.
    """
    groups: dict[tuple[Scheme, str, str, int], list[int]] = {}
    for index, request in enumerate(requests):
        key = (request.scheme, request.method, request.rounding, id(request.stats))
        groups.setdefault(key, []).append(index)
    results: dict[int, QuantizedLinear] = {}
    for indices in groups.values():
        first, weights = requests[indices[0]], [requests[index].weight for index in indices]
        stacked = weights[0] if len(weights) == 1 else torch.cat(weights)  # [sum of out, in]
        try:
            stats = shrink_stats(first.stats, first.decision.shrinkage)
            rounded = compute_codes(first.method, first.rounding, stacked, stats, first.scheme)
        except NumericsError as fault:
            raise NumericsError(f"{first.decision.linear.name}: {fault}") from fault
        parts = split_quantized(rounded.quantized, [len(weight) for weight in weights])
        for index, part in zip(indices, parts, strict=True):
            results[index] = pack_and_measure(requests[index], part, rounded.fallbacks, formats)
    return [results[index] for index in range(len(requests))]


def shrink_stats(stats: InputStats | None, shrinkage: float) -> InputStats | None:
    """Return the statistics with a shrunk gram; errors are measured with the gram as it is."""
    if stats is None or not shrinkage:
        return stats
    return replace(stats, gram=grams.shrink_gram(stats.gram, shrinkage))


def split_quantized(quantized: Quantized, rows: Sequence[int]) -> list[Quantized]:
    """Split the codes of matrices that were stacked along their rows.

    A global scale is that of all parts: engines need one for linears that they merge at load.
    """
    codes, scales = quantized.codes.split(list(rows)), quantized.scale.split(list(rows))
    zeros = [None] * len(rows) if quantized.zero is None else quantized.zero.split(list(rows))
    return [
        replace(quantized, codes=c, scale=s, zero=z)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]


def pack_and_measure(
    request: QuantizeRequest,
    quantized: Quantized,
    fallbacks: tuple[str, ...],
    formats: Sequence[Format],
) -> QuantizedLinear:
    """Pack the codes of a linear in each format, read them back and measure them; `fallbacks` are
    those of its rounding.
    """
    decision, weight, stats = request.decision, request.weight, request.stats
    scheme = request.scheme
    tensors = [output.pack(quantized, scheme) for output in formats]
    stored, *others = (
        output.dequantize(packed, scheme) for output, packed in zip(formats, tensors, strict=True)
    )  # [out, in]
    if not all(torch.equal(stored, other) for other in others):
        raise NumericsError(
            f"{decision.linear.name}: the recipe's formats do not store the same weight; build "
            f"each on its own"
        )
    sqnr_db = float(grams.compute_sqnr_db(weight, stored))
    output_relative_error = (
        None if stats is None else float(grams.compute_relative_error(weight, stored, stats.gram))
    )
    if isnan(sqnr_db) or not isfinite(output_relative_error or 0.0):
        raise NumericsError(
            f"{decision.linear.name}: expected a finite error, found NaN or infinity; look for "
            "huge values among its weights and inputs"
        )
    record = ModuleRecord(
        module=decision.linear.name,
        rule=decision.rule,
        method=request.method,
        rounding=request.rounding,
        scheme=scheme,
        relative_error=10 ** (-sqnr_db / 20),
        sqnr_db=sqnr_db if isfinite(sqnr_db) else None,  # a matrix of zeros has no error
        output_relative_error=output_relative_error,
        tokens=request.tokens,
        rescaled=request.rescaled,
        fallbacks=request.fallbacks + fallbacks + find_fallbacks(quantized, scheme),
    )
    name = decision.linear.name
    named = tuple(
        {f"{name}.{local}": tensor for local, tensor in packed.items()} for packed in tensors
    )
    return QuantizedLinear(tensors=named, weight=stored, record=record)


def compute_codes(
    name: str, rounding: str, weight: Tensor, stats: InputStats | None, scheme: Scheme
) -> RoundedWeight:
    """Return the codes of a method with a rounding, and the fallbacks that the rounding took."""
    solve = registry.get_method(name).solve
    return registry.get_rounding(rounding).round_weight(weight, stats, scheme, solve)


def find_fallbacks(quantized: Quantized, scheme: Scheme) -> tuple[str, ...]:
    """Return the fallbacks that some group of the codes took."""
    counts = (
        nf4.count_fallbacks(quantized)
        if scheme.kind == "nf4"
        else grids.count_fallbacks(quantized, scheme)
    )
    return tuple(name for name, count in counts.items() if int(count.sum()))
