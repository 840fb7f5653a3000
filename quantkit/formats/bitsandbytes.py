"""bitsandbytes NF4: what `Linear4bit` stores and transformers reads (FORMATS.md, section 4).

    weight                                  [out * in / 2, 1] uint8    two codes per byte, the first in the high bits
    weight.absmax                           [n_blocks] float32; uint8 with double quantization
    weight.quant_map                        [16] float32    the codebook
    weight.nested_absmax                    [n_blocks / 256] float32    double quantization only
    weight.nested_quant_map                 [256] float32    double quantization only
    weight.quant_state.bitsandbytes__nf4    [length] uint8    JSON: shape, dtype, block sizes, and the nested offset

With double quantization absmax is nested_quant_map[code] * nested_absmax + nested_offset. bitsandbytes itself quantizes
the scales and unpacks what was stored. The offset's text has no fixed length: spaces, which JSON allows behind its last
brace, fill the blob up to the length that the plan gave it.

transformers loads every linear but routed experts, which it keeps as two fused tensors per layer; `quantkit.load` loads
those too, expert by expert.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from quantkit.contracts import (
    PROTECTED_ROLES,
    Contents,
    Format,
    Linear,
    Quantized,
    Scheme,
    TensorSpec,
)
from quantkit.errors import ArtifactError, UsageError
from quantkit.formats.common.checks import (
    MAGNITUDE,
    RISING,
    FormatChecks,
    Loader,
    ValueCheck,
    exactly,
    left_out,
)
from quantkit.formats.common.engine_names import TRANSFORMERS, lines, parents

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"torch.uint8": "U8", "torch.float32": "F32"}
REPAIR_HINT = "pull or build the artifact again"
OFFSET_CHARACTERS = 24
"""The longest text of a float64 in JSON."""


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None, or the first reason why no engine could load this linear, with what to do."""
    if scheme.kind != "nf4":
        return (
            f"transformers reads 4-bit bitsandbytes as NF4, found {scheme.bits}-bit integers; use method nf4, or "
            "another format"
        )
    if linear.role in PROTECTED_ROLES:
        return f"transformers builds this {linear.role.replace('_', ' ')} without bitsandbytes; keep it"
    if linear.in_features % BLOCK:
        return f"blocks of {BLOCK} weights would cross the rows of {linear.in_features}; keep this linear"
    return None


def limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Engines that do not load an artifact of these linears, and why."""
    if not any(linear.role == "routed_expert" for linear in schemes):
        return {}
    why = "no loader for routed experts in NF4; quantkit.load(folder) has one"
    return dict.fromkeys(("transformers", "vLLM", "SGLang"), why)


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """The packed weight and its quantization state, with full names."""
    size = linear.n_parameters
    blocks = size // BLOCK
    text = state_length(linear.out_features, linear.in_features, scheme)
    shapes: dict[str, tuple[str, int]] = {"absmax": ("F32", blocks), "quant_map": ("F32", 16)}
    if scheme.double_quant:
        shapes["absmax"] = ("U8", blocks)
        shapes |= {
            "nested_absmax": ("F32", -(-blocks // NESTED_BLOCK)),
            "nested_quant_map": ("F32", 256),
        }
    return (
        TensorSpec(name=f"{linear.name}.weight", dtype="U8", shape=(size // 2, 1)),
        *(
            TensorSpec(name=f"{linear.name}.weight.{n}", dtype=d, shape=(s,))
            for n, (d, s) in shapes.items()
        ),
        TensorSpec(name=f"{linear.name}.{STATE}", dtype="U8", shape=(text,)),
    )


@cache  # asked for once per linear, 45,000 times for DeepSeek-V3
def state_length(out_features: int, in_features: int, scheme: Scheme) -> int:
    """Bytes of the JSON blob, whatever the offset."""
    return len(
        state_text((out_features, in_features), scheme, 0.0 if scheme.double_quant else None)
    )


def state_text(shape: Sequence[int], scheme: Scheme, offset: float | None) -> bytes:
    """The JSON blob as bitsandbytes writes it; `offset` None: no double quantization."""
    values: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": scheme.source_dtype or "bfloat16",
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(values).encode()
    values |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    longest = len(json.dumps({**values, "nested_offset": 0})) - 1 + OFFSET_CHARACTERS
    return json.dumps(values).ljust(longest).encode()


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """codes [out, in] and absmax [out, n_groups] -> local names, the scales quantized if the scheme says so."""
    import torch  # starts when there is something to store

    from quantkit.numerics import nf4

    device, absmax = (
        quantized.codes.device,
        quantized.scale.reshape(-1),
    )  # [out, n_groups] -> [n_blocks]
    found = {
        "weight": nf4.pack_pairs(quantized.codes),  # [out, in] -> [out * in / 2, 1]
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(nf4.CODEBOOK, device=device),
    }
    offset = None
    if scheme.double_quant:
        quantize, middle = (
            nf4.import_bitsandbytes("functional").quantize_blockwise,
            nf4.compute_mean(absmax),
        )
        found["weight.absmax"], nested = quantize(absmax - middle, blocksize=NESTED_BLOCK)
        found |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.code}
        offset = float(middle)
    text = state_text(tuple(quantized.codes.shape), scheme, offset)
    return {**found, STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """What `pack` stored -> the weight [out, in] float32 that bitsandbytes unpacks and Linear4bit multiplies with."""
    import torch

    from quantkit.numerics import nf4

    bitsandbytes = nf4.import_bitsandbytes("functional")
    state = bitsandbytes.QuantState.from_dict(
        extract_quant_state(tensors, scheme), device=tensors["weight"].device
    )
    state.dtype = torch.float32  # as it is before an engine rounds it to its compute dtype
    unpacked: Tensor = bitsandbytes.dequantize_4bit(tensors["weight"], state)
    return unpacked


def extract_quant_state(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of bitsandbytes' QuantState, without the "weight." before their names.

    Raises ArtifactError when they do not belong together: bitsandbytes reads memory by what the JSON says.
    """
    told = json_values(bytes(tensors[STATE].tolist()))
    shape, offset = told.get("shape", ()), told.get("nested_offset")
    fits = (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    )
    fits = fits and (type(offset) is float if scheme.double_quant else offset is None)
    if not fits or told != json_values(state_text(shape, scheme, offset)):
        raise ArtifactError(
            f"{STATE}: expected the state of NF4 in blocks of {BLOCK}, found {told}; {REPAIR_HINT}"
        )
    one = Linear(name="", out_features=shape[0], in_features=shape[1], role="mlp")
    parts = {
        spec.name[1:]: (spec.dtype, spec.shape)
        for spec in list_tensors(one, scheme)
        if spec.name != f".{STATE}"
    }
    found = {
        name: (DTYPES.get(str(part.dtype)), tuple(part.shape))
        for name, part in tensors.items()
        if name in parts
    }
    if found != parts:
        raise ArtifactError(f"weight: expected the tensors {parts}, found {found}; {REPAIR_HINT}")
    return {
        name.removeprefix("weight."): part
        for name, part in tensors.items()
        if name.startswith("weight.")
    }


