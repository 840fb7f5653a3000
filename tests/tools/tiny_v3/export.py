"""tiny-v3 as checkpoints in the hub's layout: BF16, and FP8 in 128x128 blocks as DeepSeek's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tools.tiny_v3.model import Mlp, ModelConfig, Moe, TinyV3
from tools.tiny_v3.packing import BOS, EOS, PAD, SPECIAL_TOKENS
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0  # of float8_e4m3fn
UNQUANTIZED = ("model.embed_tokens.weight", "lm_head.weight")

ATTENTION_NAMES = {
    "input_norm": "input_layernorm",
    "output_norm": "post_attention_layernorm",
    "q_a": "self_attn.q_a_proj",
    "q_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_norm": "self_attn.kv_a_layernorm",
    "kv_b": "self_attn.kv_b_proj",
    "out": "self_attn.o_proj",
}


def list_hub_tensors(model: TinyV3) -> dict[str, Tensor]:
    """Return tensors by their hub names: bfloat16, score-correction biases in float32."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head,
    }
    biases: dict[str, Tensor] = {}
    for layer, (attention, mlp) in enumerate(zip(model.attention, model.mlp)):
        prefix = f"model.layers.{layer}"
        for attribute, name in ATTENTION_NAMES.items():
            tensors[f"{prefix}.{name}.weight"] = getattr(attention, attribute)
        if isinstance(mlp, Mlp):
            tensors |= _mlp_tensors(f"{prefix}.mlp", mlp)
        elif isinstance(mlp, Moe):
            tensors |= _moe_tensors(f"{prefix}.mlp", mlp)
            biases[f"{prefix}.mlp.gate.e_score_correction_bias"] = mlp.bias.clone()
    exported = {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in tensors.items()
    }
    return exported | biases


def _mlp_tensors(prefix: str, mlp: Mlp) -> dict[str, Tensor]:
    return {
        f"{prefix}.gate_proj.weight": mlp.gate,
        f"{prefix}.up_proj.weight": mlp.up,
        f"{prefix}.down_proj.weight": mlp.down,
    }


def _moe_tensors(prefix: str, moe: Moe) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"{prefix}.gate.weight": moe.router}
    tensors |= _mlp_tensors(f"{prefix}.shared_experts", moe.shared)
    for expert, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down)):
        tensors[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate_up[0]  # [inner, hidden]
        tensors[f"{prefix}.experts.{expert}.up_proj.weight"] = gate_up[1]  # [inner, hidden]
        tensors[f"{prefix}.experts.{expert}.down_proj.weight"] = down
    return tensors


def quantize_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [out, in] to float8_e4m3fn codes and scales [ceil(out / 128), ceil(in / 128)].

    weight ~ codes * scale of the block, scale = amax / 448 in float32; blocks at the edges may be
    smaller. A block of zeros has scale 1.
    """
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX  # [down, across]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]  # [out, in]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def quantize_to_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return FP8 tensors: every matrix but embedding, head and routers, with `weight_scale_inv`."""
    quantized: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name not in UNQUANTIZED and not name.endswith("mlp.gate.weight"):
            quantized[name], quantized[f"{name}_scale_inv"] = quantize_block(tensor)
        else:
            quantized[name] = tensor
    return quantized


def make_config(config: ModelConfig, fp8: bool) -> dict[str, object]:
    """Return config.json of the checkpoint."""
    values: dict[str, object] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "num_nextn_predict_layers": 0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": config.num_attention_heads,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **asdict(config),
    }
    if fp8:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
        }
    return values


def save_checkpoint(folder: Path, model: TinyV3, tokenizer: Tokenizer, fp8: bool) -> None:
    """Write a model folder: weights, config, generation config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list_hub_tensors(model)
    save_file(
        quantize_to_fp8(tensors) if fp8 else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", make_config(model.config, fp8))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BOS],
            "eos_token": SPECIAL_TOKENS[EOS],
            "pad_token": SPECIAL_TOKENS[PAD],
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
        },
    )


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
