"""What can be proven of one stored tensor or linear from the source, without the statistics that calibration had.

A scale that a norm absorbed is a power of two per channel and stands in the norm: the quantized weight before rounding
is then known to the bit. A scale between two matrices (the rows of one, the columns of the next) is nowhere recorded:
such a linear is compared up to one positive factor per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit import registry
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Absorber, Method, Scheme
from quantkit.numerics import gram
from quantkit.verify.source_pair import Sides

Kind = Literal["requantized", "reproduced", "scaled", "equal", "power_of_two", "factor", "unproven"]

REPRODUCED = 1e-6
"""Relative difference of a weight error that another order of summation explains."""
SCALED = 0.02
LESS = 0.15
"""By how much more and less the same may be where the factors of channels were estimated from the codes. More, and by
the square of the error in addition: codes lean away from zero by about that. Less: the best factors take away what
clipped ranges lose.
"""
CANCEL = 1.5
"""How far fitted factors may be off, in relative residuals of their channels: GPTQ's errors lean on the weights they
make up for, by up to 0.9 of the residual in 68,000 channels of real and small models.
"""
ROUNDED = 1.5 * 2.0**-8
"""Relative difference that rounding to bfloat16, half a unit in its last place, and an estimated factor explain."""
PIECE_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found about one linear or tensor. fault: what contradicts the source; reason: why nothing is proven."""

    name: str
    kind: Kind
    fault: str | None = None
    reason: str | None = None


# ---------------------------------------------------------------------------------------------------- what was folded


def norm_scale(sides: Sides, absorber: Absorber) -> Tensor | None:
    """The scale [in] that a norm absorbed, powers of two; None for a matrix, or where a weight of 0 hides it."""
    name = f"{absorber.module}.weight"
    spec = sides.source.specs.get(name)
    if spec is None or len(spec.shape) != 1 or name not in sides.stored.specs:
        return None
    before, after = (side.read([name])[name].float() for side in (sides.source, sides.stored))
    scale = before / after
    return scale if powers_of_two(scale) else None


def powers_of_two(scale: Tensor) -> bool:
    """Whether every value is a positive power of two."""
    mantissa, _ = torch.frexp(scale)
    return bool(((mantissa == 0.5) & torch.isfinite(scale)).all())


@dataclass(frozen=True, kw_only=True)
class UnquantizedWeight:
    """A source weight [out, in] float32 with the scales that are known; axes along which others were folded in."""

    weight: Tensor
    rows: bool
    columns: bool


def unrounded(sides: Sides, module: str) -> UnquantizedWeight | str:
    """A linear's weight before it was rounded; or why it cannot be known."""
    name = f"{module}.weight"
    if name not in sides.source.specs:
        return "the source has no such weight"
    weight, columns = sides.source.read([name])[name].float(), False
    fed = sides.input_of(module)
    if fed is not None and fed.rescaled:
        scale = norm_scale(sides, fed.absorber) if fed.absorber else None
        absorbed = sides.source.specs.get(f"{fed.absorber.module}.weight") if fed.absorber else None
        if scale is not None:
            weight *= scale
        elif absorbed is None or len(absorbed.shape) == 1:
            return "its input's scale is no power of two in the norm before it"
        else:
            columns = True
    return UnquantizedWeight(
        weight=weight, rows=any(True for _ in sides.readers_of(module)), columns=columns
    )


# ------------------------------------------------------------------------------------------------- quantized linears


def prove_linear(sides: Sides, module: str) -> Proof:
    """A quantized linear against its source."""
    assert sides.format is not None  # there is one where something is quantized
    scheme, record, tensors = sides.schemes[module], sides.modules[module], sides.tensors(module)
    source = unrounded(sides, module)
    if isinstance(source, str):
        return Proof(name=module, kind="unproven", reason=source)
    back = sides.format.dequantize(tensors, scheme)
    if back.shape != source.weight.shape:
        found = f"expected the source's shape {list(source.weight.shape)}, found {list(back.shape)}"
        return Proof(name=module, kind="unproven", fault=found)
    if source.rows and source.columns:
        return Proof(
            name=module,
            kind="unproven",
            reason="unrecorded factors of both its rows and its columns",
        )
    if source.rows or source.columns:
        return prove_scaled(sides, module, source, back, record)
    if (method := data_free(record)) is not None:
        return prove_again(sides, module, source.weight, tensors, scheme, method)
    return prove_error(module, source.weight, back, record)


def data_free(record: Any) -> Method | None:
    """The method that chose the codes if it looked at nothing but the weight; None for one that learned."""
    if record.get("method") not in registry.list_names("methods"):
        return None
    method = registry.get_method(record["method"])
    if (
        record.get("output_error") is None
    ):  # nothing was known of its input: whatever learns gave way to rtn
        return registry.get_method("rtn") if method.needs_stats else method
    return method if not method.needs_stats and record.get("rounding") == "nearest" else None


