"""Models of families without a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.architectures.components.decoder import TINY_COMMON
from quantkit.checkpoint import hf_config
from quantkit.io.package_data import locate_model


def write_model(folder: Path, config: dict[str, object]) -> Path:
    """Write a random checkpoint as transformers saves it, with tiny-v3's tokenizer."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        wide = parameter.dim() > 1
        value = (
            value * parameter.shape[-1] ** -0.5
            if wide
            else 0.1 * value + (not name.endswith(".bias"))
        )
        if wide:
            value[..., :: max(1, parameter.shape[-1] // 8)] *= (
                4  # a few loud channels, so that scaling has something to do
            )
        parameter.data.copy_(value)
    for name, table in model.named_buffers():
        if name.endswith(".tid2eid"):  # experts by token id, zeros in a new model
            count = model.config.n_routed_experts
            table.copy_(torch.randint(0, count, table.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / name, folder / name)
    return folder


def family(model_type: str, **changes: object) -> dict[str, object]:
    """Return a small config.json of a model type without a table."""
    named = {"architectures": [type_of(model_type)], "model_type": model_type}
    own = {**FAMILIES, **MIXTURES, **STREAMS, **REPLAYED}.get(model_type, {})
    return {**TINY_COMMON, **named, **own, **changes}


FAMILIES: dict[str, dict[str, object]] = {
    "olmo2": {},  # norms after attention and MLP: no tensor can absorb their inputs' scale
    "phi3": {
        "pad_token_id": 0,
        "sliding_window": 16,
    },  # one matrix for q, k, v and one for gate and up
    "starcoder2": {
        "tie_word_embeddings": True,
        "use_bias": True,
        "sliding_window": 16,
    },  # norms with a bias, no gate
    "persimmon": {
        "num_key_value_heads": 4
    },  # q, k, v of each head in turn, norms with a bias, no gate
    "smollm3": {
        "pad_token_id": 0,
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
    },  # a layer without rotation
}

MIXTURES: dict[str, dict[str, object]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
    "flex_olmo": {  # a norm after the experts' sum
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "pad_token_id": 0,
    },
    "minimax_m2": {  # names of the checkpoint: block_sparse_moe.experts.0.w1
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "head_dim": 32,
    },
    "granitemoe": {  # experts stored together, a factor on their sum
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "residual_multiplier": 0.5,
        "pad_token_id": 0,
    },
    "nemotron_h": {  # experts without a gate, other names outside the blocks
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 128,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 32,
        "moe_latent_size": None,
        "pad_token_id": 0,
    },
    "gpt_oss": {  # experts with biases, gate and up row by row in turn, attention sinks
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "dbrx": {  # experts in matrices [experts * intermediate, hidden], nested sizes
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "pad_token_id": 0,
    },
    "llama4_text": {  # the router's weight multiplies the experts' input
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 128,
        "intermediate_size_mlp": 128,
        "head_dim": 32,
        "pad_token_id": 0,
    },
    "axk2": {  # attention to the tokens that an indexer selects, norms with a gate
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 128,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "index_n_heads": 2,
        "index_head_dim": 64,
        "index_topk": 64,
        "gated_norm_rank": 32,
        "pad_token_id": 0,
    },
    "qwen3_next": {  # a gate of the shared expert, linear attention, convolutions
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
}

STREAMS: dict[str, dict[str, object]] = {
    "deepseek_v4": {  # two streams per token; the first block picks experts by token id
        "head_dim": 32,
        "hc_mult": 2,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 128,
        "intermediate_size": 128,
        "q_lora_rank": 64,
        "o_lora_rank": 32,
        "o_groups": 2,
        "qk_rope_head_dim": 16,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 16,
        "sliding_window": 16,
        "pad_token_id": 0,
    },
    "qwen4_exp_text": {  # streams in one dimension; n-grams of token ids select embeddings
        "head_dim": 32,
        "hc_count": 2,
        "hc_lowrank": 16,
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 8,
        "ngram_vocab_size_base": 200,
        "pad_token_id": 0,
    },
}
"""Models whose blocks exchange more than one state of the embedding's width per token."""

REPLAYED: dict[str, dict[str, object]] = {
    "gemma2": {  # soft caps, eager attention only, a scaled embedding
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {  # two rotary tables
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "cohere2": {  # scaled logits, no rotation in full layers
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "olmo3": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "olmo": {"pad_token_id": 0},  # norms without a weight
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "pad_token_id": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 256, "pad_token_id": 0},
    "falcon_h1": {  # a state space next to attention, infinite numbers in its config
        "mamba_d_ssm": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 32,
        "pad_token_id": 0,
    },
    "phi": {"pad_token_id": 0},  # a head with a bias
}
"""Models that need transformers' own forward around their layers."""


def type_of(model_type: str) -> str:
    """Return the class that transformers makes for a model type."""
    return hf_config.list_model_classes(model_type)[0]
