"""Small vision-language models, as transformers makes and saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.encoded import Encode
from transformers import AutoConfig, AutoModelForMultimodalLM

from quantkit.contracts import Config
from quantkit.io.package_data import locate_model

TEXT: Mapping[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 768,
    "max_position_embeddings": 256,
}
VISION: Mapping[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,  # as many layers as the text
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: Mapping[str, object] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
WRAPPERS: Mapping[str, Mapping[str, object]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "sliding_window": 16, **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": QWEN_VISION,
    },
    "mistral_large4": {  # a learned factor of the rotary table
        "text_config": {
            **TEXT,
            "num_key_value_heads": 2,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "index_n_heads": 2,
            "index_head_dim": 64,
            "index_topk": 16,
        },
        "vision_config": {"model_type": "pixtral", **VISION},
    },
    "qwen3_5": {
        "text_config": {**TEXT, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": QWEN_VISION,
    },
}
"""A wrapper for each form of names in checkpoints, and one with linear attention."""


def make_wrapper_config(model_type: str, **changes: object) -> Config:
    """Return a small config.json of a wrapper."""
    return Config(values={"model_type": model_type, **WRAPPERS[model_type], **changes})


def write_wrapper(folder: Path, model_type: str, **changes: object) -> Path:
    """Save a random wrapper with tiny-v3's tokenizer and a processor's file."""
    config = AutoConfig.for_model(**make_wrapper_config(model_type, **changes).values)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 28}))
    return folder


def encode_parts(source: Path, folder: Path, encode: Encode, entry: Mapping[str, object]) -> Path:
    """Write a wrapper again with the linears of its parts, not of its text, in an encoding."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        is_linear = tensor.dim() == 2 and module != name and "embedding" not in name
        if is_linear and not name.startswith("language_model."):
            parts = encode(tensor.float())[0]
            stored |= {f"{module}.{local}": part.contiguous() for local, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    return folder
