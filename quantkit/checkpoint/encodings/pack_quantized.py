"""compressed-tensors "pack-quantized": integers of 1 to 8 bits in 32-bit words (formats/README.md).

    X.weight_packed      [out, ceil(in * bits / 32)] int32    sequential codes, lowest first
    X.weight_scale       [out, n_groups]
    X.weight_zero_point  [ceil(out * bits / 32), n_groups] int32    asymmetric, packed along out
    X.weight_g_idx       [in] int32    the group of each column; old versions, actorder "group"
    X.weight_shape       [2] int64    out, in

    weight = (code - zero) * scale, rounded once; without zero points, zero is the middle code

Shapes decide between the groups of config.json that may apply: only one fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    SCALE_DTYPES,
    EncodedWeight,
    Encoding,
    EncodingFault,
    PartReader,
    StoredCodes,
    check_values,
    read_group_index,
    require_matrix,
    require_shape,
)
from quantkit.contracts import Scheme, TensorSpec
from quantkit.io.files import shorten_repr

if TYPE_CHECKING:
    from torch import Tensor

ENDING = "_packed"
MAX_BITS = 8


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of packed integers."""
    base = codes.name.removesuffix(ENDING)
    if codes.spec.dtype != "I32" or base == codes.name:
        return None
    require_matrix(codes)
    scale = codes.require(f"{base}_scale", "scale", SCALE_DTYPES)
    rows, words = codes.shape
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
        raise EncodingFault(
            f"expected a scale of shape [{rows}, groups], found {list(scale.shape)}; fetch the "
            "checkpoint again"
        )
    bits, width = find_bits(codes, base, scale.shape[1])
    parts = {"codes": codes.spec, "scale": scale}
    if f"{base}_zero_point" in codes.stored:
        parts["zero"] = codes.require(f"{base}_zero_point", "zero points", ("I32",))
        require_shape(parts["zero"], [(-(-rows * bits // 32), scale.shape[1])], "zero point tensor")
    if f"{base}_g_idx" in codes.stored:
        parts["g_idx"] = codes.require(f"{base}_g_idx", "group index", ("I32", "I64"))
        require_shape(parts["g_idx"], [(width,)], "group index")
    if f"{base}_shape" in codes.stored:
        parts["shape"] = codes.require(f"{base}_shape", "shape", ("I64", "I32"))
        require_shape(parts["shape"], [(2,)], "shape tensor")
    group = "per row" if scale.shape[1] == 1 else f"g{width // scale.shape[1]}"
    dtype = codes.choose_dtype(scale)
    return EncodedWeight(
        label=f"INT{bits} {group} {'asymmetric' if 'zero' in parts else 'symmetric'}",
        spec=TensorSpec(name=base, dtype=dtype, shape=(rows, width)),
        parts=parts,
        scheme=make_scheme(parts, bits, width, dtype),
        decode=partial(
            decode,
            bits=bits,
            shape=(rows, width),
            dtype=dtype,
            n_groups=scale.shape[1],
            parts=frozenset(parts),
            where=base,
        ),
    )


def make_scheme(
    parts: Mapping[str, TensorSpec], bits: int, width: int, dtype: str
) -> Scheme | None:
    """Return the scheme of codes that an artifact may hold unchanged, with the model's dtype."""
    is_plain = "shape" in parts and "g_idx" not in parts
    if not is_plain or dtype == "F32" or parts["scale"].dtype != dtype:
        return None
    n_groups = parts["scale"].shape[1]
    return Scheme(
        bits=bits,
        group_size=-1 if n_groups == 1 else width // n_groups,
        symmetric="zero" not in parts,
        scale_dtype="float16" if dtype == "F16" else "bfloat16",
    )


def find_bits(codes: StoredCodes, base: str, n_groups: int) -> tuple[int, int]:
    """Return the bits of a code and the columns of the weight, by the config and the shapes."""
    arguments = codes.quantization.list_arguments(base.removesuffix(".weight"))
    fits = set[tuple[int, int]]()
    for entry in arguments:
        bits, group = entry.get("num_bits"), entry.get("group_size")
        if entry.get("type", "int") != "int" or type(bits) is not int or not 1 <= bits <= MAX_BITS:
            continue
        has_groups = type(group) is int and group > 0
        if not has_groups and n_groups > 1:
            continue
        width = n_groups * group if has_groups else codes.shape[1] * 32 // bits  # type: ignore[operator]
        if -(-width * bits // 32) == codes.shape[1]:
            fits.add((bits, width))
    if len(fits) != 1:
        raise EncodingFault(
            f"expected one group of quantization_config.config_groups that fits codes "
            f"{list(codes.shape)} with {n_groups} scales per row, found {len(fits)} in "
            f"{shorten_repr([dict(entry) for entry in arguments])}; repair config.json"
        )
    return fits.pop()


def decode(
    read: PartReader,
    start: int,
    stop: int,
    *,
    bits: int,
    shape: tuple[int, int],
    dtype: str,
    n_groups: int,
    parts: frozenset[str],
    where: str,
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]."""
    from quantkit.checkpoint.strips import decode_strips
    from quantkit.numerics.bitpack import unpack_first
    from quantkit.numerics.groups import dequantize_groups

    rows, width = shape
    middle = 1 << (bits - 1)
    if "shape" in parts:
        stated = read("shape", 0, None).tolist()
        check_values(
            stated == [rows, width],
            f"{where}_shape: expected {[rows, width]} by codes and scales, found {stated}",
        )
    zeros = unpack_first(read("zero", 0, None), bits, 0, rows) if "zero" in parts else None
    index = read_group_index(read, n_groups, f"{where}_g_idx") if "g_idx" in parts else None

    def strip(first: int, last: int) -> Tensor:
        # [rows of the strip, words] -> [rows of the strip, in]
        codes = unpack_first(read("codes", first, last), bits, 1, width)
        zero = middle if zeros is None else zeros[first:last]
        return dequantize_groups(codes, read("scale", first, last), zero, index)

    return decode_strips(strip, start, stop, (width,), dtype)


ENCODING = Encoding(title="compressed-tensors pack-quantized", claim=claim)
