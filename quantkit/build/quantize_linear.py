"""Codes for one matrix or a batch of them, stored and read back: the error is of what ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from quantkit.numerics import affine, nf4
from quantkit.numerics import gram as grams
from quantkit.plan.decisions import Decision

FALLBACKS: Mapping[str, str] = {
    "zero-group": "a group whose weights all round to zero is stored as zeros",
    "scale-clamped": "a group whose scale leaves the scale dtype's normal range takes the nearest scale inside it",
    "shared-gram": "an expert with too few calibration tokens learns from all tokens of its layer",
    "rtn-too-few-tokens": "an expert with too few calibration tokens is rounded to nearest",
    "damping-raised": "a Gram matrix had no Cholesky factor with 1 % of its mean diagonal added: ten times as much was "
    "added until it had one",
    "fp8-unscaled": "an input that a linear reads or makes whose FP8 bits are kept is not rescaled",
    "mtp-rtn": "no forward pass reaches an MTP block: its linears are rounded to nearest",
}
"""Every fallback there is, and what it means: the manifest names them per module, the report counts them."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """One stored linear: tensors by full name, for each format; their weight [out, in] float32, and its figures."""

    tensors: tuple[Mapping[str, Tensor], ...]
    weight: Tensor
    record: ModuleRecord


def select_expert_stats(stats: InputStats | None, e: int) -> InputStats | None:
    """Statistics of matrix `e` of a batch, or the only ones there are when the matrices share their input."""
    if stats is None:
        return None
    e = e if len(stats.gram) > 1 else 0
    cross = None if stats.cross is None else stats.cross[e]
    return InputStats(
        gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e], cross=cross
    )


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """A linear to be quantized: weight [out, in] float32, statistics of its input or None, and what is known of it."""

    decision: Decision
    weight: Tensor
    stats: InputStats | None
    tokens: int  # that reached the input, learned from or not
    rescaled: bool
    fallbacks: tuple[str, ...]

    @property
    def scheme(self) -> Scheme:
        """How it is stored: only quantize decisions are asked for."""
        assert self.decision.scheme is not None
        return self.decision.scheme

    @property
    def method(self) -> str:
        """Who chooses its codes: what learns gives way to rtn where nothing is known of its input."""
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
    asked: Sequence[QuantizeRequest], outputs: Sequence[Format]
) -> list[QuantizedLinear]:
    """Quantize linears that read the same input, pack them in each format, read them back and measure them.

    What depends on their input alone, the factor of its gram first of all, is computed once: rows of a weight are
    quantized independently of each other, so linears of one scheme, method and statistics are solved as one matrix.
    Raises NumericsError when two formats would not hold the same weight: their artifacts share one set of figures.
    Where a method that learns gives way to rtn, the caller names that fallback.
    """
    alike: dict[tuple[Scheme, str, str, int], list[int]] = {}
    for index, each in enumerate(asked):
        alike.setdefault((each.scheme, each.method, each.rounding, id(each.stats)), []).append(
            index
        )
    found: dict[int, QuantizedLinear] = {}
    for indices in alike.values():
        first, rows = asked[indices[0]], [len(asked[index].weight) for index in indices]
        together = (
            first.weight if len(rows) == 1 else torch.cat([asked[i].weight for i in indices])
        )  # [sum of out, in]
        try:
            rounded = compute_codes(
                first.method, first.rounding, together, first.stats, first.scheme
            )
        except NumericsError as fault:
            raise NumericsError(f"{first.decision.linear.name}: {fault}") from fault
        for index, part in zip(indices, split_quantized(quantized, rows), strict=True):
            found[index] = pack_and_measure(asked[index], part, met, outputs)
    return [found[index] for index in range(len(asked))]


def split_quantized(quantized: Quantized, rows: Sequence[int]) -> list[Quantized]:
    """Codes of matrices that lie one under the other, matrix by matrix."""
    codes, scales = quantized.codes.split(list(rows)), quantized.scale.split(list(rows))
    zeros = [None] * len(rows) if quantized.zero is None else quantized.zero.split(list(rows))
    return [
        Quantized(codes=c, scale=s, zero=z) for c, s, z in zip(codes, scales, zeros, strict=True)
    ]


def pack_and_measure(
    asked: QuantizeRequest, quantized: Quantized, found: tuple[str, ...], outputs: Sequence[Format]
) -> QuantizedLinear:
    """One linear with its codes, packed, read back and measured; `found` are the fallbacks its method took."""
    decision, weight, stats, scheme = asked.decision, asked.weight, asked.stats, asked.scheme
    tensors = [output.pack(quantized, scheme) for output in outputs]
    back, *others = (
        output.dequantize(packed, scheme) for output, packed in zip(outputs, tensors)
    )  # [out, in]
    if not all(torch.equal(back, other) for other in others):
        raise NumericsError(
            f"{decision.linear.name}: the recipe's formats do not store the same weight; build each on its own"
        )
    sqnr_db = float(grams.compute_sqnr_db(weight, back))
    output_error = (
        None if stats is None else float(grams.compute_relative_error(weight, back, stats.gram))
    )
    if isnan(sqnr_db) or not isfinite(output_error or 0.0):
        raise NumericsError(
            f"{decision.linear.name}: expected a finite error, found NaN or infinity; look for huge values among its "
            "weights and in what it reads"
        )
    record = ModuleRecord(
        module=decision.linear.name,
        rule=decision.rule,
        method=asked.method,
        rounding=asked.rounding,
        scheme=scheme,
        relative_error=10 ** (-sqnr_db / 20),
        sqnr_db=sqnr_db if isfinite(sqnr_db) else None,  # nothing is lost of a matrix of zeros
        output_error=output_error,
        tokens=asked.tokens,
        rescaled=asked.rescaled,
        fallbacks=asked.fallbacks + found + find_fallbacks(quantized, scheme),
    )
    name = decision.linear.name
    named = tuple(
        {f"{name}.{local}": tensor for local, tensor in packed.items()} for packed in tensors
    )
    return QuantizedLinear(tensors=named, weight=back, record=record)


def compute_codes(
    name: str, rounding: str, weight: Tensor, stats: InputStats | None, scheme: Scheme
) -> RoundedWeight:
    """Return the codes of a method with a rounding, and the fallbacks that the rounding took."""
    solve = registry.get_method(name).solve
    return registry.get_rounding(rounding).round_weight(weight, stats, scheme, solve)


def find_fallbacks(quantized: Quantized, scheme: Scheme) -> tuple[str, ...]:
    """Fallbacks that the rounding itself met in some group."""
    met = (
        nf4.count_fallbacks(quantized)
        if scheme.kind == "nf4"
        else affine.count_fallbacks(quantized, scheme)
    )
    return tuple(name for name, count in met.items() if int(count.sum()))
