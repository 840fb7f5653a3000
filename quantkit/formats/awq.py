"""AWQ "gemm": 4-bit codes packed as AutoAWQ does, for vLLM, SGLang and AutoAWQ (formats/README.md).

    qweight [in, out / 8] int32    eight codes per word along `out`, in the order 0 2 4 6 1 3 5 7
    qzeros  [n_groups, out / 8] int32    zero points, packed the same way; no minus one as in GPTQ
    scales  [n_groups, out] float16 or bfloat16

W = (code - zero) * scale. Everything is transposed relative to a Linear's [out, in].
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
    classify_as_transformers,
    classify_by_dynamic,
    compile_any,
    parse_name_list,
)
from quantkit.formats.common.engine_names import (
    SERVERS,
    expand_fused_names,
    join_lines,
    make_patterns,
)
from quantkit.formats.common.packed import GROUP_SIZES, OWN_FORMATS, SCALE_DTYPES
from quantkit.formats.common.wrapper_names import (
    add_prefixes,
    get_prefix,
    list_part_patterns,
    make_relative,
)
from quantkit.numerics.bitpack import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD = "awq"
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
"""Model types of AWQ_SCALES_MAPPINGS in transformers' integrations/awq.py.

transformers gives their activations a scale, which stays uninitialized if no file has it.
"""


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return the first reason why engines could not load this linear, with what to do, or None."""
    return find_scheme_fault(scheme) or find_linear_fault(scheme, linear)


def find_scheme_fault(scheme: Scheme) -> str | None:
    """Return why no linear of this scheme can be stored, or None."""
    if scheme.kind != "int" or scheme.bits != BITS:
        kind = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = (
            "format compressed_tensors, which holds 2 to 8 bits"
            if scheme.kind == "int"
            else f"format {OWN_FORMATS[scheme.kind]}"
        )
        return (
            f"AutoAWQ, vLLM and SGLang read AWQ with 4-bit integers only, found {kind}; use {use}"
        )
    if scheme.symmetric:
        return (
            "AutoAWQ, vLLM and SGLang read AWQ with zero points, found symmetric: true; use "
            "symmetric: false"
        )
    if scheme.group_size not in GROUP_SIZES:
        return (
            "the AWQ kernels of vLLM and SGLang support group sizes 32, 64, 128 and -1, found "
            f"{scheme.group_size}"
        )
    if scheme.scale_dtype not in SCALE_DTYPES:
        return (
            f"vLLM and SGLang hold AWQ scales in 16 bits, found {scheme.scale_dtype}; use "
            "bfloat16 or float16"
        )
    return None


