"""GPTQ "v2": zero points as they are, so asymmetric codes too, of 2, 3, 4 or 8 bits (FORMATS.md, 2).

The tensors are those of `gptq_tensors`. GPTQModel reads all of it, and through it transformers, dense models only;
llama.cpp converts all but 3 bits. vLLM and SGLang do not look at the version: they load symmetric codes of 4 and 8
bits, whose zero points they do not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import PROTECTED_ROLES, Contents, Format, Linear, Quantized, Scheme
from quantkit.formats.common import gptq_tensors
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS
from quantkit.formats.common.packed import SCALE_DTYPES, SERVED_BITS, require_agreement
from quantkit.numerics.runs import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None, or the first reason why GPTQModel could not load this linear, with what to do."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        found = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = (
            "format compressed_tensors, which holds 2 to 8 bits"
            if scheme.kind == "int"
            else "format bitsandbytes"
        )
        return f"GPTQModel reads GPTQ with 2, 3, 4 or 8 bits, found {found}; use {use}"
    if scheme.scale_dtype not in SCALE_DTYPES:
        return f"GPTQModel holds GPTQ scales in 16 bits, found {scheme.scale_dtype}; use bfloat16 or float16"
    if linear.role in PROTECTED_ROLES:
        return f"GPTQModel builds this {linear.role.replace('_', ' ')} without GPTQ and finds no weight; keep it"
    run = count_codes_per_run(scheme.bits)
    if linear.out_features % run or linear.in_features % run:
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill the words that GPTQModel reads, {run} "
            "codes at a time; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return f"GPTQModel loads no group_size {scheme.group_size} over {linear.in_features} input features"
    return None


def limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Engines that do not load an artifact of these linears, and why."""
    found, used = gptq_tensors.limits(model_type, schemes, kept), set(schemes.values())
    if not all(scheme.symmetric and scheme.bits in SERVED_BITS for scheme in used):
        found |= dict.fromkeys(("vLLM", "SGLang"), "no GPTQ but symmetric codes of 4 or 8 bits")
    elif any(linear.name.endswith(gptq_tensors.MLA) for linear in schemes):
        found["SGLang"] = "no multi-head latent attention in GPTQ"
    if any(scheme.bits == 3 for scheme in used):
        found["llama.cpp"] = "no GPTQ of 3 bits"
    if any(linear.role == "routed_expert" for linear in schemes):
        found["transformers"] = "no loader for routed experts in GPTQ; GPTQModel.load has one"
    return found


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """codes [out, in], scale and zero [out, n_groups] -> local names.

    Raises NumericsError when a code does not fit, UsageError when zero points and scheme.symmetric contradict.
    """
    require_agreement(quantized, scheme, "gptq_v2")
    return gptq_tensors.pack(quantized, scheme, less=0)


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The tensors of `pack` -> the weight [out, in] float32."""
    return gptq_tensors.dequantize(tensors, scheme, less=0)


def quantization_config(contents: Contents) -> dict[str, object]:
    """The entry for config.json."""
    return gptq_tensors.quantization_config(contents, "gptq_v2")


CHECKS = gptq_tensors.checks(less=0)

FORMAT = Format(
    accepts=accepts,
    layout=gptq_tensors.layout,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=False,
    engines={
        **SERVERS,
        **TRANSFORMERS,
        "GPTQModel": "python -ic \"from gptqmodel import GPTQModel; model = GPTQModel.load('{path}')\"",
        "llama.cpp": "python convert_hf_to_gguf.py {path}",
    },
    limits=limits,
)
