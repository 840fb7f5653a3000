"""Families without a table, against the cache and the files of small transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quantkit.errors import UsageError
from quantkit.serve.sizing.read import read_model

SMALL: dict[str, object] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "cohere2": {"sliding_window": 16},
    "phi3": {"sliding_window": None},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
TOKENS = 40


def small(family: str) -> Any:
    torch.manual_seed(0)
    values = {**SMALL, **FAMILIES[family]}
    if family == "falcon":  # it derives the width of its heads
        del values["head_dim"]
    config = transformers.CONFIG_MAPPING[family](**values)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_family_matches_cache_and_parameters_of_transformers(
    family: str, tmp_path: Path
) -> None:
    model = small(family)
    model.config.save_pretrained(tmp_path)
    sized = read_model(str(tmp_path / "config.json"))
    assert sized.weights.parameters == sum(p.numel() for p in model.parameters())
    assert sized.weights.n_bytes == 2 * sized.weights.parameters
    with torch.no_grad():
        cache = model(torch.arange(TOKENS)[None] % 128, use_cache=True).past_key_values
    assert len(cache.layers) == len(sized.layers)
    for layer, held in zip(sized.layers, cache.layers, strict=True):
        window = layer.attention.window
        kept = (
            TOKENS if window is None else min(TOKENS, window - 1)
        )  # transformers drops one token more
        assert held.keys.numel() + held.values.numel() == layer.attention.kv_elements * kept


@pytest.mark.parametrize(
    ("extra", "expected"), [({}, "BF16"), ({"vision_config": {}}, "BF16 (language model only)")]
)
def test_multimodal_config_counts_the_language_model_only(
    extra: dict[str, object], expected: str, tmp_path: Path
) -> None:
    text = {**SMALL, "model_type": "gemma3_text", "layer_types": ["full_attention"] * 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, **extra}))
    assert read_model(str(path)).scheme == expected


def test_unknown_family_bytes_match_its_headers(tmp_path: Path) -> None:
    model = small("gpt_oss")
    model.save_pretrained(tmp_path)
    sized = read_model(str(tmp_path))
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert sized.weights.n_bytes == size - 8 - header
    assert sized.read_from == "headers" and sized.moe is not None
    assert sized.routed.parameters == sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n
    )
    assert sized.moe.num_experts == 4 and sized.moe.num_layers == 4


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "mamba"}, "found mamba, which has none; size this model with its engine"),
        ({"model_type": "no_such_family"}, "transformers has no language model of that type"),
        ({"model_type": "gemma2", "num_hidden_layers": "many"}, "repair the value"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**8}, "expected at most 10,000"),
        ({"model_type": "qwen3_next", "num_hidden_layers": 4}, "found 'linear_attention'"),
    ],
)
def test_unsupported_model_raises_one_sentence(
    values: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=sentence) as caught:
        read_model(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)
