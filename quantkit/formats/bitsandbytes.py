"""bitsandbytes NF4: the tensors of `Linear4bit`, which transformers reads (formats/README.md).

    weight                [out * in / 2, 1] uint8    two codes per byte, the first in the high bits
    weight.absmax         [n_blocks] float32; uint8 with double quantization
    weight.quant_map      [16] float32    the codebook
    weight.nested_absmax  [n_blocks / 256] float32    double quantization only
    weight.nested_quant_map  [256] float32    double quantization only
    weight.quant_state.bitsandbytes__nf4
                          [length] uint8    JSON: shape, dtype, block sizes, the nested offset

With double quantization, absmax = nested_quant_map[code] * nested_absmax + nested_offset.
bitsandbytes itself quantizes the scales and unpacks stored tensors. The offset's text varies in
length: spaces after the last brace, which JSON allows, pad the state to its planned length.

transformers loads every linear but routed experts, which it holds as two fused tensors per layer;
`quantkit.load` loads those too, expert by expert.
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
    classify_as_transformers,
    require_bytes,
)
from quantkit.formats.common.engine_names import TRANSFORMERS, join_lines, list_parents
from quantkit.formats.common.wrapper_names import add_prefixes, make_relative

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD = "bitsandbytes"
BLOCK = 64
NESTED_BLOCK = 256
STATE_TENSOR = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"torch.uint8": "U8", "torch.float32": "F32"}
REPAIR_HINT = "pull or build the artifact again"
MAX_OFFSET_CHARACTERS = 24
"""Characters of the longest float64 in JSON."""


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return the first reason why no engine could load this linear, with what to do, or None."""
    if scheme.kind != "nf4":
        codes = f"{scheme.bits}-bit integers" if scheme.kind == "int" else scheme.kind
        return (
            f"transformers reads 4-bit bitsandbytes as NF4, found {codes}; use method nf4, or "
            "another format"
        )
    if linear.role in PROTECTED_ROLES:
        return (
            f"transformers builds this {linear.role.replace('_', ' ')} without bitsandbytes; "
            "keep it"
        )
    if linear.in_features % BLOCK:
        return (
            f"blocks of {BLOCK} weights would cross the rows of {linear.in_features}; keep this "
            "linear"
        )
    return None


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load an artifact of these linears, with the reason."""
    if not any(linear.role == "routed_expert" for linear in schemes):
        return {}
    reason = "no loader for routed experts in NF4; quantkit.load(folder) has one"
    return dict.fromkeys(("transformers", "vLLM", "SGLang"), reason)


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the specs of the packed weight and its quantization state, with full names."""
    size = linear.n_parameters
    blocks = size // BLOCK
    text = compute_state_length(linear.out_features, linear.in_features, scheme)
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
        TensorSpec(name=f"{linear.name}.{STATE_TENSOR}", dtype="U8", shape=(text,)),
    )


@cache  # called once per linear, 45,000 times for DeepSeek-V3
def compute_state_length(out_features: int, in_features: int, scheme: Scheme) -> int:
    """Return the length of the JSON state in bytes; it does not depend on the offset."""
    return len(
        format_state((out_features, in_features), scheme, 0.0 if scheme.double_quant else None)
    )


def format_state(shape: Sequence[int], scheme: Scheme, offset: float | None) -> bytes:
    """Return the JSON state as bitsandbytes writes it; `offset` None: no double quantization."""
    values: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": scheme.source_dtype or "bfloat16",
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(values).encode()
    values |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    longest = len(json.dumps({**values, "nested_offset": 0})) - 1 + MAX_OFFSET_CHARACTERS
    return json.dumps(values).ljust(longest).encode()


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Pack codes [out, in] and absmax [out, n_groups]; return tensors by local name.

    With double quantization the scales are quantized as well.
    """
    import torch  # slow to import; plans use this module without it

    from quantkit.numerics import nf4

    device = quantized.codes.device
    absmax = quantized.scale.reshape(-1)  # [out, n_groups] -> [n_blocks]
    tensors = {
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
        tensors["weight.absmax"], nested = quantize(absmax - middle, blocksize=NESTED_BLOCK)
        tensors |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.code}
        offset = float(middle)
    text = format_state(tuple(quantized.codes.shape), scheme, offset)
    return {**tensors, STATE_TENSOR: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 that bitsandbytes unpacks from the tensors of `pack`."""
    import torch

    from quantkit.numerics import nf4

    bitsandbytes = nf4.import_bitsandbytes("functional")
    state = bitsandbytes.QuantState.from_dict(
        extract_quant_state(tensors, scheme), device=tensors["weight"].device
    )
    state.dtype = torch.float32  # before an engine rounds the weight to its compute dtype
    unpacked: Tensor = bitsandbytes.dequantize_4bit(tensors["weight"], state)
    return unpacked


