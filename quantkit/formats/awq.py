"""AWQ "gemm": four-bit codes as AutoAWQ packs them, which vLLM, SGLang and AutoAWQ read (FORMATS.md, section 1).

    qweight [in, out / 8] int32    eight codes per word along `out`, in the order 0 2 4 6 1 3 5 7
    qzeros  [n_groups, out / 8] int32    the same packing; W = (code - zero) * scale, without GPTQ's minus one
    scales  [n_groups, out] float16 or bfloat16

Everything is transposed against a Linear's [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import (
    PROTECTED_ROLES,
    Contents,
    Format,
    Linear,
    Quantized,
    Scheme,
    TensorSpec,
)
from quantkit.errors import UsageError
from quantkit.formats.common.checks import (
    SCALE,
    FormatChecks,
    Loader,
    Treatment,
    left_out,
    matcher,
    switched_off,
    texts,
)
from quantkit.formats.common.engine_names import SERVERS, expand_fused_names, kept_patterns, lines
from quantkit.formats.common.packed import GROUP_SIZES, SCALE_DTYPES
from quantkit.numerics.runs import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = count_codes_per_run(BITS)
SCALED_ACTIVATIONS = frozenset({
    "starcoder2",
    "RefinedWebModel",
    "falcon",
    "mpt",
    "gptj",
    "gpt_neox",
    "gpt_bigcode",
    "bloom",
})
"""AWQ_SCALES_MAPPINGS of transformers' integrations/awq.py: there a scale that no file holds stays uninitialized."""


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None, or the first reason why engines could not load this linear, with what to do."""
    return scheme_fault(scheme) or linear_fault(scheme, linear)


def scheme_fault(scheme: Scheme) -> str | None:
    """Why no linear of this scheme can be stored."""
    if scheme.kind != "int" or scheme.bits != BITS:
        found = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = (
            "format compressed_tensors, which holds 2 to 8 bits"
            if scheme.kind == "int"
            else "format bitsandbytes"
        )
        return (
            f"AutoAWQ, vLLM and SGLang read AWQ with 4-bit integers only, found {found}; use {use}"
        )
    if scheme.symmetric:
        return "AutoAWQ, vLLM and SGLang read AWQ with zero points, found symmetric: true; use symmetric: false"
    if scheme.group_size not in GROUP_SIZES:
        return f"the AWQ kernels of vLLM and SGLang know group sizes 32, 64, 128 and -1, found {scheme.group_size}"
    if scheme.scale_dtype not in SCALE_DTYPES:
        return f"vLLM and SGLang hold AWQ scales in 16 bits, found {scheme.scale_dtype}; use bfloat16 or float16"
    return None


def linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Why this linear cannot be stored in a scheme that others can."""
    if linear.role in PROTECTED_ROLES:
        return f"vLLM and SGLang build a {linear.role.replace('_', ' ')} without AWQ and find no weight; keep it"
    if linear.out_features % PER_WORD:
        return f"{linear.out_features} output features do not fill AWQ's words of 8 codes in any engine; keep this linear"
    if scheme.group_size == -1:
        broken = linear.role == "routed_expert"
        return (
            "vLLM divides experts by the AWQ group size and fails on -1; use 128, 64 or 32"
            if broken
            else None
        )
    if linear.in_features % scheme.group_size:
        return f"no engine loads AWQ with group_size {scheme.group_size} over {linear.in_features} input features"
    return None


def limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Engines that do not load an artifact of these linears, and why."""
    if model_type not in SCALED_ACTIVATIONS:
        return {}
    why = f"expects scales of {model_type}'s activations beside AWQ and computes NaN without; use GPTQ's format"
    return {"transformers": why}


def layout(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """qweight, qzeros and scales of one linear, with full names."""
    groups, words = scheme.groups(linear.in_features), linear.out_features // PER_WORD
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    return (
        TensorSpec(name=f"{linear.name}.qweight", dtype="I32", shape=(linear.in_features, words)),
        TensorSpec(name=f"{linear.name}.qzeros", dtype="I32", shape=(groups, words)),
        TensorSpec(name=f"{linear.name}.scales", dtype=dtype, shape=(groups, linear.out_features)),
    )


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """codes [out, in], scale and zero [out, n_groups] -> local names; NumericsError when a code has no four bits."""
    from quantkit.numerics import bitpack  # torch starts when there is something to store

    if quantized.zero is None:
        raise UsageError(
            "format awq: stores zero points, found a symmetric matrix; use symmetric: false"
        )
    return {
        "qweight": bitpack.pack(
            quantized.codes.T, BITS, axis=1, order=bitpack.AWQ_ORDER
        ),  # [out, in] -> [in, out / 8]
        "qzeros": bitpack.pack(
            quantized.zero.T, BITS, axis=1, order=bitpack.AWQ_ORDER
        ),  # -> [n_groups, out / 8]
        "scales": quantized.scale.T.contiguous(),  # [out, n_groups] -> [n_groups, out]
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """qweight, qzeros, scales -> the weight [out, in] float32 that engines compute with."""
    from quantkit.numerics import affine, bitpack

    stored = Quantized(
        codes=bitpack.unpack(
            tensors["qweight"], BITS, axis=1, order=bitpack.AWQ_ORDER
        ).T,  # [in, out / 8] -> [out, in]
        scale=tensors["scales"].T,  # [n_groups, out] -> [out, n_groups]
        zero=bitpack.unpack(
            tensors["qzeros"], BITS, axis=1, order=bitpack.AWQ_ORDER
        ).T,  # -> [out, n_groups]
    )
    return affine.dequantize(stored, scheme)


def quantization_config(contents: Contents) -> dict[str, object]:
    """The entry for config.json; UsageError when a kept module cannot be named without hitting a quantized one.

    `dynamic` says the same to GPTQModel's own loader, which reads no other list.
    """
    found = sorted({scheme.group_size for scheme in contents.schemes.values()})
    if len(found) != 1:
        raise UsageError(
            f"format awq: config.json has room for one group size, found {found}; use one for all rules"
        )
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": found[0],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": not_converted(list(contents.schemes), contents.kept),
        "dynamic": {
            f"-:{pattern}": {} for pattern in kept_patterns(list(contents.schemes), contents.kept)
        },
    }


def not_converted(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Names that make every loader leave `kept` alone and none of `quantized`.

    Each kept linear is named by its highest parent under which nothing is quantized, as far as no loader takes that
    name for a quantized module too. Where no parent serves, fused modules are named beside their members.
    """
    avoid = lines(expand_fused_names(quantized))
    safe: dict[str, bool] = {}
    named: dict[str, None] = {}
    for name in kept:
        for form in forms(name):
            if form not in safe:
                safe[form] = not hits(form, avoid)
        entry = next((form for form in forms(name) if safe[form]), None)
        if entry is None:
            raise UsageError(
                f"format awq: {name} is kept, but some engine would take its name in modules_to_not_convert for a "
                "quantized module too; quantize it, or keep the modules whose names contain it"
            )
        named[entry] = None
    fused = [
        name
        for name in expand_fused_names(kept)
        if not any(hits(entry, lines([name])) for entry in named)
    ]
    return [*named, *(name for name in fused if not hits(name, avoid))]


def forms(name: str) -> list[str]:
    """Ways to name a module, the highest parent first. A layer keeps its trailing dot: "layers.1" is in "layers.10"."""
    parts = name.split(".")
    parents = [
        ".".join(parts[: n + 1]) + ("." if parts[n].isdigit() else "")
        for n in range(len(parts) - 1)
    ]
    return [*parents, name]


def hits(entry: str, modules: str) -> bool:
    """Whether some loader takes one of the `modules` (as `lines`) for unconverted because of `entry`.

    AutoAWQ, vLLM and SGLang ask whether a module's name contains the entry. transformers matches the entry as a regular
    expression from the name's start up to a dot, and its own dots then stand for any character.
    """
    return (
        entry in modules or re.search(rf"\n(?:{entry})(?:(?<=\.)|(?=[.\n]))", modules) is not None
    )


def shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """[out, in] by the specs of a linear's tensors."""
    if not {"qweight", "scales"} <= set(specs):
        return None
    return specs["scales"].shape[-1], specs["qweight"].shape[0]


def contained(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """AutoAWQ, vLLM and SGLang: a module is kept when its name contains an entry."""
    kept = matcher(tuple(map(re.escape, texts(entry.get(LIST), LIST))))
    return lambda module: "plain" if kept.search(module) else "codes"


LIST = "modules_to_not_convert"

CHECKS = FormatChecks(
    shape=shape,
    numbers=lambda linear, scheme: {"scales": SCALE},
    loaders=(
        Loader(engines="AutoAWQ, vLLM and SGLang", told=contained),
        Loader(engines="transformers", told=left_out(LIST), fused=False),
        Loader(engines="GPTQModel", told=switched_off),
    ),
    lists=frozenset({LIST, "dynamic"}),
)

FORMAT = Format(
    accepts=accepts,
    layout=layout,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=True,
    engines=SERVERS,
    limits=limits,
)
