"""Independent readers of source and artifact weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]  # AWQ: column j of a word lies in slot SLOTS[j]


def fp8_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantize an FP8 checkpoint to BF16, block by block."""
    stored = load_file(folder / "model.safetensors")
    tensors_by_name = {}
    for name, value in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            wide = scale.repeat_interleave(128, 0)[: value.shape[0]].repeat_interleave(128, 1)[
                :, : value.shape[1]
            ]
            value = (value.float() * wide).bfloat16()
        tensors_by_name[name] = value
    return tensors_by_name


def unpack(words: torch.Tensor) -> np.ndarray:
    """Unpack int32 words [rows, columns / 8] to nibbles [rows, columns] in AWQ's order."""
    bits = words.numpy().astype(np.int64) & 0xFFFFFFFF
    slots = np.stack(
        [(bits >> (4 * slot)) & 15 for slot in range(8)], axis=-1
    )  # [rows, words, slot]
    return slots[:, :, SLOTS].reshape(bits.shape[0], -1)


def awq_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every logical weight of an AWQ artifact: (q - z) * s, group by group."""
    stored = load_file(folder / "model.safetensors")
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["group_size"]
    tensors_by_name = {}
    for name, value in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            zeros = np.repeat(unpack(stored[f"{module}.qzeros"]), group, axis=0)
            scales = np.repeat(stored[f"{module}.scales"].float().numpy(), group, axis=0)
            tensors_by_name[f"{module}.weight"] = torch.from_numpy(
                ((unpack(value) - zeros) * scales).T.astype(np.float32)
            )
        elif kind not in {"qzeros", "scales"}:
            tensors_by_name[name] = value
    return tensors_by_name


def whole_model(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Make a float32 transformers model with these weights, experts stacked by its names."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config")
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = {name: value.float() for name, value in weights.items() if ".experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        names = [f"{prefix}.{e}" for e in range(config.n_routed_experts)]
        both = [
            torch.cat([weights[f"{n}.gate_proj.weight"], weights[f"{n}.up_proj.weight"]])
            for n in names
        ]
        state[f"{prefix}.gate_up_proj"] = torch.stack(both).float()
        state[f"{prefix}.down_proj"] = torch.stack([
            weights[f"{n}.down_proj.weight"] for n in names
        ]).float()
    model.load_state_dict(state, strict=True)
    return model
