"""Codes for one matrix or a batch of them, stored and read back: the error is of what ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import registry
from quantkit.contracts import Format, InputStats, Method, Quantized, Scheme
from quantkit.decide import Decision
from quantkit.errors import NumericsError
from quantkit.methods import gptq
from quantkit.numerics import affine, codebook
from quantkit.numerics import gram as grams

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
class Solved:
    """One stored linear: tensors by full name, for each format; their weight [out, in] float32, and its figures."""

    tensors: tuple[Mapping[str, Tensor], ...]
    weight: Tensor
    record: ModuleRecord


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """What the manifest and the report say of one quantized linear. Errors compare stored with original weights.

    relative_error: ||W - Q|| / ||W||; output_error: share of the output's energy that is lost on the calibration
    inputs, None without statistics; tokens: calibration tokens behind the gram; fallbacks: names, empty when none.
    """

    module: str
    rule: str
    method: str
    rounding: str
    scheme: Scheme
    relative_error: float
    sqnr_db: float
    output_error: float | None
    tokens: int
    rescaled: bool
    fallbacks: tuple[str, ...]


def one(stats: InputStats | None, e: int) -> InputStats | None:
    """Statistics of matrix `e` of a batch, or the only ones there are when the matrices share their input."""
    if stats is None:
        return None
    e = e if len(stats.gram) > 1 else 0
    cross = None if stats.cross is None else stats.cross[e]
    return InputStats(gram=stats.gram[e], mean_abs=stats.mean_abs[e], n_tokens=stats.n_tokens[e], cross=cross)


def solve(
    decision: Decision,
    outputs: Sequence[Format],
    weight: Tensor,
    stats: InputStats | None,
    *,
    rescaled: bool,
    fallbacks: tuple[str, ...],
) -> Solved:
    """Quantize weight [out, in] float32 as decided, pack it in each format, read it back and measure it.

    Raises NumericsError when two formats would not hold the same weight: their artifacts share one set of figures.
    Without statistics a method that needs them gives way to round-to-nearest; the caller names that fallback.
    """
    scheme = decision.scheme
    assert scheme is not None and decision.method is not None  # only quantize decisions come here
    rounding = "nearest" if stats is None or decision.rounding is None else decision.rounding
    quantized, found = chosen(decision.method, rounding, weight, stats, scheme)
    tensors = [output.pack(quantized, scheme) for output in outputs]
    back, *others = (output.dequantize(packed, scheme) for output, packed in zip(outputs, tensors))  # [out, in]
    if not all(torch.equal(back, other) for other in others):
        raise NumericsError(
            f"{decision.linear.name}: the recipe's formats do not store the same weight; build each on its own"
        )
    sqnr_db = float(grams.sqnr_db(weight, back))
    record = ModuleRecord(
        module=decision.linear.name,
        rule=decision.rule,
        method=decision.method,
        rounding=rounding,
        scheme=scheme,
        relative_error=10 ** (-sqnr_db / 20),
        sqnr_db=sqnr_db,
        output_error=None if stats is None else float(grams.relative_error(weight, back, stats.gram)),
        tokens=0 if stats is None else int(stats.n_tokens),
        rescaled=rescaled,
        fallbacks=fallbacks + found + found_fallbacks(quantized, scheme),
    )
    name = decision.linear.name
    named = tuple({f"{name}.{local}": tensor for local, tensor in packed.items()} for packed in tensors)
    return Solved(tensors=named, weight=back, record=record)


def chosen(
    name: str, rounding: str, weight: Tensor, stats: InputStats | None, scheme: Scheme
) -> tuple[Quantized, tuple[str, ...]]:
    """The codes of a method with a rounding, and the fallbacks it took on the way."""
    if rounding == "gptq":  # whatever the method did to the weight before
        rounded = gptq.round_weight(weight, stats, scheme)
        return rounded.quantized, ("damping-raised",) if rounded.damping_raised else ()
    method: Method = registry.method(name)
    if method.needs_stats and stats is None:
        method = registry.method("rtn")
    return method.solve(weight, stats, scheme), ()


def found_fallbacks(quantized: Quantized, scheme: Scheme) -> tuple[str, ...]:
    """Fallbacks that the rounding itself met in some group."""
    met = codebook.fallbacks(quantized) if scheme.kind == "nf4" else affine.fallbacks(quantized, scheme)
    return tuple(name for name, count in met.items() if int(count.sum()))
