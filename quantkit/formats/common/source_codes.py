"""Codes of compressed-tensors other than packed integers: FP8 and INT8 with one scale per row,
MXFP4 and NVFP4 (formats/README.md).

    fp8    weight [out, in] float8_e4m3fn, weight_scale [out, 1]                float-quantized
    int8   weight [out, in] int8,          weight_scale [out, 1]                int-quantized
    mxfp4  weight_packed [out, in / 2] uint8, weight_scale [out, in / 32] E8M0  mxfp4-pack-quantized
    nvfp4  weight_packed [out, in / 2] uint8, weight_scale [out, in / 16] float8_e4m3fn,
           weight_global_scale [1] float32                                      nvfp4-pack-quantized

A build makes MXFP4 and NVFP4 itself (numerics/fp4.py), and copies codes of each kind that a source
stores in this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.contracts import PROTECTED_ROLES, Linear, Quantized, Scheme, TensorSpec
from quantkit.dtypes import FLOAT_NAMES
from quantkit.formats.common.checks import FINITE, MAGNITUDE, SCALE, ValueCheck

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8 = "F8_E4M3"
_DYNAMIC = {"strategy": "token", "symmetric": True, "dynamic": True}


@dataclass(frozen=True, kw_only=True)
class SourceCodes:
    """One kind of codes: its format in compressed-tensors, and the arguments of a config group.

    codes: dtype of the codes, a byte each or two in a byte (`is_packed`); inputs: how engines round
    the inputs; None: not at all.
    """

    format: str
    weights: Mapping[str, object]
    codes: str
    is_packed: bool
    inputs: Mapping[str, object] | None = None


KINDS: Mapping[str, SourceCodes] = {
    "fp8": SourceCodes(
        format="float-quantized",
        weights={"num_bits": 8, "type": "float", "strategy": "channel"},
        codes=FLOAT8,
        is_packed=False,
        inputs={"num_bits": 8, "type": "float", **_DYNAMIC},
    ),
    "int8": SourceCodes(
        format="int-quantized",
        weights={"num_bits": 8, "type": "int", "strategy": "channel"},
        codes="I8",
        is_packed=False,
        inputs={"num_bits": 8, "type": "int", **_DYNAMIC},
    ),
    "mxfp4": SourceCodes(
        format="mxfp4-pack-quantized",
        weights={
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
        },
        codes="U8",
        is_packed=True,
    ),
    "nvfp4": SourceCodes(
        format="nvfp4-pack-quantized",
        weights={
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        codes="U8",
        is_packed=True,
    ),
}
"""Kind of a scheme -> its codes."""


def find_rejection(linear: Linear) -> str | None:
    """Return why engines could not load this linear in such codes, with what to do, or None."""
    if linear.role in PROTECTED_ROLES:
        return f"vLLM and SGLang build this {linear.role.replace('_', ' ')} without codes; keep it"
    if linear.name.endswith(".kv_b_proj"):
        return "SGLang looks for kv_b_proj's plain weight in compressed-tensors files; keep it"
    return None


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the specs of one linear's tensors, with full names."""
    kind, out, groups = KINDS[scheme.kind], linear.out_features, scheme.groups(linear.in_features)
    name = f"{linear.name}.weight"
    width = linear.in_features // 2 if kind.is_packed else linear.in_features
    own = f"{name}_packed" if kind.is_packed else name
    dtype = {"mxfp4": "U8", "nvfp4": FLOAT8}.get(scheme.kind) or FLOAT_NAMES[scheme.scale_dtype]
    shared = TensorSpec(name=f"{name}_global_scale", dtype="F32", shape=(1,))
    return (
        TensorSpec(name=own, dtype=kind.codes, shape=(out, width)),
        TensorSpec(name=f"{name}_scale", dtype=dtype, shape=(out, groups)),
        *((shared,) if scheme.kind == "nvfp4" else ()),
    )


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of FP4 codes [out, in] by local name; the first code is in the low bits.

    Raises NumericsError if a code does not fit 4 bits.
    """
    from quantkit.errors import NumericsError
    from quantkit.numerics.microscaling import pack_e2m1

    if quantized.codes.numel() and int(quantized.codes.max()) > 15:
        raise NumericsError(
            f"{scheme.kind} codes: expected 0 to 15, found {int(quantized.codes.max())}; the "
            "method and the scheme must agree"
        )
    shared = quantized.global_scale
    return {
        "weight_packed": pack_e2m1(quantized.codes),  # [out, in] -> [out, in / 2]
        "weight_scale": quantized.scale.contiguous(),
        **({} if shared is None else {"weight_global_scale": shared.reshape(1)}),
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 of a linear's tensors by local name."""
    from quantkit.numerics.groups import multiply_groups
    from quantkit.numerics.microscaling import decode_scale, unpack_e2m1

    scale = decode_scale(tensors["weight_scale"])  # [out, n_groups]
    if scheme.kind == "nvfp4":
        scale = scale / tensors["weight_global_scale"].float()
    if KINDS[scheme.kind].is_packed:
        return multiply_groups(unpack_e2m1(tensors["weight_packed"]), scale)
    return multiply_groups(tensors["weight"].float(), scale)


def read_shape(specs: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[int, int] | None:
    """Return [out, in] from the specs of a linear's tensors by local name."""
    is_packed = KINDS[scheme.kind].is_packed
    codes = specs.get("weight_packed" if is_packed else "weight")
    return None if codes is None else (codes.shape[0], codes.shape[-1] * (1 + is_packed))


def list_value_checks(scheme: Scheme) -> dict[str, ValueCheck]:
    """Return the checks of a linear's tensors by local name; any integer is a code."""
    if scheme.kind == "nvfp4":
        return {"weight_scale": MAGNITUDE, "weight_global_scale": SCALE}
    if scheme.kind == "mxfp4":
        return {}
    return {"weight_scale": MAGNITUDE, **({"weight": FINITE} if scheme.kind == "fp8" else {})}


def make_group(kind: str, targets: list[str]) -> dict[str, object]:
    """Return the group of config_groups for these targets."""
    codes = KINDS[kind]
    return {
        "format": codes.format,
        "targets": targets,
        "weights": {**codes.weights, "symmetric": True, "dynamic": False},
        "input_activations": None if codes.inputs is None else dict(codes.inputs),
        "output_activations": None,
    }


def find_kind(group: Mapping[str, object]) -> str | None:
    """Return the kind of codes of a group of config_groups; None for integers of quantkit's own and
    for FP8 blocks.
    """
    weights = group.get("weights")
    is_block = isinstance(weights, Mapping) and weights.get("strategy") == "block"
    kinds = (kind for kind, codes in KINDS.items() if codes.format == group.get("format"))
    return None if is_block else next(kinds, None)
