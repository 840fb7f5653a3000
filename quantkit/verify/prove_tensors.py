"""Proofs of stored tensors and linears from the source, without calibration statistics.

A scale that a norm absorbed is a power of two per channel and is visible in the norm: the weight
before quantization is then known to the bit. A scale between two matrices (the rows of one, the
columns of the next) is recorded nowhere: such a linear is compared up to one positive factor per
channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantkit import registry
from quantkit.artifact.read_manifest import get_output_error
from quantkit.artifact.records import KEPT_CODES
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Absorber, Method
from quantkit.numerics import gram
from quantkit.verify.source_pair import SourcePair

ProofKind = Literal[
    "requantized", "reproduced", "scaled", "copied", "equal", "power_of_two", "factor", "unproven"
]

ERROR_TOLERANCE = 1e-6
"""Relative difference of a weight error that another order of summation explains."""
SCALED_ABOVE = 0.02
SCALED_BELOW = 0.15
"""Relative deviation of a weight error if factors of channels are estimated from the codes.

Above: plus the square of the error, because codes lean away from zero by about that. Below: the
best factors remove a part of what clipped ranges lose.
"""
CANCEL_TOLERANCE = 1.5
"""Tolerance of fitted factors, in relative residuals of their channels.

GPTQ's errors correlate with the weights they compensate, by up to 0.9 of the residual in 68,000
channels of real and small models.
"""
ROUNDING_TOLERANCE = 1.5 * 2.0**-8
"""Relative difference by rounding to bfloat16 (half a unit in the last place) and fitted factors.
"""
PIECE_ELEMENTS = 1 << 24
SHARED_SCALE = "weight_global_scale"
"""Local name of NVFP4's scale of a whole matrix."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Result for one linear or tensor.

    fault: a contradiction of the source; reason: why nothing can be proven.
    """

    name: str
    kind: ProofKind
    fault: str | None = None
    reason: str | None = None


# ---------------------------------------------------------------------------------- folded scales


def compute_norm_scale(pair: SourcePair, absorber: Absorber) -> Tensor | None:
    """Return the scale [in] that a norm absorbed, powers of two.

    None for a matrix, or if a weight of 0 hides the scale.
    """
    name = f"{absorber.module}.weight"
    spec = pair.source.specs.get(name)
    if spec is None or len(spec.shape) != 1 or name not in pair.stored.specs:
        return None
    source, stored = (side.read([name])[name].float() for side in (pair.source, pair.stored))
    scale = source / stored
    return scale if are_powers_of_two(scale) else None


def are_powers_of_two(scale: Tensor) -> bool:
    """Return whether every value is a positive power of two."""
    mantissa, _ = torch.frexp(scale)
    return bool(((mantissa == 0.5) & torch.isfinite(scale)).all())


@dataclass(frozen=True, kw_only=True)
class UnquantizedWeight:
    """A source weight [out, in] float32 with the known scales.

    Axes of unknown scales are flagged.
    """

    weight: Tensor
    rows: bool
    columns: bool


def load_unquantized(pair: SourcePair, module: str) -> UnquantizedWeight | str:
    """Return a linear's weight before quantization, or why it cannot be known."""
    name = f"{module}.weight"
    if name not in pair.source.specs:
        return "the source has no such weight"
    weight, columns = pair.source.read([name])[name].float(), False
    linear_input = pair.get_input(module)
    if linear_input is not None and linear_input.rescaled:
        scale = compute_norm_scale(pair, linear_input.absorber) if linear_input.absorber else None
        absorbed = (
            pair.source.specs.get(f"{linear_input.absorber.module}.weight")
            if linear_input.absorber
            else None
        )
        if scale is not None:
            weight *= scale
        elif absorbed is None or len(absorbed.shape) == 1:
            return "its input's scale is no power of two in the norm before it"
        else:
            columns = True
    return UnquantizedWeight(
        weight=weight, rows=any(True for _ in pair.list_absorbed_inputs(module)), columns=columns
    )


# -------------------------------------------------------------------------------- quantized linears