def json_values(text: bytes) -> dict[str, Any]:
    """The object in a JSON text; an empty one when there is none."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def quantization_config(contents: Contents) -> dict[str, object]:
    """The entry for config.json; UsageError when several schemes are asked for."""
    found = set(contents.schemes.values())
    if len(found) != 1:
        raise UsageError(
            f"format bitsandbytes: config.json has room for one double_quant and one dtype, found {len(found)} "
            "schemes; use one for all rules"
        )
    (scheme,) = found
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": scheme.source_dtype or "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped(list(contents.schemes), contents.kept),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def skipped(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Module names under which nothing is quantized, so that together they name everything that is kept.

    Plain names, the highest parent of each: transformers takes one as an expression that a module's name must match up
    to a dot or its end, or as the end of a name; SGLang as the beginning of a name up to a dot.
    """
    busy = {parent for name in quantized for parent in parents(name)}
    named = dict.fromkeys(
        next((part for part in parents(name) if part not in busy), name) for name in kept
    )
    avoid = lines(quantized)
    for name in named:
        if re.search(rf"\n(?:{name})(?=[.\n])", avoid) or f"{name}\n" in avoid:
            raise UsageError(
                f"format bitsandbytes: {name} is kept, but transformers would take its name for a quantized module's "
                "too; quantize it, or keep the modules whose names end like it"
            )
    return list(named)


def shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """[out, in] by the state of a linear, which is the one place where it stands."""
    if STATE not in specs:
        return None
    found = json_values(read(STATE)).get("shape")
    fits = (
        isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    )
    return (found[0], found[1]) if isinstance(found, list) and fits else None


def numbers(linear: Linear, scheme: Scheme) -> dict[str, ValueCheck]:
    """What the tensors of one linear must hold."""
    sides = linear.out_features, linear.in_features

    def state_fault(text: bytes) -> str | None:
        told = json_values(text)
        offset = told.get("nested_offset")
        fits = (
            (type(offset) is float and isfinite(offset)) if scheme.double_quant else offset is None
        )
        if fits and told == json_values(state_text(sides, scheme, offset)):
            return None
        return (
            f"expected the state of NF4 for {list(sides)} in blocks of {BLOCK}, found {told!r:.100}"
        )

    found = {
        "weight.quant_map": exactly(struct.pack("<16f", *NF4_VALUES), "the 16 values of NF4"),
        STATE: ValueCheck(kind="whole", fault=state_fault),
    }
    if not scheme.double_quant:
        return {**found, "weight.absmax": MAGNITUDE}
    return {**found, "weight.nested_absmax": MAGNITUDE, "weight.nested_quant_map": RISING}


LIST = "llm_int8_skip_modules"

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""numerics.codebook.VALUES, for those who check an artifact without torch."""

CHECKS = FormatChecks(
    shape=shape,
    numbers=numbers,
    loaders=(Loader(engines="transformers", told=left_out(LIST), fused=False),),
    lists=frozenset({LIST}),
)

FORMAT = Format(
    accepts=accepts,
    layout=list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=True,
    holds_codes=False,
    engines={
        **TRANSFORMERS,
        "quantkit.load": "python -ic \"import quantkit; model = quantkit.load('{path}')\"",
    },
    limits=limits,
    packages=("bitsandbytes",),
)
