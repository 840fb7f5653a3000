"""GPTQ "v1": symmetric codes of 4 or 8 bits packed as AutoGPTQ does (formats/README.md).

The tensors of `gptq_tensors`, with zero points stored minus one; readers add the 1. Symmetric only:
vLLM and SGLang read nothing else, and zero - 1 cannot store the zero point 0, which a group of
positive weights needs. Format gptq_v2 stores asymmetric codes, for fewer engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import PROTECTED_ROLES, Contents, Format, Linear, Quantized, Scheme
from quantkit.errors import UsageError
from quantkit.formats.common import gptq_tensors
from quantkit.formats.common.engine_names import SERVERS
from quantkit.formats.common.packed import (
    GROUP_SIZES,
    OWN_FORMATS,
    SCALE_DTYPES,
    SERVED_BITS,
)
from quantkit.numerics.bitpack import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return the first reason why engines could not load this linear, with what to do, or None."""
    return find_scheme_fault(scheme) or find_linear_fault(scheme, linear)


def find_scheme_fault(scheme: Scheme) -> str | None:
    """Return why no linear of this scheme can be stored, or None."""
    if scheme.kind != "int" or scheme.bits not in SERVED_BITS:
        kind = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = OWN_FORMATS.get(scheme.kind) or (
            "gptq_v2" if scheme.bits < 4 else "compressed_tensors"
        )
        return (
            f"vLLM and SGLang read GPTQ with 4-bit or 8-bit integers, found {kind}; use format "
            f"{use}"
        )
    if not scheme.symmetric:
        return (
            "vLLM and SGLang read GPTQ without zero points, and its files cannot hold the zero "
            "point 0, found symmetric: false; use symmetric: true, format awq, or format gptq_v2"
        )
    if scheme.group_size not in GROUP_SIZES:
        return (
            "the GPTQ kernels of vLLM and SGLang support group sizes 32, 64, 128 and -1, "
            f"found {scheme.group_size}"
        )
    if scheme.scale_dtype not in SCALE_DTYPES:
        return (
            f"vLLM and SGLang hold GPTQ scales in 16 bits, found {scheme.scale_dtype}; use "
            "bfloat16 or float16"
        )
    return None


def find_linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Return why this linear cannot be stored in a supported scheme, or None."""
    count, last = count_codes_per_run(scheme.bits), linear.name.rpartition(".")[2]
    if linear.role in PROTECTED_ROLES:
        return (
            f"vLLM and SGLang build this {linear.role.replace('_', ' ')} without GPTQ and find no "
            "weight; keep it"
        )
    if last in gptq_tensors.MLA_PROJECTIONS:
        return f"SGLang reads {last} wrongly from GPTQ files; keep it, or use format awq"
    if linear.out_features % count or linear.in_features % count:
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill GPTQ's words of "
            f"{count} codes in any engine; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            f"no engine loads GPTQ with group_size {scheme.group_size} over {linear.in_features} "
            "input features"
        )
    return None


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Pack symmetric codes [out, in] and scale [out, n_groups]; return tensors by local name.

    Raises NumericsError if a code does not fit, UsageError for a matrix with zero points.
    """
    if quantized.zero is not None:
        raise UsageError(
            "format gptq: expected no zero points, found an asymmetric matrix; use symmetric: "
            "true, or format gptq_v2"
        )
    return gptq_tensors.pack(quantized, scheme, zero_offset=1)


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 of qweight and scales.

    qzeros and g_idx only repeat what symmetric schemes imply.
    """
    return gptq_tensors.dequantize(tensors, scheme, zero_offset=1)


def make_quantization_config(contents: Contents) -> dict[str, object]:
    """Return the entry for config.json."""
    return gptq_tensors.make_quantization_config(contents, "gptq")


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load an artifact of these linears, with the reason."""
    return {
        engine: reason
        for engine, reason in gptq_tensors.find_engine_limits(model_type, schemes, kept).items()
        if engine in SERVERS
    }


CHECKS = gptq_tensors.make_checks(zero_offset=1)

FORMAT = Format(
    accepts=find_rejection,
    layout=gptq_tensors.list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    quant_method=gptq_tensors.QUANT_METHOD,
    one_scheme=False,
    engines=SERVERS,
    limits=find_engine_limits,
)