def prove_linear(pair: SourcePair, module: str) -> Proof:
    """Prove a quantized linear."""
    assert pair.format is not None  # set if a module is quantized
    scheme, record, tensors = pair.schemes[module], pair.modules[module], pair.read_tensors(module)
    if record.get("method") == KEPT_CODES:
        return prove_codes(pair, module, tensors)
    source = load_unquantized(pair, module)
    if isinstance(source, str):
        return Proof(name=module, kind="unproven", reason=source)
    dequantized = pair.format.dequantize(tensors, scheme)
    if dequantized.shape != source.weight.shape:
        fault = (
            f"expected the source's shape {list(source.weight.shape)}, found "
            f"{list(dequantized.shape)}"
        )
        return Proof(name=module, kind="unproven", fault=fault)
    if source.rows and source.columns:
        return Proof(
            name=module,
            kind="unproven",
            reason="unrecorded factors of both its rows and its columns",
        )
    if source.rows or source.columns:
        return prove_scaled(pair, module, source, dequantized, record)
    if (method := find_data_free_method(record)) is not None:
        packed = pair.format.pack(method.solve(source.weight, None, scheme), scheme)
        # linears that read one input share a global scale, which this one alone may not give
        if have_equal_shared_scale(packed, tensors):
            return prove_by_requantizing(module, packed, tensors)
    return prove_by_error(module, source.weight, dequantized, record)