def find_linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Return why this linear cannot be stored in a supported scheme, or None."""
    if linear.role in PROTECTED_ROLES:
        return (
            f"vLLM and SGLang build a {linear.role.replace('_', ' ')} without AWQ and find no "
            "weight; keep it"
        )
    if linear.out_features % PER_WORD:
        return (
            f"{linear.out_features} output features do not fill AWQ's words of 8 codes in any "
            "engine; keep this linear"
        )
    if scheme.group_size == -1:
        if linear.role != "routed_expert":
            return None
        return "vLLM divides experts by the AWQ group size and fails on -1; use 128, 64 or 32"
    if linear.in_features % scheme.group_size:
        return (
            f"no engine loads AWQ with group_size {scheme.group_size} over {linear.in_features} "
            "input features"
        )
    return None


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load an artifact of these linears, with the reason."""
    if model_type not in SCALED_ACTIVATIONS:
        return {}
    reason = (
        f"expects scales of {model_type}'s activations with AWQ and computes NaN without them; "
        "use format gptq"
    )
    return {"transformers": reason}


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the specs of qweight, qzeros and scales of one linear, with full names."""
    groups, words = scheme.groups(linear.in_features), linear.out_features // PER_WORD
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    return (
        TensorSpec(name=f"{linear.name}.qweight", dtype="I32", shape=(linear.in_features, words)),
        TensorSpec(name=f"{linear.name}.qzeros", dtype="I32", shape=(groups, words)),
        TensorSpec(name=f"{linear.name}.scales", dtype=dtype, shape=(groups, linear.out_features)),
    )


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Pack codes [out, in], scale and zero [out, n_groups]; return tensors by local name.

    Raises NumericsError if a code does not fit 4 bits, UsageError for a symmetric matrix.
    """
    from quantkit.numerics import bitpack  # imports torch; plans use this module without it

    if quantized.zero is None:
        raise UsageError(
            "format awq: expected zero points, found a symmetric matrix; use symmetric: false"
        )
    return {
        # [out, in] -> [in, out / 8]
        "qweight": bitpack.pack(quantized.codes.T, BITS, axis=1, order=bitpack.AWQ_ORDER),
        # [out, n_groups] -> [n_groups, out / 8]
        "qzeros": bitpack.pack(quantized.zero.T, BITS, axis=1, order=bitpack.AWQ_ORDER),
        "scales": quantized.scale.T.contiguous(),  # [out, n_groups] -> [n_groups, out]
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 of qweight, qzeros and scales, as engines compute it."""
    from quantkit.numerics import affine, bitpack

    stored = Quantized(
        # [in, out / 8] -> [out, in]
        codes=bitpack.unpack(tensors["qweight"], BITS, axis=1, order=bitpack.AWQ_ORDER).T,
        scale=tensors["scales"].T,  # [n_groups, out] -> [out, n_groups]
        # [n_groups, out / 8] -> [out, n_groups]
        zero=bitpack.unpack(tensors["qzeros"], BITS, axis=1, order=bitpack.AWQ_ORDER).T,
    )
    return affine.dequantize(stored, scheme)


def make_quantization_config(contents: Contents) -> dict[str, object]:
    """Return the entry for config.json.

    `dynamic` repeats the list for GPTQModel's own loader, which reads no other. Raises UsageError
    for several group sizes, and if no entry excludes a kept module without a quantized one.
    """
    sizes = sorted({scheme.group_size for scheme in contents.schemes.values()})
    if len(sizes) != 1:
        raise UsageError(
            f"format awq: config.json has one group size, found {sizes}; use one for all rules"
        )
    relative, prefix = make_relative(contents), get_prefix(contents)
    quantized, part_patterns = list(relative.schemes), list_part_patterns(contents)
    patterns = [f"{prefix}{x}" for x in make_patterns(quantized, relative.kept)]
    return {
        "quant_method": QUANT_METHOD,
        "bits": BITS,
        "group_size": sizes[0],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": add_prefixes(
            list_not_converted(quantized, relative.kept), contents
        ),
        "dynamic": {f"-:{pattern}": {} for pattern in (*patterns, *part_patterns)},
    }


def list_not_converted(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Return entries by which every loader excludes all of `kept` and none of `quantized`.

    Each kept linear is named by its highest parent under which nothing is quantized, provided no
    loader takes that name for a quantized module too. Fused modules that no parent covers are
    listed in addition to their members.
    """
    avoid = join_lines(expand_fused_names(quantized))
    safe: dict[str, bool] = {}
    entries: dict[str, None] = {}
    for name in kept:
        for form in list_name_forms(name):
            if form not in safe:
                safe[form] = not matches_any(form, avoid)
        entry = next((form for form in list_name_forms(name) if safe[form]), None)
        if entry is None:
            raise UsageError(
                f"format awq: {name} is kept, but some engine would take its name in "
                "modules_to_not_convert for a quantized module too; quantize it, or keep the "
                "modules whose names contain it"
            )
        entries[entry] = None
    fused = [
        name
        for name in expand_fused_names(kept)
        if not any(matches_any(entry, join_lines([name])) for entry in entries)
    ]
    return [*entries, *(name for name in fused if not matches_any(name, avoid))]


def list_name_forms(name: str) -> list[str]:
    """Return the names that can select a module, the highest parent first.

    A layer keeps its trailing dot, as "layers.1" is a substring of "layers.10".
    """
    parts = name.split(".")
    parents = [
        ".".join(parts[: n + 1]) + ("." if parts[n].isdigit() else "")
        for n in range(len(parts) - 1)
    ]
    return [*parents, name]


def matches_any(entry: str, modules: str) -> bool:
    """Return whether some loader excludes one of the `modules` because of `entry`.

    `modules` is a text of `join_lines`. AutoAWQ, vLLM and SGLang test whether a module's name
    contains the entry. transformers matches the entry as a regular expression from the start of
    the name up to a dot, so that the entry's own dots match any character.
    """
    return (
        entry in modules or re.search(rf"\n(?:{entry})(?:(?<=\.)|(?=[.\n]))", modules) is not None
    )


def read_shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """Return [out, in] from the specs of a linear's tensors."""
    if not {"qweight", "scales"} <= set(specs):
        return None
    return specs["scales"].shape[-1], specs["qweight"].shape[0]


def classify_by_substring(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return the reading of AutoAWQ, vLLM and SGLang: a name that contains an entry is kept."""
    kept = compile_any(tuple(map(re.escape, parse_name_list(entry.get(MODULE_LIST), MODULE_LIST))))
    return lambda module: "plain" if kept.search(module) else "codes"


MODULE_LIST = "modules_to_not_convert"

CHECKS = FormatChecks(
    read_shape=read_shape,
    value_checks=lambda linear, scheme: {"scales": SCALE},
    loaders=(
        Loader(engines="AutoAWQ, vLLM and SGLang", classify=classify_by_substring),
        Loader(
            engines="transformers",
            classify=classify_as_transformers(MODULE_LIST),
            has_fused_names=False,
        ),
        Loader(engines="GPTQModel", classify=classify_by_dynamic),
    ),
    module_lists=frozenset({MODULE_LIST, "dynamic"}),
)

FORMAT = Format(
    accepts=find_rejection,
    layout=list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    quant_method=QUANT_METHOD,
    one_scheme=True,
    engines=SERVERS,
    limits=find_engine_limits,
)
