"""The model types of the survey, and small configurations of them.

DENSE and MIXTURES are the text models of transformers 5.23 that people quantize; WRAPPERS hold such
a model among others. VARIANTS are switches of published models that the defaults do not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIXTURES = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "dbrx",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "doge", "dots1",
    "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling_text",
    "inkling2_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
    "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "solar_open", "zaya", "beam",
)  # fmt: skip
DENSE = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "qwen3_5_text", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "phi", "phi3", "olmo", "olmo2",
    "olmo3", "olmo_hybrid", "smollm3", "granite", "granite_swa", "cohere", "cohere2", "exaone4",
    "glm", "glm4", "ernie4_5", "starcoder2", "falcon", "falcon_h1", "nemotron", "seed_oss",
    "hunyuan_v1_dense", "stablelm", "gpt_neox", "gpt2", "opt", "bloom", "mpt", "lfm2", "lfm3",
    "mamba", "mamba2", "falcon_mamba", "bamba", "zamba2", "recurrent_gemma", "arcee", "apertus",
    "helium", "internlm3", "minicpm3", "iquestcoder", "jais2", "youtu", "diffllama",
    "persimmon", "xglm", "gpt_bigcode", "nanochat", "bitnet", "hyperclovax", "cwm",
    "vaultgemma", "hrm_text",
)  # fmt: skip
WRAPPERS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
    "qwen3_omni_moe_thinker", "qwen4_exp", "gemma3", "gemma3n", "gemma4", "mistral3",
    "mistral4", "mistral_large4", "llama4", "glm4v", "glm4v_moe", "glm46v", "glm5_next",
    "internvl", "kimi_k25", "ernie4_5_vl_moe", "minimax_m3_vl", "nemotron_h_omni", "step3p7",
    "exaone4_5", "idefics3", "smolvlm", "llava", "llava_onevision", "aya_vision",
    "cohere2_vision", "paligemma", "lfm2_vl", "aria",
)  # fmt: skip

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("ffn_dim", "intermediate_size", "ffn_hidden_size", "n_inner"), 256),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "block_ff_dim"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 128),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 128),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_hidden_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "v_head_dim"), 32),
    "num_key_value_heads": 2,
    "vocab_size": 768,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions"), 512),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8),
    **dict.fromkeys(("moe_num_experts", "moe_num_primary_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("moe_topk", "moe_top_k", "top_k_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "index_topk"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "o_lora_rank"), 32),
    "index_n_heads": 2,
    "index_head_dim": 64,
    "o_groups": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_chunk_size", "chunk_size"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "laurel_rank"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_d_ssm": 256,
    **dict.fromkeys(("lru_width", "conv_dim"), 128),
    **dict.fromkeys(("attention_window_size", "sliding_window", "attention_chunk_size"), 64),
    **dict.fromkeys(("hidden_size_per_layer_input", "global_head_dim"), 32),
    "vocab_size_per_layer_input": 768,
    **dict.fromkeys(("num_kv_shared_layers", "altup_num_inputs"), 2),
    **dict.fromkeys(("pad_token_id", "rope_scaling", "scale_depth"), None),
    "num_nextn_predict_layers": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "image_token_id": 2,
    "video_token_id": 3,
    "audio_token_id": 4,
    "use_cache": False,
    "query_pre_attn_scalar": 32,
}
"""Values of a text model's configuration, where its class has the key."""

OPTIONAL = frozenset({"rope_scaling", "scale_depth", "num_nextn_predict_layers"})
"""Keys that are left out rather than set to None."""