def have_equal_shared_scale(packed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether two versions of a linear have the same scale of the whole matrix, or none."""
    first, second = packed.get(SHARED_SCALE), tensors.get(SHARED_SCALE)
    return first is None or second is None or torch.equal(first, second)


def find_data_free_method(record: Any) -> Method | None:
    """Return the method of the codes if it uses the weight only; None for calibrated codes."""
    if record.get("method") not in registry.list_names("methods"):
        return None
    method = registry.get_method(record["method"])
    if (
        get_output_error(record) is None
    ):  # nothing was known of its input: whatever learns gave way to rtn
        return registry.get_method("rtn") if method.needs_stats else method
    return method if not method.needs_stats and record.get("rounding") == "nearest" else None


def prove_by_requantizing(
    module: str, packed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Proof:
    """Compare with the source quantized again: codes, scales and zero points must be the same."""
    for local, tensor in packed.items():
        if not have_same_bytes(tensor, tensors[local]):
            at = int((view_bytes(tensor) != view_bytes(tensors[local])).nonzero()[0])
            fault = (
                f"{local}: expected what quantizing the source gives, found other bits at byte {at}"
            )
            return Proof(name=module, kind="requantized", fault=fault)
    return Proof(name=module, kind="requantized")


def prove_by_error(module: str, weight: Tensor, dequantized: Tensor, record: Any) -> Proof:
    """Check that source and codes give the manifest's weight error."""
    error, recorded = compute_relative_error(weight, dequantized), get_recorded_error(record)
    if abs(error - recorded) <= ERROR_TOLERANCE * max(error, recorded):
        return Proof(name=module, kind="reproduced")
    fault = (
        f"expected the recorded weight error {recorded:.9g}, found {error:.9g} between source and "
        "codes"
    )
    return Proof(name=module, kind="reproduced", fault=fault)


def get_recorded_error(record: Any) -> float:
    """Return the manifest's weight error; NaN, which matches nothing, if it is no number."""
    error = record.get("relative_error")
    return float(error) if isinstance(error, int | float) else torch.nan


def compute_relative_error(weight: Tensor, dequantized: Tensor) -> float:
    """Return ||W - Q|| / ||W||, as in the manifest."""
    return float(10 ** (-float(gram.compute_sqnr_db(weight, dequantized)) / 20))


def prove_scaled(
    pair: SourcePair, module: str, source: UnquantizedWeight, dequantized: Tensor, record: Any
) -> Proof:
    """Check codes of a weight with one unknown factor per channel.

    The error that remains with the best factors must be the recorded one.
    """
    weight, across = source.weight, 1 if source.rows else 0
    factor = fit_factors(weight, dequantized, across)
    scaled = weight * factor.unsqueeze(across)
    error, recorded = compute_relative_error(scaled, dequantized), get_recorded_error(record)
    if (
        not recorded * (1 - SCALED_BELOW) - ERROR_TOLERANCE
        <= error
        <= recorded * (1 + SCALED_ABOVE + recorded * recorded) + ERROR_TOLERANCE
    ):
        fault = (
            f"expected the recorded weight error {recorded:.6g}, found {error:.6g} with the best "
            "factor per channel"
        )
        return Proof(name=module, kind="scaled", fault=fault)
    return Proof(
        name=module,
        kind="scaled",
        fault=find_uncancelled(pair, module, scaled, dequantized, factor)
        if source.columns
        else find_reader_fault(pair, module),
    )


def find_reader_fault(pair: SourcePair, module: str) -> str | None:
    """Return why the linears that read the output of `module` do not cancel its rows' factors."""
    for linear_input in pair.list_absorbed_inputs(module):
        for reader in linear_input.readers:
            unquantized = load_unquantized(pair, reader)
            if (
                isinstance(unquantized, str)
                or not unquantized.columns
                or reader not in pair.schemes
                or pair.format is None
            ):
                continue
            dequantized = pair.format.dequantize(pair.read_tensors(reader), pair.schemes[reader])
            factor = fit_factors(unquantized.weight, dequantized, 0)
            if fault := find_uncancelled(
                pair, reader, unquantized.weight * factor, dequantized, factor
            ):
                return f"{reader}: {fault}"
    return None


def fit_factors(weight: Tensor, dequantized: Tensor, across: int) -> Tensor:
    """Fit the factor per channel that brings a weight closest to its codes: float32.

    across: the dimension that is summed over.
    """
    w, q = weight.double(), dequantized.double()
    factors: Tensor = (w * q).sum(across) / w.square().sum(across).clamp(min=1e-60)
    return factors.float()


def compute_residuals(scaled: Tensor, dequantized: Tensor, across: int) -> Tensor:
    """Return the relative residual of each channel after its fitted factor."""
    residuals: Tensor = (scaled - dequantized).double().norm(dim=across) / scaled.double().norm(
        dim=across
    ).clamp(min=1e-30)
    return residuals


def find_uncancelled(
    pair: SourcePair, module: str, scaled: Tensor, dequantized: Tensor, factor: Tensor
) -> str | None:
    """Return where column factors [in] and the row factors of the producing matrix do not cancel.

    The producer is read from both sides, kept or quantized.
    """
    linear_input = pair.get_input(module)
    assert linear_input is not None and linear_input.absorber is not None  # `unrounded` found one
    producer, rows = linear_input.absorber.module, linear_input.absorber.rows
    maker_factors = fit_row_factors(pair, producer)
    if maker_factors is None:
        return None
    inverse, noise = maker_factors
    index = torch.arange(len(factor)) if rows is None else torch.tensor(rows.index())
    allowed = (
        CANCEL_TOLERANCE * (compute_residuals(scaled, dequantized, 0) + noise[index])
        + ROUNDING_TOLERANCE
    )
    is_known = (factor != 0) & (inverse[index] != 0)  # all-zero codes have no factor
    wrong = (((factor * inverse[index] - 1).abs() > allowed) & is_known).nonzero().flatten()
    if len(wrong) == 0:
        return None
    channel = int(wrong[0])
    product = float(factor[channel] * inverse[index[channel]])
    return (
        f"expected the scale of input channel {channel} to be taken back by row "
        f"{int(index[channel])} of {producer}, found {product:.4f} of the source in all "
        f"({len(wrong)} of {len(factor)} channels)"
    )


def fit_row_factors(pair: SourcePair, module: str) -> tuple[Tensor, Tensor] | None:
    """Return each row's factor of a linear, kept or quantized, and the residual: [out] each."""
    unquantized, name = load_unquantized(pair, module), f"{module}.weight"
    if isinstance(unquantized, str) or unquantized.columns:
        return None
    if module in pair.schemes and pair.format is not None:
        stored = pair.format.dequantize(pair.read_tensors(module), pair.schemes[module])
    else:
        stored = pair.stored.read([name])[name].float()
    factor = fit_factors(unquantized.weight, stored, 1)
    return factor, compute_residuals(unquantized.weight * factor[:, None], stored, 1)


# ------------------------------------------------------------------------------------- kept tensors


def prove_codes(pair: SourcePair, module: str, tensors: Mapping[str, Tensor]) -> Proof:
    """Prove a linear that keeps the source's codes: every stored tensor has the source's bits."""
    name = f"{module}.weight"
    if name not in pair.source.logical.encoded:
        return Proof(name=module, kind="copied", fault="codes of a weight that the source lacks")
    source = pair.source.read_parts(name)
    stored = {f"{module}.{local}": tensor for local, tensor in tensors.items()}
    is_equal = set(source) == set(stored) and all(
        have_same_bytes(source[part], tensor) for part, tensor in stored.items()
    )
    fault = None if is_equal else "expected the source's codes and scales, found others"
    return Proof(name=module, kind="copied", fault=fault)


def prove_kept(pair: SourcePair, name: str) -> Proof:
    """Prove a tensor that is not quantized."""
    spec, source = pair.stored.specs[name], pair.source.specs.get(name)
    if source is None:  # reported for all names at once
        return Proof(name=name, kind="unproven", reason="the source has no such tensor")
    if source.shape != spec.shape:
        fault = f"expected the source's shape {list(source.shape)}, found {list(spec.shape)}"
        return Proof(name=name, kind="unproven", fault=fault)
    module, _, local = name.rpartition(".")
    if spec.dtype == FP8:
        return prove_fp8_blocks(pair, name)
    if name in pair.copied_tensors:
        return prove_rows(pair, name, None, False)
    absorbs = any(True for _ in pair.list_absorbed_inputs(module))
    if len(spec.shape) == 1 and absorbs:
        return prove_bias(pair, name) if module in pair.block_of else prove_norm(pair, name)
    linear_input = pair.get_input(module) if local == "weight" else None
    scale = None
    if linear_input is not None and linear_input.rescaled:
        scale = compute_norm_scale(pair, linear_input.absorber) if linear_input.absorber else None
        if scale is None:
            return Proof(name=name, kind="unproven", reason="an unrecorded factor of its columns")
    return prove_rows(pair, name, scale, absorbs)


def prove_bias(pair: SourcePair, name: str) -> Proof:
    """Prove the bias of a matrix that absorbed a scale: it has the factors of the matrix's rows."""
    row_factors = fit_row_factors(pair, name.rpartition(".")[0])
    if row_factors is None:
        return Proof(
            name=name,
            kind="unproven",
            reason="unrecorded factors of both rows and columns of its matrix",
        )
    factor, noise = row_factors
    source, stored = (side.read([name])[name].float() for side in (pair.source, pair.stored))
    scaled = source * factor
    if bool(
        (
            (scaled - stored).abs()
            <= (CANCEL_TOLERANCE * noise + ROUNDING_TOLERANCE) * scaled.abs() + 1e-30
        ).all()
    ):
        return Proof(name=name, kind="factor")
    return Proof(
        name=name,
        kind="factor",
        fault="expected the source's values by its matrix's factors, found others",
    )


def prove_fp8_blocks(pair: SourcePair, name: str) -> Proof:
    """Prove FP8 blocks: codes and scales must have the source's bits."""
    if pair.source.specs[name].dtype != FP8:
        return Proof(
            name=name,
            kind="equal",
            fault="FP8 blocks of a weight that the source does not hold in FP8",
        )
    source, stored = pair.source.read_fp8_blocks(name), pair.stored.read_fp8_blocks(name)
    if have_same_bytes(source.codes, stored.codes) and torch.equal(
        source.scale.float(), stored.scale.float()
    ):
        return Proof(name=name, kind="equal")
    return Proof(name=name, kind="equal", fault="expected the source's FP8 bits, found others")


def prove_norm(pair: SourcePair, name: str) -> Proof:
    """Prove a norm that absorbed a scale: a power of two per channel."""
    source, stored = (side.read([name])[name].float() for side in (pair.source, pair.stored))
    both_zero = (source == 0) & (stored == 0)
    if are_powers_of_two(torch.where(both_zero, 1.0, source / stored)):
        return Proof(name=name, kind="power_of_two")
    return Proof(
        name=name,
        kind="power_of_two",
        fault="expected the source's values by powers of two, found others",
    )


def prove_rows(pair: SourcePair, name: str, scale: Tensor | None, factors: bool) -> Proof:
    """Compare piece by piece with the source, times a known scale [in] per column.

    factors: allow one factor per row.
    """
    kind: ProofKind = "factor" if factors else "equal" if scale is None else "power_of_two"
    spec, finite = pair.stored.specs[name], name not in pair.copied_tensors
    rows = spec.shape[0] if spec.shape else 1
    step = max(1, PIECE_ELEMENTS // max(1, spec.n_elements // max(rows, 1)))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        source, stored = (
            side.read_rows(name, first, last, finite)
            if spec.shape
            else side.read([name], finite)[name]
            for side in (pair.source, pair.stored)
        )
        expected = source if scale is None else source.float() * scale
        is_equal = (
            are_rows_close(expected, stored)
            if factors
            else have_same_bytes(expected.to(TORCH_DTYPES.get(spec.dtype, expected.dtype)), stored)
        )
        if not is_equal:
            location = f" in rows {first} to {last - 1}" if rows > step else ""
            return Proof(
                name=name,
                kind=kind,
                fault=f"expected {KEPT_MEANINGS[kind]}, found others{location}",
            )
    return Proof(name=name, kind=kind)


KEPT_MEANINGS = {
    "equal": "the source's values, bit for bit",
    "power_of_two": "the source's values by a power of two per column, bit for bit",
    "factor": "the source's values by one factor per row",
}


def are_rows_close(source: Tensor, stored: Tensor) -> bool:
    """Return whether rows differ only by one factor each and by rounding."""
    scaled = source.float() * fit_factors(source.float(), stored.float(), 1)[:, None]
    return bool(
        ((scaled - stored.float()).abs() <= ROUNDING_TOLERANCE * scaled.abs() + 1e-30).all()
    )


def view_bytes(tensor: Tensor) -> Tensor:
    """View a tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def have_same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(view_bytes(one), view_bytes(other))
    )
