"""Dense weights of a quantized artifact of any tool, read from disk with safetensors and numpy
only.

An independent implementation of the formats' specifications that shares no code with quantkit, so
that measurements see the weights an engine would read. Formats: GPTQ (v1 and v2), AWQ gemm,
compressed-tensors pack-quantized (symmetric and asymmetric), bitsandbytes NF4 (with and without
double quantization). All weights are returned as float32 [out, in].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[np.generic]
Parts = Mapping[str, torch.Tensor]

IN_ORDER = [0, 1, 2, 3, 4, 5, 6, 7]
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Entry j is the slot of column j in an int32 word."""

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


def read_dense_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the model as float32 under its plain name, with quantized linears
    unpacked.
    """
    entry = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in sorted(stored.keys()):
                module, part = split_tensor_name(name)
                modules.setdefault(module, {})[part] = stored.get_tensor(name)
    weights: dict[str, torch.Tensor] = {}
    for module, parts in modules.items():
        unpack = next((unpack for part, unpack in UNPACKERS.items() if part in parts), None)
        if unpack is None:
            weights.update({f"{module}.{part}": tensor.float() for part, tensor in parts.items()})
        else:
            weights[f"{module}.weight"] = torch.from_numpy(
                np.ascontiguousarray(unpack(parts, entry), dtype=np.float32)
            )
    return weights


def split_tensor_name(name: str) -> tuple[str, str]:
    """Split a tensor name into (module, part); bitsandbytes' parts follow `weight.`."""
    module, separator, part = name.partition(".weight.")
    if separator:
        return module, f"weight.{part}"
    module, _, part = name.rpartition(".")
    return module, part


def unpack_nibbles(words: torch.Tensor, order: list[int]) -> Array:
    """Unpack int32 words [rows, n] to 4-bit codes [rows, 8 n], the first from slot order[0]."""
    bits = words.numpy().view(np.uint32)
    slots = np.stack(
        [(bits >> np.uint32(4 * slot)) & 15 for slot in order], axis=-1
    )  # [rows, n] -> [rows, n, 8]
    return slots.reshape(len(bits), -1).astype(np.int32)  # [rows, n, 8] -> [rows, 8 n]


def unpack_gptq(parts: Parts, entry: Mapping[str, object]) -> Array:
    """Unpack GPTQ: words along the input, (q - z) * s, each input's group in g_idx; v1 stores z -
    1.
    """
    codes = unpack_nibbles(
        parts["qweight"].T.contiguous(), IN_ORDER
    ).T  # [in / 8, out] -> [in, out]
    zeros = unpack_nibbles(parts["qzeros"], IN_ORDER)  # [groups, out]
    if entry.get("checkpoint_format", entry.get("format", "gptq")) != "gptq_v2":
        zeros = (zeros + 1) & 15
    group = parts["g_idx"].numpy()
    return (
        (codes - zeros[group]) * parts["scales"].float().numpy()[group]
    ).T  # [in, out] -> [out, in]


def unpack_awq(parts: Parts, _: Mapping[str, object]) -> Array:
    """Unpack AWQ: words along the output in AWQ's order, (q - z) * s."""
    codes, zeros = (
        unpack_nibbles(parts["qweight"], AWQ_ORDER),
        unpack_nibbles(parts["qzeros"], AWQ_ORDER),
    )  # [in, out], [groups, out]
    width = len(codes) // len(zeros)
    scales = np.repeat(parts["scales"].float().numpy(), width, axis=0)  # [groups, out] -> [in, out]
    return ((codes - np.repeat(zeros, width, axis=0)) * scales).T  # [in, out] -> [out, in]


def unpack_compressed_tensors(parts: Parts, _: Mapping[str, object]) -> Array:
    """Unpack compressed-tensors: words along the input, codes and zero points offset by 8.

    Weights without zero points are symmetric.
    """
    rows, columns = parts["weight_shape"].tolist()
    codes = unpack_nibbles(parts["weight_packed"], IN_ORDER)[:, :columns]
    scales = parts["weight_scale"].float().numpy()  # [out, groups]
    width = columns // scales.shape[1]
    zeros = np.full(scales.shape, 8)
    if "weight_zero_point" in parts:  # words along the output
        zeros = unpack_nibbles(parts["weight_zero_point"].T.contiguous(), IN_ORDER).T[
            :rows
        ]  # [out / 8, groups] -> [out, ..]
    return (codes - np.repeat(zeros, width, axis=1)) * np.repeat(scales, width, axis=1)  # [out, in]


def unpack_nf4(parts: Parts, _: Mapping[str, object]) -> Array:
    """Unpack bitsandbytes NF4: two codes per byte, first in the high nibble, blocks of the flat
    weight.
    """
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    scales = parts["weight.absmax"].numpy()
    if "weight.nested_absmax" in parts:
        outer = np.repeat(parts["weight.nested_absmax"].numpy(), state["nested_blocksize"])[
            : len(scales)
        ]
        scales = parts["weight.nested_quant_map"].numpy()[scales] * outer + np.float32(
            state["nested_offset"]
        )
    bytes_ = parts["weight"].numpy().reshape(-1)
    codes = np.stack([bytes_ >> 4, bytes_ & 15], axis=-1).reshape(-1)  # [n / 2] -> [n]
    rows, columns = state["shape"]
    values = NF4[codes] * np.repeat(scales, state["blocksize"])[: len(codes)]
    return values[: rows * columns].reshape(rows, columns)  # [n] -> [out, in]


def unpack_gemm(parts: Parts, entry: Mapping[str, object]) -> Array:
    """Unpack GPTQ or AWQ as the config says; both use the same tensor names."""
    return (unpack_awq if entry.get("quant_method") == "awq" else unpack_gptq)(parts, entry)


UNPACKERS: Mapping[str, Callable[[Parts, Mapping[str, object]], Array]] = {
    "qweight": unpack_gemm,
    "weight_packed": unpack_compressed_tensors,
    "weight.quant_state.bitsandbytes__nf4": unpack_nf4,
}
"""The tensor that identifies each format's quantized linears -> its unpacker."""