def prove_again(
    sides: Sides,
    module: str,
    weight: Tensor,
    tensors: dict[str, Tensor],
    scheme: Scheme,
    method: Method,
) -> Proof:
    """Quantize once more: every code, scale and zero point must come out the same."""
    assert sides.format is not None
    made = sides.format.pack(method.solve(weight, None, scheme), scheme)
    for local, tensor in made.items():
        if not same_bits(tensor, tensors[local]):
            at = int((bits(tensor) != bits(tensors[local])).nonzero()[0])
            found = (
                f"{local}: expected what quantizing the source gives, found other bits at byte {at}"
            )
            return Proof(name=module, kind="requantized", fault=found)
    return Proof(name=module, kind="requantized")


def prove_error(module: str, weight: Tensor, back: Tensor, record: Any) -> Proof:
    """The weight error of the manifest must come out of source and codes."""
    found, told = relative_error(weight, back), recorded(record)
    if abs(found - told) <= REPRODUCED * max(found, told):
        return Proof(name=module, kind="reproduced")
    fault = (
        f"expected the recorded weight error {told:.9g}, found {found:.9g} between source and codes"
    )
    return Proof(name=module, kind="reproduced", fault=fault)


def recorded(record: Any) -> float:
    """The weight error of the manifest; NaN, which nothing meets, where it is no number."""
    told = record.get("relative_error")
    return float(told) if isinstance(told, int | float) else torch.nan


def relative_error(weight: Tensor, back: Tensor) -> float:
    """||W - Q|| / ||W||, as the manifest has it."""
    return float(10 ** (-float(gram.compute_sqnr_db(weight, back)) / 20))


def prove_scaled(
    sides: Sides, module: str, source: UnquantizedWeight, back: Tensor, record: Any
) -> Proof:
    """Codes of a weight times one unrecorded factor per channel: the error left by the best factors must be told."""
    weight, across = source.weight, 1 if source.rows else 0
    factor = fitted(weight, back, across)
    wide = weight * factor.unsqueeze(across)
    found, told = relative_error(wide, back), recorded(record)
    if (
        not told * (1 - LESS) - REPRODUCED
        <= found
        <= told * (1 + SCALED + told * told) + REPRODUCED
    ):
        fault = f"expected the recorded weight error {told:.6g}, found {found:.6g} with the best factor per channel"
        return Proof(name=module, kind="scaled", fault=fault)
    return Proof(
        name=module,
        kind="scaled",
        fault=uncancelled(sides, module, wide, back, factor)
        if source.columns
        else kept_by(sides, module),
    )


def kept_by(sides: Sides, module: str) -> str | None:
    """Why the linears that read what this one makes do not take back the factors of its rows; or None."""
    for fed in sides.readers_of(module):
        for reader in fed.readers:
            after = unrounded(sides, reader)
            if (
                isinstance(after, str)
                or not after.columns
                or reader not in sides.schemes
                or sides.format is None
            ):
                continue
            back = sides.format.dequantize(sides.tensors(reader), sides.schemes[reader])
            factor = fitted(after.weight, back, 0)
            if fault := uncancelled(sides, reader, after.weight * factor, back, factor):
                return f"{reader}: {fault}"
    return None


def fitted(weight: Tensor, back: Tensor, across: int) -> Tensor:
    """The factor per channel that brings a weight nearest to its codes, summed over dimension `across`; float32."""
    wide, other = weight.double(), back.double()
    found: Tensor = (wide * other).sum(across) / wide.square().sum(across).clamp(min=1e-60)
    return found.float()


def residual(wide: Tensor, back: Tensor, across: int) -> Tensor:
    """What the fitted factor of each channel leaves, relative to the channel."""
    found: Tensor = (wide - back).double().norm(dim=across) / wide.double().norm(dim=across).clamp(
        min=1e-30
    )
    return found


def uncancelled(
    sides: Sides, module: str, wide: Tensor, back: Tensor, factor: Tensor
) -> str | None:
    """Where the factors of this linear's columns and those of the rows that make its input do not cancel; or None.

    factor [in] of the columns. The rows' matrix is read from both sides; kept or quantized makes no difference.
    """
    fed = sides.input_of(module)
    assert fed is not None and fed.absorber is not None  # `unrounded` found one
    maker, rows = fed.absorber.module, fed.absorber.rows
    known = row_factors(sides, maker)
    if known is None:
        return None
    inverse, noise = known
    index = torch.arange(len(factor)) if rows is None else torch.tensor(rows.index())
    allowed = CANCEL * (residual(wide, back, 0) + noise[index]) + ROUNDED
    seen = (factor != 0) & (
        inverse[index] != 0
    )  # codes that are all zero tell nothing of their factor
    off = (((factor * inverse[index] - 1).abs() > allowed) & seen).nonzero().flatten()
    if len(off) == 0:
        return None
    channel = int(off[0])
    product = float(factor[channel] * inverse[index[channel]])
    return (
        f"expected the scale of input channel {channel} to be taken back by row {int(index[channel])} of {maker}, "
        f"found {product:.4f} of the source in all ({len(off)} of {len(factor)} channels)"
    )


