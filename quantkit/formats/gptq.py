"""GPTQ "v1": symmetric codes of 4 or 8 bits as AutoGPTQ packs them, read by vLLM, SGLang, GPTQModel (FORMATS.md, 2).

    qweight [in / per_word, out] int32    sequential codes of consecutive inputs, lowest first
    qzeros  [n_groups, out / per_word] int32    zero - 1 in every slot; readers add the 1
    scales  [n_groups, out] float16 or bfloat16
    g_idx   [in] int32    the group of an input channel, always k // group_size

Symmetric only: vLLM and SGLang read nothing else, and zero - 1 does not hold the zero point 0 that a group of positive
weights needs. The activation order of a solver leaves no trace: groups stay where they are, desc_act is false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import PROTECTED_ROLES, Contents, Format, Linear, Quantized, Scheme, TensorSpec
from quantkit.engine_names import engine_names, kept_patterns, lines, split_layer
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)
"""What the Marlin kernels of vLLM and SGLang know; others fall to slow kernels or fail."""
SCALE_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
MLA = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""DeepSeek's compressed attention: SGLang joins the first two along the wrong axis and unpacks the last as AWQ."""


def per_word(scheme: Scheme) -> int:
    """Codes in one 32-bit word."""
    return 32 // scheme.bits


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None, or the first reason why engines could not load this linear, with what to do."""
    return scheme_fault(scheme) or linear_fault(scheme, linear)


def scheme_fault(scheme: Scheme) -> str | None:
    """Why no linear of this scheme can be stored."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        found = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = "format dense to study it" if scheme.kind == "int" else "format bitsandbytes"
        return f"vLLM and SGLang read GPTQ with 4-bit or 8-bit integers, found {found}; use {use}"
    if not scheme.symmetric:
        return (
            "vLLM and SGLang read GPTQ without zero points, and its files cannot hold the zero point 0, found "
            "symmetric: false; use symmetric: true, or format awq for zero points"
        )
    if scheme.group_size not in GROUP_SIZES:
        return f"the GPTQ kernels of vLLM and SGLang know group sizes 32, 64, 128 and -1, found {scheme.group_size}"
    if scheme.scale_dtype not in SCALE_DTYPES:
        return f"vLLM and SGLang hold GPTQ scales in 16 bits, found {scheme.scale_dtype}; use bfloat16 or float16"
    return None


def linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Why this linear cannot be stored in a scheme that others can."""
    count, last = per_word(scheme), linear.name.rpartition(".")[2]
    if linear.role in PROTECTED_ROLES:
        return f"vLLM and SGLang build this {linear.role.replace('_', ' ')} without GPTQ and find no weight; keep it"
    if last in MLA:
        return f"SGLang reads {last} wrongly from GPTQ files; keep it, or use format awq"
    if linear.out_features % count or linear.in_features % count:
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill GPTQ's words of {count} codes in any "
            "engine; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return f"no engine loads GPTQ with group_size {scheme.group_size} over {linear.in_features} input features"
    return None


def layout(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """qweight, qzeros, scales and g_idx of one linear, with full names."""
    width, out, count = linear.in_features, linear.out_features, per_word(scheme)
    groups, dtype = scheme.groups(width), SCALE_DTYPES[scheme.scale_dtype]
    return (
        TensorSpec(name=f"{linear.name}.qweight", dtype="I32", shape=(width // count, out)),
        TensorSpec(name=f"{linear.name}.qzeros", dtype="I32", shape=(groups, out // count)),
        TensorSpec(name=f"{linear.name}.scales", dtype=dtype, shape=(groups, out)),
        TensorSpec(name=f"{linear.name}.g_idx", dtype="I32", shape=(width,)),
    )


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Symmetric codes [out, in] and scale [out, n_groups] -> local names.

    Raises NumericsError when a code does not fit, UsageError for a matrix with zero points.
    """
    import torch  # starts when there is something to store

    from quantkit.numerics import affine, words

    if quantized.zero is not None:
        raise UsageError("format gptq: stores no zero points, found an asymmetric matrix; use symmetric: true")
    width = quantized.codes.shape[1]
    zero = torch.full_like(quantized.scale.T, affine.middle(scheme) - 1, dtype=torch.int32)  # [n_groups, out]
    group = width if scheme.group_size == -1 else scheme.group_size
    return {
        "qweight": words.pack(quantized.codes.T, scheme.bits, axis=0),  # [out, in] -> [in / per_word, out]
        "qzeros": words.pack(zero, scheme.bits, axis=1),  # [n_groups, out] -> [n_groups, out / per_word]
        "scales": quantized.scale.T.contiguous(),  # [out, n_groups] -> [n_groups, out]
        "g_idx": torch.arange(width, dtype=torch.int32, device=quantized.codes.device) // group,
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """qweight and scales -> the weight [out, in] float32; qzeros and g_idx say what symmetric schemes imply."""
    from quantkit.numerics import affine, words

    stored = Quantized(
        codes=words.unpack(tensors["qweight"], scheme.bits, axis=0).T,  # [in / per_word, out] -> [out, in]
        scale=tensors["scales"].T,  # [n_groups, out] -> [out, n_groups]
        zero=None,
    )
    return affine.dequantize(stored, scheme)


def quantization_config(contents: Contents) -> dict[str, object]:
    """The entry for config.json. `dynamic` is what SGLang and GPTQModel read, the module list what transformers does.

    vLLM reads both. UsageError when several schemes are asked for.
    """
    found = {(scheme.bits, scheme.group_size) for scheme in contents.schemes.values()}
    if len(found) != 1:
        told = ", ".join(f"{bits} bits group {group}" for bits, group in sorted(found))
        raise UsageError(f"format gptq: config.json has room for one scheme, found {told}; use one for all rules")
    ((bits, group_size),) = found
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in kept_patterns(list(contents.schemes), contents.kept)},
        "modules_in_block_to_quantize": [quantized_suffixes(list(contents.schemes), contents.kept)],
    }


def quantized_suffixes(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Names within a block that mean the quantized modules and no kept one; full names where blocks differ.

    transformers asks whether a module's name ends with an entry, vLLM whether it contains one.
    """
    others = lines(engine_names(kept))
    found: dict[str, None] = {}
    clear: dict[str, bool] = {}
    for name in quantized:
        suffix = split_layer(name)[2].removeprefix(".") or name
        if suffix not in clear:
            clear[suffix] = suffix not in others
        found[suffix if clear[suffix] else name] = None
    return list(found)


FORMAT = Format(
    accepts=accepts,
    layout=layout,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=True,
    engines={
        "vLLM": "vllm serve {path}",
        "SGLang": "python -m sglang.launch_server --model-path {path}",
    },
)
