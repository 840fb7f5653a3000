"""Dense: the dequantized weight as an ordinary BF16 `weight`, which every engine loads.

It saves no memory. It measures the loss of schemes that no packed format stores, with any engine
and any benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from quantkit.contracts import Contents, Format, Linear, Quantized, Scheme, TensorSpec
from quantkit.formats.common.checks import FINITE, FormatChecks
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS
from quantkit.formats.common.packed import OWN_FORMATS

if TYPE_CHECKING:
    from torch import Tensor


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return None for whole groups of integer codes, any bits and any role, else the reason."""
    if scheme.kind != "int":
        own = OWN_FORMATS[scheme.kind]
        return f"format dense stores integer schemes, found {scheme.kind}; use format {own}"
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return f"group_size {scheme.group_size} does not divide {linear.in_features} input features"
    return None


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the spec of one BF16 tensor, `weight` [out, in]."""
    shape = (linear.out_features, linear.in_features)
    return (TensorSpec(name=f"{linear.name}.weight", dtype="BF16", shape=shape),)


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Return the dequantized weight of the codes [out, in], rounded to bfloat16 once more."""
    from quantkit.numerics import affine  # imports torch; plans use this module without it

    return {"weight": affine.dequantize(quantized, scheme).bfloat16()}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the stored weight as float32 [out, in]."""
    return tensors["weight"].float()


def make_quantization_config(contents: Contents) -> None:
    """Return None: engines see an unquantized checkpoint."""


def read_shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """Return [out, in] from the spec of a linear's weight."""
    sizes = specs["weight"].shape if "weight" in specs else ()
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


CHECKS = FormatChecks(read_shape=read_shape, value_checks=lambda linear, scheme: {"weight": FINITE})

FORMAT = Format(
    accepts=find_rejection,
    layout=list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    one_scheme=False,
    holds_codes=False,
    ordinary=True,
    engines={**SERVERS, **TRANSFORMERS},
)