MEDIA_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "vision_output_dim", "out_hidden_size"), 128),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "output_dim"), 128),
    "encoder_ffn_dim": 128,
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads"), 2),
    "conf_num_attention_heads": 2,
    **dict.fromkeys(("head_dim", "downsample_hidden_size"), 32),
    "image_size": 28,
    "patch_size": 14,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    **dict.fromkeys(("encoder_layers", "conf_num_hidden_layers"), 1),
    "num_position_embeddings": 16,
}
"""Values of the configuration of an image or audio encoder."""

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
PARTIAL_MROPE = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
GEMMA4 = {
    "pad_token_id": 0,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "num_hidden_layers": None,
    "hybrid_override_pattern": None,
    "moe_latent_size": None,
}
QWEN4_EXP = {
    "hc_count": 2,
    "hc_lowrank": 32,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 8,
    "ngram_vocab_size_base": 2000,
}
LFM2 = {"layer_types": ["conv", "full_attention"] * 2}
DBRX_FFN = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "nemotron_h": NEMOTRON_H,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "deepseek_v2": {"topk_method": "greedy"},
    "dbrx": {
        "ffn_config": DBRX_FFN,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": LFM2,
    "inkling_text": {"n_routed_experts": 32},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 32},
    "axk2": {"gated_norm_rank": 32},
    "llama4_text": {"num_experts_per_tok": 1},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "lfm2": LFM2,
    "gemma4_text": GEMMA4,
    "gemma4": {"text_config": GEMMA4},
    "qwen4_exp_text": QWEN4_EXP,
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [6, 6, 4]}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "nemotron_h_omni": {
        "text_config": NEMOTRON_H,
        "vision_config": {"video_temporal_patch_size": 2},
    },
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v"), {"text_config": {"rope_parameters": MROPE}}
    ),
    "glm4v_moe": {"text_config": {"partial_rotary_factor": 0.5, "rope_parameters": PARTIAL_MROPE}},
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
}
"""Values that a type needs beyond SIZES: they must fit each other."""

THREE_WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]
YARN = {"type": "yarn", "original_max_position_embeddings": 64}

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "granite:3.3": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.03,
            "residual_multiplier": 0.22,
            "logits_scaling": 16.0,
            "tie_word_embeddings": True,
        },
    ),
    "exaone4:32b": ("exaone4", {"sliding_window": 64, "layer_types": THREE_WINDOWS}),
    "olmo3:7b": ("olmo3", {"sliding_window": 64, "layer_types": THREE_WINDOWS}),
    "smollm3:3b": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "phi3:4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 12,
                "long_factor": [2.0] * 12,
            },
        },
    ),
    "llama:3.1": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2:yarn": ("qwen2", {"rope_scaling": {**YARN, "factor": 4.0}}),
    "deepseek_v3:yarn": (
        "deepseek_v3",
        {"rope_scaling": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "stablelm:12b": (
        "stablelm",
        {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
    ),
    "seed_oss:36b": ("seed_oss", {"attention_bias": True}),
    "cohere2:scale1": ("cohere2", {"logit_scale": 1.0}),
    "doge:window4096": ("doge", {"sliding_window": 4096}),
    "doge:window16": ("doge", {"sliding_window": 16}),
    "starcoder2:3b": ("starcoder2", {"sliding_window": 64, "tie_word_embeddings": True}),
    "mistral:0.1": ("mistral", {"sliding_window": 64}),
    "glm4_moe:air": (
        "glm4_moe",
        {"attention_bias": True, "partial_rotary_factor": 0.5, "use_qk_norm": False},
    ),
    "qwen2_moe:1.5": ("qwen2_moe", {"decoder_sparse_step": 1}),
    "gemma4:31b": ("gemma4", {"text_config": {**GEMMA4, "hidden_size_per_layer_input": 0}}),
    "nemotron:mini": ("nemotron", {"partial_rotary_factor": 0.5}),
}
"""Name in the survey -> model type and the values of published models that the defaults lack."""

EXPERTS: Mapping[str, str] = {
    **dict.fromkeys(("afmoe", "axk1", "flex_olmo", "kolibri1", "beam"), "inside"),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoehybrid"), "together"),
    **dict.fromkeys(("granitemoeshared", "inkling_text", "aria_text", "aria"), "together"),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), "in parts"),
    "dbrx": "together, flat",
    "deepseek_v4": "inside, streams",
    "doge": "kept",
    "gpt_oss": "together, biases",
    "llama4_text": "together, scaled input",
    "minimax_m3_vl_text": "inside, together",
    "nemotron_h": "no gate",
    "qwen4_exp_text": "inside, streams, in parts",
}
"""What is special about the experts of a type; the README of the survey explains the words."""

VLLM = frozenset({
    "llama", "qwen3", "qwen3_moe", "deepseek_v3", "olmo2", "phi3", "smollm3", "starcoder2",
})  # fmt: skip
"""Types of which vLLM on a CPU ran a small artifact (tests/README.md, quantkit/README.md)."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "dense": DENSE,
    "mixtures": MIXTURES,
    "wrappers": WRAPPERS,
    "variants": tuple(VARIANTS),
}


def resolve_type(name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the model type of a name in the survey, and its values beyond SIZES."""
    model_type, variant = VARIANTS.get(name, (name, {}))
    return model_type, {**OVERRIDES.get(model_type, {}), **variant}
