"""GPTQ "v2": unmodified zero points, thus asymmetric codes too (formats/README.md).

The tensors of `gptq_tensors`, with 2, 3, 4 or 8 bits. GPTQModel reads all of it, and transformers
through it for dense models; llama.cpp converts all but 3 bits. vLLM and SGLang ignore the version:
they load symmetric codes of 4 and 8 bits, whose zero points they do not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import PROTECTED_ROLES, Contents, Format, Linear, Quantized, Scheme
from quantkit.formats.common import gptq_tensors
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS
from quantkit.formats.common.packed import (
    OWN_FORMATS,
    SCALE_DTYPES,
    SERVED_BITS,
    check_zero_points,
)
from quantkit.numerics.bitpack import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return the first reason why GPTQModel could not load this linear, or None."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        kind = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = (
            "format compressed_tensors, which holds 2 to 8 bits"
            if scheme.kind == "int"
            else f"format {OWN_FORMATS[scheme.kind]}"
        )
        return f"GPTQModel reads GPTQ with 2, 3, 4 or 8 bits, found {kind}; use {use}"
    if scheme.scale_dtype not in SCALE_DTYPES:
        return (
            f"GPTQModel holds GPTQ scales in 16 bits, found {scheme.scale_dtype}; use bfloat16 or "
            "float16"
        )
    if linear.role in PROTECTED_ROLES:
        return (
            f"GPTQModel builds this {linear.role.replace('_', ' ')} without GPTQ and finds no "
            "weight; keep it"
        )
    run = count_codes_per_run(scheme.bits)
    if linear.out_features % run or linear.in_features % run:
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill the words that "
            f"GPTQModel reads, {run} codes at a time; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            f"GPTQModel loads no group_size {scheme.group_size} over {linear.in_features} input "
            "features"
        )
    return None


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load an artifact of these linears, with the reason."""
    reasons = gptq_tensors.find_engine_limits(model_type, schemes, kept)
    used = set(schemes.values())
    if not all(scheme.symmetric and scheme.bits in SERVED_BITS for scheme in used):
        reasons |= dict.fromkeys(
            ("vLLM", "SGLang"), "GPTQ with symmetric codes of 4 or 8 bits only"
        )
    elif any(linear.name.endswith(gptq_tensors.MLA_PROJECTIONS) for linear in schemes):
        reasons["SGLang"] = "no multi-head latent attention in GPTQ"
    if any(scheme.bits == 3 for scheme in used):
        reasons["llama.cpp"] = "no GPTQ of 3 bits"
    if any(linear.role == "routed_expert" for linear in schemes):
        reasons["transformers"] = "no loader for routed experts in GPTQ; GPTQModel.load has one"
    return reasons


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Pack codes [out, in], scale and zero [out, n_groups]; return tensors by local name.

    Raises NumericsError if a code does not fit, UsageError if zero points contradict the scheme.
    """
    check_zero_points(quantized, scheme, "gptq_v2")
    return gptq_tensors.pack(quantized, scheme, zero_offset=0)


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 of the tensors of `pack`."""
    return gptq_tensors.dequantize(tensors, scheme, zero_offset=0)


def make_quantization_config(contents: Contents) -> dict[str, object]:
    """Return the entry for config.json."""
    return gptq_tensors.make_quantization_config(contents, "gptq_v2")


CHECKS = gptq_tensors.make_checks(zero_offset=0)

FORMAT = Format(
    accepts=find_rejection,
    layout=gptq_tensors.list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    quant_method=gptq_tensors.QUANT_METHOD,
    one_scheme=False,
    engines={
        **SERVERS,
        **TRANSFORMERS,
        "GPTQModel": 'python -ic "from gptqmodel import GPTQModel; model = '
        "GPTQModel.load('{path}')\"",
        "llama.cpp": "python convert_hf_to_gguf.py {path}",
    },
    limits=find_engine_limits,
)
