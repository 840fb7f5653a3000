"""Dense: the dequantized weight as an ordinary BF16 `weight`, in a checkpoint that every engine loads.

It saves nothing. It is for measuring what a scheme costs that no packed format stores (3 bits, say), with any engine
and any benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from quantkit.contracts import Contents, Format, Linear, Quantized, Scheme, TensorSpec
from quantkit.formats.common.checks import FINITE, FormatChecks
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS

if TYPE_CHECKING:
    from torch import Tensor


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None for whole groups of integer codes, any bits, any role; else one sentence why not."""
    if scheme.kind != "int":
        return f"format dense stores integer schemes, found {scheme.kind}; use format bitsandbytes"
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return f"group_size {scheme.group_size} does not divide {linear.in_features} input features"
    return None


def layout(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """One BF16 tensor, `weight` [out, in]."""
    shape = (linear.out_features, linear.in_features)
    return (TensorSpec(name=f"{linear.name}.weight", dtype="BF16", shape=shape),)


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """The weight that the codes [out, in] stand for, rounded to bfloat16 once more."""
    from quantkit.numerics import affine  # torch starts when there is something to store

    return {"weight": affine.dequantize(quantized, scheme).bfloat16()}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The stored weight as float32 [out, in]."""
    return tensors["weight"].float()


def quantization_config(contents: Contents) -> None:
    """None: engines see an unquantized checkpoint."""


def shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """[out, in] by the spec of a linear's weight."""
    found = specs["weight"].shape if "weight" in specs else ()
    return (found[0], found[1]) if len(found) == 2 else None


CHECKS = FormatChecks(shape=shape, numbers=lambda linear, scheme: {"weight": FINITE})

FORMAT = Format(
    accepts=accepts,
    layout=layout,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=False,
    holds_codes=False,
    ordinary=True,
    engines={**SERVERS, **TRANSFORMERS},
)
