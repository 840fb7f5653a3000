"""bitsandbytes NF4 and FP4: two codes per byte, the first in the high bits (formats/README.md).

    X.weight               [ceil(n / 2), 1] uint8    n = out * in, row after row
    X.weight.absmax        [blocks] float32; uint8 if nested
    X.weight.quant_map     [16] float32    the value of each code
    X.weight.nested_absmax, X.weight.nested_quant_map    [nested blocks], [256] float32
    X.weight.quant_state.bitsandbytes__nf4    JSON: shape, dtype, block sizes, the nested offset

    weight = quant_map[code] * absmax, rounded once
    absmax = nested_quant_map[absmax] * nested_absmax + nested_offset, if nested

Headers do not hold the shape: the JSON of each weight is read when the checkpoint is opened.
"""

from __future__ import annotations

from functools import partial
from math import isfinite, prod
from typing import TYPE_CHECKING

from quantkit.checkpoint.encoding import (
    EncodedWeight,
    Encoding,
    EncodingFault,
    PartReader,
    StoredCodes,
    require_shape,
)
from quantkit.contracts import TensorSpec
from quantkit.dtypes import FLOAT_NAMES
from quantkit.errors import CheckpointError
from quantkit.io.files import parse_json, shorten_repr

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("nf4", "fp4")
STATE_LIMIT_BYTES = 4096


def claim(codes: StoredCodes) -> EncodedWeight | None:
    """Return the weight of 4-bit codes of bitsandbytes."""
    name = codes.name
    if codes.spec.dtype != "U8" or f"{name}.quant_map" not in codes.stored:
        return None
    kind = next(
        (k for k in KINDS if f"{name}.quant_state.bitsandbytes__{k}" in codes.stored), "nf4"
    )
    state = codes.require(f"{name}.quant_state.bitsandbytes__{kind}", "state", ("U8",))
    values = read_state(codes, state)
    shape, dtype, block = (
        read_shape(values),
        FLOAT_NAMES.get(str(values.get("dtype"))),
        values["blocksize"],
    )
    if shape is None or dtype is None or type(block) is not int or block < 1:
        raise EncodingFault(
            f"{state.name}: expected shape, dtype and blocksize, found {shorten_repr(values)}; "
            "fetch the checkpoint again"
        )
    count = prod(shape)
    blocks = -(-count // block)
    require_shape(codes.spec, [(-(-count // 2), 1), (-(-count // 2),)], "weight")
    is_nested = f"{name}.nested_absmax" in codes.stored
    absmax = codes.require(f"{name}.absmax", "absmax", ("U8",) if is_nested else ("F32",))
    require_shape(absmax, [(blocks,)], "absmax")
    table = codes.require(f"{name}.quant_map", "table of values", ("F32",))
    require_shape(table, [(16,)], "table of values")
    parts = {"codes": codes.spec, "scale": absmax, "table": table, "state": state}
    nested_block, offset = 0, 0.0
    if is_nested:
        nested_block, offset = read_nested(values, state)
        parts["nested"] = codes.require(f"{name}.nested_absmax", "nested absmax", ("F32",))
        require_shape(parts["nested"], [(-(-blocks // nested_block),)], "nested absmax")
        parts["nested_table"] = codes.require(f"{name}.nested_quant_map", "nested table", ("F32",))
        require_shape(parts["nested_table"], [(256,)], "nested table")
    return EncodedWeight(
        label=f"{kind.upper()} g{block}{' double quant' if is_nested else ''}",
        spec=TensorSpec(name=name, dtype=dtype, shape=shape),
        parts=parts,
        decode=partial(
            decode,
            shape=shape,
            block=block,
            nested_block=nested_block,
            offset=offset,
            dtype=dtype,
        ),
    )


def read_state(codes: StoredCodes, state: TensorSpec) -> dict[str, object]:
    """Return the JSON of a quantization state; raises EncodingFault."""
    if codes.read_bytes is None:
        raise EncodingFault(
            "expected its shape in the headers, found it in the data of bitsandbytes' state only; "
            "download the model and give its folder as source.model"
        )
    if state.n_bytes > STATE_LIMIT_BYTES:
        raise EncodingFault(
            f"{state.name}: expected at most {STATE_LIMIT_BYTES} bytes, found {state.n_bytes}; "
            "fetch the checkpoint again"
        )
    try:
        values = parse_json(codes.read_bytes(state.name).rstrip(), state.name)
    except CheckpointError as fault:
        raise EncodingFault(str(fault)) from None
    return {"blocksize": None, **values}


def read_shape(values: dict[str, object]) -> tuple[int, ...] | None:
    """Return the shape in a quantization state; None if it is malformed."""
    shape = values.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        return None
    return tuple(shape) if all(type(n) is int and 0 < n < 2**31 for n in shape) else None


def read_nested(values: dict[str, object], state: TensorSpec) -> tuple[int, float]:
    """Return block size and offset of nested scales; raises EncodingFault."""
    block, offset = values.get("nested_blocksize"), values.get("nested_offset")
    if type(block) is not int or block < 1 or type(offset) is not float or not isfinite(offset):
        raise EncodingFault(
            f"{state.name}: expected nested_blocksize and nested_offset, found "
            f"{shorten_repr(values)}; fetch the checkpoint again"
        )
    return block, offset


def decode(
    read: PartReader,
    start: int,
    stop: int,
    *,
    shape: tuple[int, ...],
    block: int,
    nested_block: int,
    offset: float,
    dtype: str,
) -> Tensor:
    """Return rows start .. stop-1 of the weight: [stop - start, in]."""
    import torch

    from quantkit.checkpoint.strips import decode_strips

    table, absmax = read("table", 0, None), read("scale", 0, None)
    if nested_block:
        scale = read("nested_table", 0, None)[absmax.long()]  # [blocks]
        nested = read("nested", 0, None).repeat_interleave(nested_block)[: len(absmax)]
        absmax = scale * nested + offset
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)  # [256, 2]
    width = shape[1]

    def strip(first: int, last: int) -> Tensor:
        begin, end = first * width, last * width
        data = read("codes", begin // 2, -(-end // 2)).reshape(-1)  # [bytes]
        values = torch.from_numpy(pairs.numpy().take(data.numpy(), axis=0)).flatten()
        values = values[begin % 2 : begin % 2 + end - begin]  # [rows of the strip * in]
        blocks = torch.arange(begin // block, -(-end // block))
        factors = absmax[blocks].repeat_interleave(block)[begin % block :][: end - begin]
        return (values * factors).reshape(last - first, width)

    return decode_strips(strip, start, stop, (width,), dtype)


ENCODING = Encoding(title="bitsandbytes NF4", claim=claim)
