"""Weights in source encodings, as their owners store them, and the owners' own dequantization.

compressed-tensors and transformers encode and decode where they can; the other references are slow
loops that share no code with quantkit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from support.checkpoints import quantize_to_fp8
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Encode = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""Weight [out, in] float32 -> stored tensors by local name, and the dequantized weight."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An encoding: how a weight is stored, the config's entry, and its label in a plan."""

    encode: Encode
    config: Mapping[str, object]
    label: str
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # unused tensors next to each weight


# ------------------------------------------------------------------------------- compressed-tensors


def make_scheme(
    inputs: Mapping[str, object] | None = None, **arguments: object
) -> QuantizationScheme:
    """Return a compressed-tensors scheme of weights."""
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**arguments),  # type: ignore[arg-type]
        input_activations=QuantizationArgs(**inputs) if inputs else None,  # type: ignore[arg-type]
    )


def make_entry(name: str, **arguments: object) -> dict[str, object]:
    """Return the quantization_config of compressed-tensors."""
    weights = {"dynamic": False, "symmetric": True, **arguments}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def compute_qparams(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scale and signed zero point [out, n_groups] of groups of columns."""
    groups = weight.unflatten(-1, (-1, group))  # [out, in] -> [out, n_groups, group]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scale = 2 * torch.maximum(-low, high) / (2**bits - 1)
        return scale.bfloat16(), torch.zeros_like(scale, dtype=torch.int8)
    scale = ((high - low) / (2**bits - 1)).bfloat16()
    zero = torch.round(-low / scale.float()).clamp(0, 2**bits - 1) - 2 ** (bits - 1)
    return scale, zero.to(torch.int8)


def encode_packed(bits: int, group: int, symmetric: bool = True) -> Encode:
    """Return the pack-quantized encoder."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scheme = make_scheme(
            num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
        )
        scale, zero = compute_qparams(weight, bits, group, symmetric)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = PackedQuantizationCompressor.compress(state, scheme)
        return stored, PackedQuantizationCompressor.decompress(stored, scheme)["weight"]

    return encode