def extract_quant_state(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of bitsandbytes' QuantState, named without "weight.".

    Raises ArtifactError if they contradict each other: bitsandbytes trusts the sizes in the JSON
    when it reads memory.
    """
    state = parse_json_object(bytes(tensors[STATE_TENSOR].tolist()))
    shape, offset = state.get("shape", ()), state.get("nested_offset")
    fits = (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    )
    fits = fits and (type(offset) is float if scheme.double_quant else offset is None)
    if not fits or state != parse_json_object(format_state(shape, scheme, offset)):
        raise ArtifactError(
            f"{STATE_TENSOR}: expected the state of NF4 in blocks of {BLOCK}, found {state}; "
            f"{REPAIR_HINT}"
        )
    linear = Linear(name="", out_features=shape[0], in_features=shape[1], role="mlp")
    expected = {
        spec.name[1:]: (spec.dtype, spec.shape)
        for spec in list_tensors(linear, scheme)
        if spec.name != f".{STATE_TENSOR}"
    }
    stored = {
        name: (DTYPES.get(str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name in expected
    }
    if stored != expected:
        raise ArtifactError(
            f"weight: expected the tensors {expected}, found {stored}; {REPAIR_HINT}"
        )
    return {
        name.removeprefix("weight."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weight.")
    }


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Return the object in a JSON text; an empty one for anything else."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def make_quantization_config(contents: Contents) -> dict[str, object]:
    """Return the entry for config.json; UsageError for several schemes."""
    schemes = set(contents.schemes.values())
    if len(schemes) != 1:
        raise UsageError(
            "format bitsandbytes: config.json has one double_quant and one dtype, "
            f"found {len(schemes)} schemes; use one for all rules"
        )
    (scheme,) = schemes
    relative = make_relative(contents)
    skipped = add_prefixes(list_skipped(list(relative.schemes), relative.kept), contents)
    return {
        "quant_method": QUANT_METHOD,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": scheme.source_dtype or "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def list_skipped(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Return module names that together select everything kept and nothing quantized.

    Plain names, the highest parent of each: transformers takes an entry as an expression that
    matches a name up to a dot or its end, or as the end of a name; SGLang as the beginning of a
    name up to a dot.
    """
    busy = {parent for name in quantized for parent in list_parents(name)}
    entries = dict.fromkeys(
        next((part for part in list_parents(name) if part not in busy), name) for name in kept
    )
    avoid = join_lines(quantized)
    for name in entries:
        if re.search(rf"\n(?:{name})(?=[.\n])", avoid) or f"{name}\n" in avoid:
            raise UsageError(
                f"format bitsandbytes: {name} is kept, but transformers would take its name for a "
                "quantized module's too; quantize it, or keep the modules whose names end like it"
            )
    return list(entries)


def read_shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """Return [out, in] from the state of a linear, the only tensor that has it."""
    if STATE_TENSOR not in specs:
        return None
    value = parse_json_object(read(STATE_TENSOR)).get("shape")
    if not isinstance(value, list) or len(value) != 2:
        return None
    return (value[0], value[1]) if all(type(n) is int and n > 0 for n in value) else None


def list_value_checks(linear: Linear, scheme: Scheme) -> dict[str, ValueCheck]:
    """Return the checks of one linear's tensors."""
    sides = linear.out_features, linear.in_features

    def find_state_fault(text: bytes) -> str | None:
        state = parse_json_object(text)
        offset = state.get("nested_offset")
        fits = (
            (type(offset) is float and isfinite(offset)) if scheme.double_quant else offset is None
        )
        if fits and state == parse_json_object(format_state(sides, scheme, offset)):
            return None
        return (
            f"expected the state of NF4 for {list(sides)} in blocks of {BLOCK}, "
            f"found {state!r:.100}"
        )

    checks = {
        "weight.quant_map": require_bytes(struct.pack("<16f", *NF4_VALUES), "the 16 values of NF4"),
        STATE_TENSOR: ValueCheck(kind="whole", find_fault=find_state_fault),
    }
    if not scheme.double_quant:
        return {**checks, "weight.absmax": MAGNITUDE}
    return {**checks, "weight.nested_absmax": MAGNITUDE, "weight.nested_quant_map": RISING}


MODULE_LIST = "llm_int8_skip_modules"

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""numerics.nf4.VALUES, for checks without torch."""

CHECKS = FormatChecks(
    read_shape=read_shape,
    value_checks=list_value_checks,
    loaders=(
        Loader(
            engines="transformers",
            classify=classify_as_transformers(MODULE_LIST),
            has_fused_names=False,
        ),
    ),
    module_lists=frozenset({MODULE_LIST}),
)

FORMAT = Format(
    accepts=find_rejection,
    layout=list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    quant_method=QUANT_METHOD,
    one_scheme=True,
    holds_codes=False,
    engines={
        **TRANSFORMERS,
        "quantkit.load": "python -ic \"import quantkit; model = quantkit.load('{path}')\"",
    },
    limits=find_engine_limits,
    packages=("bitsandbytes",),
)