def row_factors(sides: Sides, module: str) -> tuple[Tensor, Tensor] | None:
    """The factor of each row of a linear, kept or quantized, and the residual it leaves: [out] each."""
    before, name = unrounded(sides, module), f"{module}.weight"
    if isinstance(before, str) or before.columns:
        return None
    if module in sides.schemes and sides.format is not None:
        after = sides.format.dequantize(sides.tensors(module), sides.schemes[module])
    else:
        after = sides.stored.read([name])[name].float()
    factor = fitted(before.weight, after, 1)
    return factor, residual(before.weight * factor[:, None], after, 1)


# --------------------------------------------------------------------------------------------------- kept tensors


def prove_kept(sides: Sides, name: str) -> Proof:
    """A tensor that is not quantized against the source's."""
    spec, source = sides.stored.specs[name], sides.source.specs.get(name)
    if source is None:  # told for all names at once
        return Proof(name=name, kind="unproven", reason="the source has no such tensor")
    if source.shape != spec.shape:
        found = f"expected the source's shape {list(source.shape)}, found {list(spec.shape)}"
        return Proof(name=name, kind="unproven", fault=found)
    module, _, local = name.rpartition(".")
    if spec.dtype == FP8:
        return prove_blocks(sides, name)
    absorbs = any(True for _ in sides.readers_of(module))
    if len(spec.shape) == 1 and absorbs:
        return prove_bias(sides, name) if module in sides.block_of else prove_norm(sides, name)
    fed = sides.input_of(module) if local == "weight" else None
    scale = None
    if fed is not None and fed.rescaled:
        scale = norm_scale(sides, fed.absorber) if fed.absorber else None
        if scale is None:
            return Proof(name=name, kind="unproven", reason="an unrecorded factor of its columns")
    return prove_rows(sides, name, scale, absorbs)


def prove_bias(sides: Sides, name: str) -> Proof:
    """The bias of a matrix that absorbed a scale: it has the factors of the matrix's rows."""
    known = row_factors(sides, name.rpartition(".")[0])
    if known is None:
        return Proof(
            name=name,
            kind="unproven",
            reason="unrecorded factors of both rows and columns of its matrix",
        )
    factor, noise = known
    before, after = (side.read([name])[name].float() for side in (sides.source, sides.stored))
    wide = before * factor
    if bool(((wide - after).abs() <= (CANCEL * noise + ROUNDED) * wide.abs() + 1e-30).all()):
        return Proof(name=name, kind="factor")
    return Proof(
        name=name,
        kind="factor",
        fault="expected the source's values by its matrix's factors, found others",
    )


def prove_blocks(sides: Sides, name: str) -> Proof:
    """FP8 blocks: codes and scales must be the source's bits."""
    if sides.source.specs[name].dtype != FP8:
        return Proof(
            name=name,
            kind="equal",
            fault="FP8 blocks of a weight that the source does not hold in FP8",
        )
    before, after = sides.source.blocks(name), sides.stored.blocks(name)
    if same_bits(before.codes, after.codes) and torch.equal(
        before.scale.float(), after.scale.float()
    ):
        return Proof(name=name, kind="equal")
    return Proof(name=name, kind="equal", fault="expected the source's FP8 bits, found others")


def prove_norm(sides: Sides, name: str) -> Proof:
    """A norm that absorbed a scale: a power of two per channel, the same for weight and bias."""
    before, after = (side.read([name])[name].float() for side in (sides.source, sides.stored))
    both_zero = (before == 0) & (after == 0)
    if powers_of_two(torch.where(both_zero, 1.0, before / after)):
        return Proof(name=name, kind="power_of_two")
    return Proof(
        name=name,
        kind="power_of_two",
        fault="expected the source's values by powers of two, found others",
    )


def prove_rows(sides: Sides, name: str, scale: Tensor | None, factors: bool) -> Proof:
    """Piece by piece: the source's bits, times a known scale [in] per column; with `factors` up to one per row."""
    kind: Kind = "factor" if factors else "equal" if scale is None else "power_of_two"
    spec = sides.stored.specs[name]
    rows = spec.shape[0] if spec.shape else 1
    step = max(1, PIECE_ELEMENTS // max(1, spec.n_elements // max(rows, 1)))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        before, after = (
            side.read_rows(name, first, last) if spec.shape else side.read([name])[name]
            for side in (sides.source, sides.stored)
        )
        wanted = before if scale is None else before.float() * scale
        same = (
            near_rows(wanted, after)
            if factors
            else same_bits(wanted.to(TORCH_DTYPES[spec.dtype]), after)
        )
        if not same:
            place = f" in rows {first} to {last - 1}" if rows > step else ""
            return Proof(
                name=name, kind=kind, fault=f"expected {MEANING[kind]}, found others{place}"
            )
    return Proof(name=name, kind=kind)


MEANING = {
    "equal": "the source's values, bit for bit",
    "power_of_two": "the source's values by a power of two per column, bit for bit",
    "factor": "the source's values by one factor per row",
}


def near_rows(before: Tensor, after: Tensor) -> bool:
    """Whether rows differ by one factor each and by rounding."""
    wide = before.float() * fitted(before.float(), after.float(), 1)[:, None]
    return bool(((wide - after.float()).abs() <= ROUNDED * wide.abs() + 1e-30).all())


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a dtype and shape have the same bytes."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bits(one), bits(other))
    )