def encode_packed_g_idx(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store a weight with its columns in groups of a random order, as actorder "group" did."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    scale, _ = compute_qparams(weight[:, order], 4, 32, symmetric=True)
    group = torch.argsort(order) // 32
    factors = scale.float()[:, group]  # [out, n_groups] -> [out, in]
    codes = torch.round(weight / factors).clamp(-8, 7)
    stored = {
        "weight_packed": pack_to_int32(codes.to(torch.int8), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": group.to(torch.int32),
    }
    return stored, (codes.to(torch.int8).float() * factors).bfloat16()


def encode_naive(
    kind: str, strategy: str, *, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> Encode:
    """Return the encoder of float-quantized or int-quantized: one value per byte."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        block = {"block_structure": [128, 128]} if strategy == "block" else {}
        scheme = make_scheme(num_bits=8, type=kind, strategy=strategy, symmetric=symmetric, **block)
        zero = None
        if strategy == "block":
            scale = quantize_to_fp8(weight)[1]
        elif not symmetric:
            scale, zero = compute_qparams(weight, 8, weight.shape[1], symmetric=False)
        else:
            largest = (
                weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax()
            )
            scale = (largest / (448 if kind == "float" else 127)).reshape(
                -1, *[1] * (strategy == "channel")
            )
        scale = scale.to(scale_dtype)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = NaiveQuantizationCompressor.compress(
            {name: part for name, part in state.items() if part is not None}, scheme
        )
        return stored, NaiveQuantizationCompressor.decompress(stored, scheme)["weight"].bfloat16()

    return encode


# ------------------------------------------------------------------------------ FP8 of other owners


def encode_fp8_blocks_e8m0(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store FP8 128x128 with power-of-two scales of dtype F8_E8M0 (ue8m0)."""
    _, scale = quantize_to_fp8(weight)
    power = torch.exp2(torch.ceil(torch.log2(scale)))
    full = power.repeat_interleave(128, 0)[: weight.shape[0]]
    full = full.repeat_interleave(128, 1)[:, : weight.shape[1]]
    codes = (weight / full).to(torch.float8_e4m3fn)
    expected = (codes.double() * full.double()).bfloat16()
    return {"weight": codes, "weight_scale_inv": power.to(torch.float8_e8m0fnu)}, expected


def encode_fp8(ending: str, per_row: bool, dtype: torch.dtype, ndim: int) -> Encode:
    """Return the encoder of FP8 with one scale per tensor or row, decoded by transformers."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = (
            weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax().reshape(1, 1)
        )
        scale = (largest / 448).to(dtype)
        codes = (weight / scale.float()).to(torch.float8_e4m3fn)
        expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
        shape = (scale.numel(), 1)[:ndim] if per_row else (1,) * ndim
        return {"weight": codes, ending: scale.reshape(shape)}, expected

    return encode


# ---------------------------------------------------------------------------------------------- FP4


def round_to_fp4(values: Tensor) -> Tensor:
    """Return the nearest FP4 codes of float32 values, by distance to all sixteen."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return (values.unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)


def encode_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes [out, in / 2] and E8M0 bytes [out, in / 32]."""
    groups = weight.unflatten(-1, (-1, 32))  # [out, in] -> [out, n_groups, 32]
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    codes = round_to_fp4(groups / torch.exp2(exponent).unsqueeze(-1)).flatten(-2)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed, (exponent + 127).to(torch.uint8)


def encode_mxfp4_compressed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store mxfp4-pack-quantized, decoded by compressed-tensors."""
    packed, scale = encode_mxfp4(weight)
    stored = {"weight_packed": packed, "weight_scale": scale}
    scheme = make_scheme(num_bits=4, type="float", strategy="group", group_size=32)
    return stored, MXFP4PackedCompressor.decompress(stored, scheme)["weight"].bfloat16()


def encode_mxfp4_deepseek(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store the experts' form of DeepSeek-V4, decoded by transformers."""
    packed, scale = encode_mxfp4(weight)
    stored = {"weight": packed.view(torch.int8), "scale": scale.view(torch.float8_e8m0fnu)}
    expected = Fp8Dequantize(None)._dequantize_one(
        stored["weight"], stored["scale"], torch.bfloat16
    )
    return stored, expected


def encode_nvfp4(is_modelopt: bool) -> Encode:
    """Return the NVFP4 encoder of modelopt or compressed-tensors."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.unflatten(-1, (-1, 16))  # [out, in] -> [out, n_groups, 16]
        factor = weight.abs().amax() / (448 * 6)
        scale = (groups.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)
        codes = round_to_fp4(groups / (scale.float() * factor).unsqueeze(-1)).flatten(-2)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        if not is_modelopt:
            stored = {
                "weight_packed": packed,
                "weight_scale": scale,
                "weight_global_scale": 1 / factor.reshape(1),
            }
            scheme = make_scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16)
            return stored, NVFP4PackedCompressor.decompress(stored, scheme)["weight"].bfloat16()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        per_value = (scale.float() * factor).repeat_interleave(16, 1)
        expected = (table[codes.long()] * per_value).bfloat16()
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": factor}, expected

    return encode


# ----------------------------------------------------------------------------------- AWQ, GPTQ, NF4


def pack_slow(codes: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack the last axis into int32 words, bit by bit."""
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        if order is not None:
            size = len(order)
            row = [row[start + slot] for start in range(0, len(row), size) for slot in order]
        number = sum(code << bits * place for place, code in enumerate(row))
        words = [number >> 32 * word & 0xFFFFFFFF for word in range(len(row) * bits // 32)]
        rows.append([word - (word >> 31 << 32) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def quantize_slow(
    weight: Tensor, bits: int, group: Tensor, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes [out, in], scale and zero point [out, n_groups], and the float16 weight.

    group [in]: that of each column.
    """
    largest = 2**bits - 1
    n_groups = int(group.max()) + 1
    members = [group == g for g in range(n_groups)]
    low = torch.stack([weight[:, own].amin(1).clamp(max=0) for own in members], 1)
    high = torch.stack([weight[:, own].amax(1).clamp(min=0) for own in members], 1)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (width / largest).half()
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.float32)
    if not symmetric:
        zero = torch.round(-low / scale.float()).clamp(1, largest)
    factors, zeros = scale.float()[:, group], zero[:, group]
    codes = (torch.round(weight / factors) + zeros).clamp(0, largest)
    expected = ((codes.double() - zeros.double()) * factors.double()).half()
    return codes.to(torch.uint8), scale, zero.to(torch.uint8), expected


def encode_awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store AutoAWQ's gemm layout."""
    group = torch.arange(weight.shape[1]) // 32
    codes, scale, zero, expected = quantize_slow(weight, 4, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": pack_slow(codes.T, 4, order),
        "qzeros": pack_slow(zero.T, 4, order),
        "scales": scale.T,
    }
    return stored, expected


def encode_gptq(bits: int, *, v2: bool = False, act_order: bool = False) -> Encode:
    """Return the encoder of GPTQ in the form gptq or gptq_v2."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        group = torch.arange(weight.shape[1]) // 32
        if act_order:
            group = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(2))]
        codes, scale, zero, expected = quantize_slow(weight, bits, group)
        stored = {
            "qweight": pack_slow(codes, bits).T,
            "qzeros": pack_slow(zero.T - (0 if v2 else 1), bits),
            "scales": scale.T,
        }
        return {**stored, **({"g_idx": group.to(torch.int32)} if act_order else {})}, expected

    return encode


def encode_llm_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Store LLM.int8, decoded by bitsandbytes."""
    largest = weight.abs().amax(1)
    codes = torch.round(weight / largest[:, None] * 127).to(torch.int8)
    decode = import_module("bitsandbytes.functional").int8_vectorwise_dequant
    return {"weight": codes, "SCB": largest}, decode(codes, largest).bfloat16()


def encode_nf4(double: bool) -> Encode:
    """Return bitsandbytes' NF4 encoder, decoded by bitsandbytes."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        functional = import_module("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(
            weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=double
        )
        parts = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}, functional.dequantize_4bit(packed, state)

    return encode


EXAMPLES: Mapping[str, Example] = {
    "fp8-blocks-ue8m0": Example(
        encode=encode_fp8_blocks_e8m0,
        config={
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
        },
        label="FP8 128x128 E8M0",
    ),
    "fp8-tensor-mistral": Example(
        encode=encode_fp8("weight_scale_inv", False, torch.bfloat16, 0),
        config={
            "quant_method": "fp8",
            "weight_block_size": None,
            "activation_scheme": "static",
            "modules_to_not_convert": ["lm_head"],
        },
        label="FP8 per tensor",
        extra={"activation_scale": torch.tensor(0.02)},
    ),
    "fp8-channel-fbgemm": Example(
        encode=encode_fp8("weight_scale", True, torch.float32, 2),
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        label="FP8 per channel",
        extra={"input_scale_ub": torch.tensor([1200.0])},
    ),
    "fp8-tensor-modelopt": Example(
        encode=encode_fp8("weight_scale", False, torch.float32, 0),
        config={
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_scheme": {"num_bits": 8},
        },
        label="FP8 per tensor",
        extra={"input_scale": torch.tensor(0.02)},
    ),
    "fp8-tensor-compressed": Example(
        encode=encode_naive("float", "tensor", scale_dtype=torch.bfloat16),
        config=make_entry("float-quantized", num_bits=8, type="float", strategy="tensor"),
        label="FP8 per tensor",
        extra={"input_scale": torch.tensor([0.02])},
    ),
    "fp8-channel-compressed": Example(
        encode=encode_naive("float", "channel"),
        config=make_entry("float-quantized", num_bits=8, type="float", strategy="channel"),
        label="FP8 per channel",
    ),
    "fp8-blocks-compressed": Example(
        encode=encode_naive("float", "block"),
        config=make_entry(
            "float-quantized",
            num_bits=8,
            type="float",
            strategy="block",
            block_structure=[128, 128],
        ),
        label="FP8 128x128",
    ),
    "int4-packed": Example(
        encode=encode_packed(4, 32),
        config=make_entry(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32
        ),
        label="INT4 g32 symmetric",
    ),
    "int4-packed-asymmetric": Example(
        encode=encode_packed(4, 64, symmetric=False),
        config=make_entry(
            "pack-quantized",
            num_bits=4,
            type="int",
            strategy="group",
            group_size=64,
            symmetric=False,
        ),
        label="INT4 g64 asymmetric",
    ),
    "int4-packed-g-idx": Example(
        encode=encode_packed_g_idx,
        config=make_entry(
            "pack-quantized",
            num_bits=4,
            type="int",
            strategy="group",
            group_size=32,
            actorder="group",
        ),
        label="INT4 g32 symmetric",
    ),
    "int3-packed": Example(
        encode=encode_packed(3, 64),
        config=make_entry(
            "pack-quantized", num_bits=3, type="int", strategy="group", group_size=64
        ),
        label="INT3 g64 symmetric",
    ),
    "int8-channel": Example(
        encode=encode_naive("int", "channel"),
        config=make_entry("int-quantized", num_bits=8, type="int", strategy="channel"),
        label="INT8 per row symmetric",
    ),
    "int8-channel-asymmetric": Example(
        encode=encode_naive("int", "channel", symmetric=False, scale_dtype=torch.bfloat16),
        config=make_entry(
            "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
        ),
        label="INT8 per row asymmetric",
    ),
    "llm-int8": Example(
        encode=encode_llm_int8,
        config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        label="LLM.int8 per row",
        extra={"weight_format": torch.tensor(0, dtype=torch.uint8)},
    ),
    "mxfp4-compressed": Example(
        encode=encode_mxfp4_compressed,
        config=make_entry(
            "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
        ),
        label="MXFP4 g32",
    ),
    "mxfp4-deepseek": Example(
        encode=encode_mxfp4_deepseek,
        config={"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        label="MXFP4 g32",
    ),
    "nvfp4-compressed": Example(
        encode=encode_nvfp4(is_modelopt=False),
        config=make_entry(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        label="NVFP4 g16",
        extra={"input_global_scale": torch.tensor([3.0])},
    ),
    "nvfp4-modelopt": Example(
        encode=encode_nvfp4(is_modelopt=True),
        config={"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        label="NVFP4 g16",
        extra={"input_scale": torch.tensor(0.01)},
    ),
    "awq": Example(
        encode=encode_awq,
        config={"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        label="AWQ INT4 g32",
    ),
    "gptq": Example(
        encode=encode_gptq(4),
        config={"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        label="GPTQ INT4 g32",
    ),
    "gptq-act-order-8": Example(
        encode=encode_gptq(8, act_order=True),
        config={"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True},
        label="GPTQ INT8 g32",
    ),
    "gptq-v2-3": Example(
        encode=encode_gptq(3, v2=True),
        config={"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"},
        label="GPTQ INT3 g32",
    ),
    "nf4": Example(
        encode=encode_nf4(double=False),
        config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        label="NF4 g64",
    ),
    "nf4-double": Example(
        encode=encode_nf4(double=True),
        config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        label="NF4 g64 double quant",
    ),
}


def write_encoded(plain: Path, folder: Path, decoded: Path, example: Example) -> None:
    """Write a checkpoint with the linears of its blocks in an encoding, and its decoded twin."""
    tensors = load_file(plain / "model.safetensors")
    stored, expected = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        expected[name] = stored[name] = tensor
        if name.endswith("proj.weight"):
            module = name.removesuffix(".weight")
            parts, expected[name] = example.encode(tensor.float())
            del stored[name]
            for local, part in {**parts, **example.extra}.items():
                stored[f"{module}.{local}"] = part.clone().contiguous()
    config = json.loads((plain / "config.json").read_text())
    if any(tensor.dtype == torch.float16 for tensor in expected.values()):
        config["torch_dtype"] = "float16"
        for content in (stored, expected):
            plain_names = [name for name, part in content.items() if part.dtype == torch.bfloat16]
            content |= {name: content[name].half() for name in plain_names}
    for target, content, entry in (
        (folder, stored, {"quantization_config": example.config}),
        (decoded, expected, {}),
    ):
        target.mkdir(parents=True)
        for path in plain.iterdir():
            if path.name not in ("model.safetensors", "config.json"):
                (target / path.name).write_bytes(path.read_bytes())
        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
        (target / "config.json").write_text(json.dumps({**config, **entry}))
