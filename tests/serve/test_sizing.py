"""Sizes against manual arithmetic and transformers' own modules."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from quantkit import registry
from quantkit.contracts import Config
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.package_data import locate_folder, locate_model
from quantkit.recipe.parse import parse_recipe
from quantkit.serve.sizing.attention import read_attention
from quantkit.serve.sizing.fit import (
    TensorParallelShortfall,
    compute_fullest_gpu,
    compute_kv_per_gpu,
    compute_weights_per_gpu,
    find_shortfall,
    find_tensor_parallel_fault,
    fit_model,
    is_placeable,
    iterate_stages,
)
from quantkit.serve.sizing.gpus import GB, GIB, GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import estimate_memory
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.read import (
    describe_scheme,
    plan_recipe_models,
    read_config_model,
    read_model,
)

V3, QWEN_32B, MIXTRAL = (
    "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "mistralai/Mixtral-8x7B-v0.1",
)  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "torch_dtype": "float16",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def catalog() -> GpuCatalog:
    return read_gpus()


@pytest.fixture(scope="module")
def v3() -> Model:
    return read_model(V3)


@cache
def recipe_model(name: str) -> Model:
    text = (locate_folder("recipes") / f"{name}.yaml").read_text()
    (model,) = plan_recipe_models(parse_recipe(text, name))
    return model


def write_config(path: Path, values: dict[str, object]) -> Path:
    path.write_text(json.dumps(values))
    return path


# ----------------------------------------------------------------- manual arithmetic


def test_v3_kv_cache_is_70_272_bytes_per_token(v3: Model) -> None:
    assert v3.compute_kv_bytes_per_token("bf16") == 61 * (512 + 64) * 2 == 70_272
    assert v3.compute_kv_bytes_per_token("fp8") == 61 * 576
    dense_formula = 61 * 2 * 128 * 128 * 2  # what 128 heads of 128 would take without MLA
    assert dense_formula / v3.compute_kv_bytes_per_token("bf16") > 50


def test_v3_needs_671_gb_and_two_nodes_of_eight_gpus(v3: Model, catalog: GpuCatalog) -> None:
    assert v3.weights.parameters / 1e9 == pytest.approx(671, abs=0.5)
    plain = read_model(V3, "fp8")
    assert plain.weights.n_bytes / GB == pytest.approx(671, abs=0.5)
    assert plain.weights.n_bytes / (80 * GB) == pytest.approx(8.4, abs=0.05)
    for model in (plain, v3):
        fit = fit_model(estimate_memory(model), catalog.gpus["h100"])
        assert fit.placement is not None
        assert (fit.placement.nodes, fit.placement.gpus) == (2, 16)


def test_v3_in_fp8_includes_block_scales_and_bf16_layers(v3: Model) -> None:
    routed = 58 * 256 * 3 * 7168 * 2048
    assert v3.routed.parameters == v3.routed.fp8_parameters == routed
    assert v3.routed.n_bytes == routed + routed // 128**2 * 4
    assert v3.embedding.n_bytes == v3.head.n_bytes == 129_280 * 7168 * 2
    assert (v3.weights + v3.mtp).n_bytes == pytest.approx(
        688.57e9, rel=1e-4
    )  # the checkpoint's size, MTP included


def test_v3_in_bf16_is_1_34_tb() -> None:
    assert read_model(V3, "bf16").weights.n_bytes / 1e12 == pytest.approx(1.34, abs=0.005)


def test_a_7b_model_in_fp16_is_14_gb(tmp_path: Path) -> None:
    model = read_config_model(write_config(tmp_path / "config.json", MISTRAL_7B))
    assert model.weights.n_bytes == 7_241_732_096 * 2
    assert model.weights.n_bytes / GB == pytest.approx(14, abs=0.5)


def test_32b_at_4_bits_has_16_to_18_gb_and_its_context_on_24_gb(catalog: GpuCatalog) -> None:
    rule = read_model(QWEN_32B, "int4")
    assert 16 <= rule.weights.n_bytes / GB <= 18
    artifact = recipe_model("r1-distill-qwen-32b-awq4")
    inner = sum(layer.dense.n_bytes for layer in artifact.layers)
    assert 16 <= inner / GB <= 18  # embedding and head stay in BF16: 3.1 GB more
    assert artifact.weights.n_bytes / GB == pytest.approx(
        inner / GB + 2 * 152_064 * 5120 * 2 / GB, abs=0.01
    )
    per_token = 64 * 2 * 8 * 128 * 2
    assert artifact.compute_kv_bytes_per_token("bf16") == per_token == 262_144
    fit = fit_model(estimate_memory(artifact, 2048, 1), catalog.gpus["rtx4090"])
    assert fit.fits_single_gpu
    assert fit.max_context == int((24 * GB / 1.15 - artifact.weights.n_bytes) / per_token) == 5_877


def test_gb_and_gib_are_distinguished(catalog: GpuCatalog) -> None:
    assert GB == 10**9 and GIB == 2**30
    gpu = catalog.gpus["h100"]
    assert gpu.memory_bytes == 80 * GB < 80 * GIB
    assert gpu.reported_mib is not None
    assert gpu.memory_bytes < gpu.reported_mib.value * 2**20 < 80 * GIB


# --------------------------------------------------------------------------- transformers as oracle


def transformers_model(values: dict[str, object]) -> transformers.PreTrainedModel:
    known = {
        key: value
        for key, value in values.items()
        if key not in ("quantization_config", "torch_dtype")
    }
    config = transformers.CONFIG_MAPPING[str(values["model_type"])].from_dict(known)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", registry.list_names("architectures"))
def test_parameters_match_transformers_modules(family: str, tmp_path: Path) -> None:
    values = dict(registry.get_architecture(family).tiny)
    model = read_config_model(write_config(tmp_path / "config.json", values))
    assert model.weights.parameters == sum(
        p.numel() for p in transformers_model(values).parameters()
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("deepseek-v3", marks=pytest.mark.slow),
        "r1-distill-qwen-32b",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "smollm2-135m",
    ],
)
def test_published_models_match_parameters_of_transformers(name: str) -> None:
    path = Path(__file__).parents[2] / f"quantkit/architectures/published/{name}.json"
    values = json.loads(path.read_text())
    assert read_config_model(path).weights.parameters == sum(
        p.numel() for p in transformers_model(values).parameters()
    )


WINDOWED = [
    {"model_type": "mistral", "sliding_window": 16},
    {"model_type": "mistral"},  # transformers assumes 4096
    {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
    {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 16},
    {"model_type": "mixtral", "sliding_window": 16},
    {"model_type": "deepseek_v3"},
    {"model_type": "llama"},
]


@pytest.mark.parametrize(
    "changes", WINDOWED, ids=lambda c: "-".join(str(value) for value in c.values())
)
def test_kv_cache_matches_transformers(changes: dict[str, object]) -> None:
    """The cache of transformers after 40 tokens; it drops one token more than the window."""
    family = str(changes["model_type"])
    tiny = {
        key: value
        for key, value in registry.get_architecture(family).tiny.items()
        if key != "sliding_window"
    }
    values = {**tiny, **changes}
    config = transformers.CONFIG_MAPPING[family].from_dict({
        k: v for k, v in values.items() if k != "torch_dtype"
    })
    tokens, cached = 40, transformers.DynamicCache(config=config)
    for index, layer in enumerate(read_attention(Config(values=values))):
        heads, width = layer.kv_heads, layer.kv_elements // (2 * layer.kv_heads)
        states = torch.zeros(1, heads, tokens, width)
        cached.update(states, states, index)
        held = cached.layers[index].keys.numel() + cached.layers[index].values.numel()
        kept = layer.count_cached_tokens(tokens) - (
            layer.window is not None and layer.window < tokens
        )
        assert held == layer.kv_elements * kept


def test_layer_types_determine_windows() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    values = {
        **registry.get_architecture("llama").tiny, "num_hidden_layers": 3, "layer_types": types,
        "sliding_window": 16,
    }  # fmt: skip
    assert [layer.window for layer in read_attention(Config(values=values))] == [16, None, 16]
    with pytest.raises(CheckpointError, match="expected 2 entries, found 3"):
        read_attention(Config(values={**values, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match="whose memory is known, found 'linear_attention'"):
        read_attention(Config(values={**values, "layer_types": ["linear_attention"] * 3}))


def test_window_limits_the_kv_cache(tmp_path: Path) -> None:
    model = read_config_model(write_config(tmp_path / "config.json", MISTRAL_7B))
    assert (
        model.compute_kv_bytes(4096, "bf16")
        == model.compute_kv_bytes(32_768, "bf16")
        == 4096 * 32 * 2 * 8 * 128 * 2
    )


# -------------------------------------------------------------------------------- plans and headers


def test_artifact_bytes_match_its_headers() -> None:
    model = read_model("builtin:tiny-v3")
    path = locate_model("builtin:tiny-v3")
    size = (path / "model.safetensors").stat().st_size
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert (model.weights + model.mtp).n_bytes == size - 8 - header


@pytest.mark.parametrize(
    ("name", "n_bytes"), [("v3-awq4", 400_888_220_672), ("v3-gptq4-fp8", 372_718_778_944)]
)
def test_recipe_bytes_match_its_plan(name: str, n_bytes: int) -> None:
    model = recipe_model(name)
    assert (model.weights + model.mtp).n_bytes == n_bytes


# -------------------------------------------------------------------------------------- parallelism


def test_tensor_parallel_sizes_respect_heads_groups_and_widths(v3: Model) -> None:
    awq = recipe_model("v3-awq4")
    assert [
        tp for tp in (1, 2, 3, 4, 8, 16, 32) if find_tensor_parallel_fault(awq, tp) is None
    ] == [
        1,
        2,
        4,
        8,
        16,
    ]
    assert (
        find_tensor_parallel_fault(awq, 32)
        == "expert width: 2,048 / 32 = 64 is not a multiple of 128"
    )
    assert find_tensor_parallel_fault(v3, 3) == "attention heads: 128 is not divisible by 3"
    blocks = (
        "attention width: 256 / 4 = 64 is not a multiple of 128"  # what o_proj reads, in FP8 blocks
    )
    assert find_tensor_parallel_fault(read_model("builtin:tiny-v3"), 4) == blocks
    qwen = recipe_model("r1-distill-qwen-32b-awq4")
    assert (
        find_tensor_parallel_fault(qwen, 5) == "8 KV heads and 5 ranks: neither divides the other"
    )
    assert find_tensor_parallel_fault(qwen, 16) == "attention heads: 40 is not divisible by 16"
    assert find_tensor_parallel_fault(qwen, 8) is None
    smollm = recipe_model("smollm2-135m-awq4")
    assert (
        find_tensor_parallel_fault(smollm, 3) is None
        and find_tensor_parallel_fault(smollm, 2) is not None
    )


@pytest.mark.parametrize("family", registry.list_names("architectures"))
def test_single_rank_is_always_allowed(family: str, tmp_path: Path) -> None:
    """Also where FP8 blocks end in the middle of a block: 576 rows in blocks of 128."""
    values = {
        **registry.get_architecture(family).tiny, "num_attention_heads": 9,
        "num_key_value_heads": 9, "head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    model = read_config_model(write_config(tmp_path / "config.json", values))
    assert find_tensor_parallel_fault(model, 1) is None
    assert find_tensor_parallel_fault(model, 2) is not None


def test_mla_replicates_and_gqa_shards_the_kv_cache(v3: Model) -> None:
    assert compute_kv_per_gpu(v3, 1000, "bf16", 8, 1) == [70_272_000]
    qwen = read_model(QWEN_32B)
    assert compute_kv_per_gpu(qwen, 1000, "bf16", 8, 1) == [262_144_000 / 8]
    assert compute_kv_per_gpu(qwen, 1000, "bf16", 16, 1) == [
        262_144_000 / 8
    ]  # 8 KV heads: two ranks share one


def test_routers_norms_and_compression_are_replicated(v3: Model) -> None:
    """q_a_proj and kv_a_proj with FP8 scales, norms, routers with bias: counted by hand."""
    compressing = 7168 * (1536 + 576) + 4 * 56 * (12 + 5)
    norms = 2 * (7168 + 7168 + 1536 + 512)
    copied = 61 * (compressing + norms) + 58 * (2 * 256 * 7168 + 4 * 256) + 2 * 7168
    (held,) = compute_weights_per_gpu(estimate_memory(v3), 8, 1)
    assert held == pytest.approx((v3.weights.n_bytes - copied) / 8 + copied)


def test_tied_embedding_is_on_first_and_last_stage() -> None:
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    held = compute_weights_per_gpu(estimate_memory(model), 1, 2)
    assert sum(held) == model.weights.n_bytes + 49_152 * 576 * 2


def test_pipeline_stages_hold_everything_once(v3: Model) -> None:
    assert [len(layers) for layers in iterate_stages(v3, 4)] == [15, 15, 16, 15]
    held = compute_weights_per_gpu(estimate_memory(v3), 1, 4)
    assert sum(held) == pytest.approx(v3.weights.n_bytes)
    assert (
        sum(compute_weights_per_gpu(estimate_memory(v3, speculative=True), 1, 4))
        == (v3.weights + v3.mtp).n_bytes
    )


def test_max_users_and_max_context_are_exact(v3: Model, catalog: GpuCatalog) -> None:
    gpu, asked = catalog.gpus["h200"], estimate_memory(v3, 8192, 4)
    fit = fit_model(asked, gpu)
    assert fit.placement is not None and fit.max_users is not None and fit.max_context is not None
    tp, pp = fit.placement.tp, fit.placement.pp
    assert is_placeable(asked, gpu, tp, pp, 8192, fit.max_users)
    assert not is_placeable(asked, gpu, tp, pp, 8192, fit.max_users + 1)
    assert is_placeable(asked, gpu, tp, pp, fit.max_context, 4)
    assert not is_placeable(asked, gpu, tp, pp, fit.max_context + 1, 4)


def test_stages_fill_nodes_and_shortfall_names_alternatives(
    catalog: GpuCatalog,
) -> None:
    """v3-awq4 once got seven of eight GPUs in seven stages.

    TP8 misses little, since every rank holds MLA's whole cache.
    """
    model, gpu = recipe_model("v3-awq4"), catalog.gpus["h100"]
    fit = fit_model(estimate_memory(model), gpu)
    assert fit.placement is not None and (fit.placement.tp, fit.placement.pp) == (4, 2)
    miss = find_shortfall(fit)
    held = sum(compute_fullest_gpu(estimate_memory(model), 8, 1, 32_768, 10)) * 1.15
    assert miss == TensorParallelShortfall(
        tp=8, missing_bytes=round(held - 80 * GB), fits_fp8_cache=True, max_users=9, is_latent=True
    )
    for mended in (estimate_memory(model, users=9), estimate_memory(model, kv="fp8")):
        alone = fit_model(mended, gpu)
        assert (
            alone.placement is not None
            and alone.placement.tp == 8
            and find_shortfall(alone) is None
        )
    more = fit_model(estimate_memory(model, users=10**5), gpu)
    assert more.placement is None and find_shortfall(more) is None
    for name in catalog.gpus:
        for users in (1, 10, 30, 64):
            placed = fit_model(estimate_memory(model, users=users), catalog.gpus[name]).placement
            assert placed is None or catalog.gpus[name].per_node % placed.gpus in (
                0,
                catalog.gpus[name].per_node,
            )


# ----------------------------------------------------------------------------------------- errors


def test_error_messages_state_the_fix(v3: Model, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="expected a context of at most 163,840 tokens, found 200,000"
    ):
        estimate_memory(v3, 200_000)
    with pytest.raises(UsageError, match="at least 1"):
        estimate_memory(v3, 4096, 0)
    with pytest.raises(
        UsageError, match="expected an artifact, a recipe, a config.json or a hub id"
    ):
        read_model("nobody/nothing")
    with pytest.raises(UsageError, match="whose bytes are in the headers of packed weights"):
        read_config_model(
            write_config(
                tmp_path / "config.json",
                {**MISTRAL_7B, "quantization_config": {"quant_method": "awq"}},
            )
        )
    with pytest.raises(CheckpointError, match="num_key_value_heads: expected at least 1, found 0"):
        read_attention(Config(values={**MISTRAL_7B, "num_key_value_heads": 0}))


def test_gpu_without_link_is_used_alone(v3: Model, catalog: GpuCatalog) -> None:
    assert fit_model(estimate_memory(v3), catalog.gpus["mac-studio"]).placement is None
    assert fit_model(
        estimate_memory(read_model(QWEN_32B)), catalog.gpus["mac-studio"]
    ).fits_single_gpu


def test_gpu_is_selected_by_key_or_name(catalog: GpuCatalog) -> None:
    assert (
        catalog.get_gpu("H-100") is catalog.get_gpu("nvidia h100 sxm 80 gb") is catalog.gpus["h100"]
    )
    for name in ("H100 80", "h100-80gb", "H100 SXM 80 GB"):
        assert catalog.get_gpu(name) is catalog.gpus["h100"], name
    for key, gpu in catalog.gpus.items():
        assert catalog.get_gpu(gpu.short) is gpu, key
    with pytest.raises(UsageError, match="no GPU named 'h10'. Did you mean 'h100'"):
        catalog.get_gpu("h10")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"g": {"weights": {"num_bits": 4, "group_size": 64}}}, "compressed-tensors, 4 bits g64"),
        (
            {
                "a": {"weights": {"num_bits": 8, "group_size": None}},
                "b": {"weights": {"num_bits": 4, "group_size": 128}},
            },
            "compressed-tensors, 4/8 bits g128",
        ),
        ({"g": {"weights": None}, "h": 3}, "compressed-tensors"),
        ("broken", "compressed-tensors"),
    ],
)
def test_scheme_of_compressed_tensors_has_its_bits(groups: object, expected: str) -> None:
    entry = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert describe_scheme(Config(values={"quantization_config": entry}), {}) == expected


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({}, "gptq, 4 bits g128"),
        ({"+:.*shared.*": {"bits": 8, "group_size": -1}, "-:.*gate": {}}, "gptq, 4/8 bits g128"),
        ({"+:.*down.*": {"group_size": 32}, "x": 3}, "gptq, 4 bits g32/128"),
        (None, "gptq, 4 bits g128"),
    ],
)
def test_scheme_of_gptq_has_dynamic_exceptions(dynamic: object, expected: str) -> None:
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": dynamic}
    assert describe_scheme(Config(values={"quantization_config": entry}), {}) == expected
