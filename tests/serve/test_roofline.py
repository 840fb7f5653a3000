"""Speed bounds and tokens per step, against manual arithmetic and simulated routing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from quantkit.io.package_data import locate_folder
from quantkit.recipe.parse import parse_recipe
from quantkit.serve.sizing import roofline
from quantkit.serve.sizing.batch import (
    RESERVE_FRACTION,
    RUNTIME_BYTES,
    TOKEN_MULTIPLE,
    compute_expert_bytes,
    compute_max_batched_tokens,
)
from quantkit.serve.sizing.fit import Fit, fit_model
from quantkit.serve.sizing.gpus import Gpu, GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import estimate_memory
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES, GpuEngine
from quantkit.serve.sizing.model import Model, MoeConfig
from quantkit.serve.sizing.read import plan_recipe_models, read_model
from quantkit.serve.sizing.tables import iterate_link_notes

QWEN_32B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"


@pytest.fixture(scope="module")
def catalog() -> GpuCatalog:
    return read_gpus()


@pytest.fixture(scope="module")
def v3() -> Model:
    (model,) = plan_recipe_models(
        parse_recipe((locate_folder("recipes") / "v3-gptq4-fp8.yaml").read_text(), "v3-gptq4-fp8")
    )
    return model


def place_model(model: Model, gpu: Gpu, context: int = 8192, users: int = 10) -> Fit:
    fit = fit_model(estimate_memory(model, context, users), gpu)
    assert fit.placement is not None
    return fit


# ----------------------------------------------------------------------------------------- decoding


def test_dense_decoding_is_bounded_by_reading_weights(catalog: GpuCatalog) -> None:
    model, gpu = read_model(QWEN_32B), catalog.gpus["h200"]
    fit = place_model(model, gpu, users=1)
    assert fit.placement is not None and fit.placement.gpus == 1
    read = model.weights.n_bytes - 152_064 * 5120 * 2  # of the embedding one row
    one = roofline.bound_decode(fit, 1, 0)
    assert one.tokens_per_s == pytest.approx(4.8e12 / read)
    assert one.limit == "memory"
    later = roofline.bound_decode(fit, 1, 8192)
    assert later.tokens_per_s == pytest.approx(4.8e12 / (read + 8192 * 262_144))


def test_batched_decoding_scales_until_arithmetic_limits_it(catalog: GpuCatalog) -> None:
    model = read_model(QWEN_32B)
    fit = place_model(model, catalog.gpus["h100"], users=1)
    assert fit.placement is not None
    tp = fit.placement.tp
    few, many = roofline.bound_decode(fit, 8, 0), roofline.bound_decode(fit, 4096, 0)
    assert few.tokens_per_s == pytest.approx(8 * roofline.bound_decode(fit, 1, 0).tokens_per_s)
    assert many.limit in ("arithmetic", "interconnect")
    flops = 2 * roofline.count_active_parameters(model)
    assert many.tokens_per_s <= tp * 989.4e12 / flops * 1.0001


def test_pipeline_scales_with_users_only(catalog: GpuCatalog) -> None:
    model, gpu = read_model(QWEN_32B), catalog.gpus["h200"]
    one = place_model(model, gpu, users=8)
    assert one.placement is not None
    two = replace(one, placement=replace(one.placement, pp=2))
    assert roofline.bound_decode(two, 1, 0).tokens_per_s == pytest.approx(
        roofline.bound_decode(one, 1, 0).tokens_per_s
    )
    assert (
        0.9
        < roofline.bound_decode(two, 8, 0).tokens_per_s
        / roofline.bound_decode(one, 4, 0).tokens_per_s
        / 2
        < 1.1
    )


@pytest.mark.parametrize(
    ("count", "top_k", "batch"), [(256, 8, 1), (256, 8, 32), (128, 8, 128), (8, 2, 3)]
)
def test_expected_experts_match_simulated_routing(count: int, top_k: int, batch: int) -> None:
    draw = np.random.default_rng(0)
    trials = 400
    hits = [
        len(set(draw.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)[:, :top_k].ravel()))
        for _ in range(trials)
    ]
    expected = MoeConfig(
        num_experts=count, top_k=top_k, intermediate_size=1, num_layers=1
    ).compute_expected_experts(batch)
    assert expected == pytest.approx(np.mean(hits), abs=4 * np.std(hits) / trials**0.5 + 1e-9)


def test_active_bytes_count_routed_experts(v3: Model) -> None:
    dense = roofline.count_active_bytes(v3, 0)
    assert roofline.count_active_bytes(v3, 1) == pytest.approx(dense + v3.routed.n_bytes * 8 / 256)
    assert roofline.count_active_bytes(v3, 10_000) == pytest.approx(dense + v3.routed.n_bytes)
    assert dense + v3.routed.n_bytes == v3.weights.n_bytes - v3.embedding.n_bytes


def test_v3_has_37_billion_active_parameters(v3: Model) -> None:
    assert roofline.count_active_parameters(v3) + v3.embedding.parameters == pytest.approx(
        37.6e9, rel=0.01
    )


# -------------------------------------------------------------------------------- prefill and links


def test_prefill_is_bounded_by_flops_of_the_stored_dtype(catalog: GpuCatalog) -> None:
    """A short prompt: two flops per parameter; FP8 weights at the FP8 rate of the GPU, if any."""
    model = read_model("deepseek-ai/DeepSeek-V3")
    inside = sum((layer.dense for layer in model.layers), model.layers[0].dense).parameters
    inside -= model.layers[0].dense.parameters
    active = inside + model.routed.parameters * 8 / 256 + model.head.parameters
    for key, fast in (("h200", True), ("a100", False)):
        fit = place_model(model, catalog.gpus[key], context=1, users=1)
        assert fit.placement is not None
        flops = fit.gpu.tflops.fp8 if fast else fit.gpu.tflops.bf16
        assert flops is not None
        most = fit.placement.gpus * flops.value * 1e12 / (2 * (active - model.head.parameters))
        bound = roofline.bound_prefill(fit, with_link=False).tokens_per_s
        assert bound <= most
        assert bound == pytest.approx(
            most, rel=0.08
        )  # routers and norms in BF16; stages of unequal length


def test_sliding_window_limits_attention_flops_of_prompts(catalog: GpuCatalog) -> None:
    layer = read_model(QWEN_32B).layers[0]
    windowed = replace(layer, attention=replace(layer.attention, window=100))
    gpu, context = catalog.gpus["h100"], 1000
    per_place = [min(place, 100) for place in range(1, context + 1)]
    flops = 2 * 40 * (128 + 128) * sum(per_place) / context
    plain = roofline.compute_layer_seconds(windowed, None, gpu, 0)
    assert roofline.compute_prompt_seconds(windowed, None, gpu, context) - plain == pytest.approx(
        flops / 989.4e12
    )


def test_link_limits_prefill_over_pcie_but_not_nvlink(v3: Model, catalog: GpuCatalog) -> None:
    sent = roofline.count_link_bytes(v3, 8, 61)
    assert (
        sent == 61 * 2 * 7168 * 2 * 2 * 7 / 8
    )  # two sums of a BF16 vector per layer, in a ring of eight
    notes = {}
    for key in ("l40s", "h100"):
        fit = place_model(v3, catalog.gpus[key], context=2048)
        made = roofline.compute_bounds(fit)
        assert made is not None
        notes[key] = " ".join(iterate_link_notes(fit, made))
    assert (
        "The interconnect is the limit of prefill" in notes["l40s"]
        and "PCIe, 32 GB/s" in notes["l40s"]
    )
    assert (
        "The interconnect is not the limit of prefill" in notes["h100"]
        and "NVLink, 450 GB/s" in notes["h100"]
    )


# ------------------------------------------------------------------------------------------ batches


def test_expert_bytes_match_vllm_workspace(v3: Model) -> None:
    """MarlinExperts.workspace_shapes of vLLM 0.32 for one token.

    M = 1, N = 2048 / 8, K = 7168, top_k = 8.
    """
    m, n, k, top_k = 1, 2048 // 8, 7168, 8
    workspace13, workspace2, output = m * top_k * max(n, k), m * top_k * max(2 * n, k), m * k
    assert v3.moe is not None
    assert compute_expert_bytes(v3, v3.moe, 8) == 2 * (workspace13 + workspace2 + output)


@pytest.mark.parametrize("server", GPU_ENGINES)
def test_batched_tokens_fit_the_step_memory(
    v3: Model, catalog: GpuCatalog, server: GpuEngine
) -> None:
    for key in ("h100", "h200", "mi300x"):
        fit = place_model(v3, catalog.gpus[key])
        advised = compute_max_batched_tokens(fit, server)
        assert advised is not None and fit.placement is not None
        held, memory = (
            fit.placement.weights_bytes + fit.placement.kv_bytes,
            fit.gpu.memory_bytes,
        )
        left = {"vllm": 0.90 * memory - held, "sglang": 0.15 * memory}
        assert advised.free_bytes == pytest.approx(left[server])
        assert advised.used_bytes == advised.safe * advised.bytes_per_token
        assert (
            advised.used_bytes + advised.left_bytes + RUNTIME_BYTES + advised.logits_bytes
            == advised.free_bytes
        )
        assert advised.left_bytes >= RESERVE_FRACTION * advised.free_bytes - 1
        one_step_more = advised.used_bytes + TOKEN_MULTIPLE * advised.bytes_per_token
        full = (
            one_step_more + RUNTIME_BYTES + advised.logits_bytes
            > (1 - RESERVE_FRACTION) * advised.free_bytes
        )
        assert full or advised.safe == fit.memory.users * fit.memory.context
        assert advised.safe % TOKEN_MULTIPLE == 0 and advised.worst <= advised.even <= advised.safe


def test_batched_tokens_do_not_exceed_all_requests(catalog: GpuCatalog) -> None:
    """The limit for 10 users of 512 tokens was 2,237,184 once."""
    (tiny,) = plan_recipe_models(
        parse_recipe((locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(), "tiny-v3-awq4")
    )
    for server in GPU_ENGINES:
        advised = compute_max_batched_tokens(
            place_model(tiny, catalog.gpus["rtx4090"], 512), server
        )
        assert advised is not None and advised.safe == advised.even == advised.worst == 10 * 512


def test_worst_case_routes_tokens_of_all_ranks_to_one(v3: Model, catalog: GpuCatalog) -> None:
    """Four ranks of 64 experts: one rank gets 4 x 8 copies of full width per own token."""
    fit = place_model(v3, catalog.gpus["h200"])
    advised = compute_max_batched_tokens(fit, "vllm")
    assert advised is not None and fit.placement is not None and fit.placement.tp == 4
    plain = advised.bytes_per_token - advised.expert_bytes_per_token
    copies = 2 * (4 * 8 * (max(2 * 2048, 7168) + max(2048, 7168)) + 7168)
    room = advised.free_bytes - RUNTIME_BYTES - advised.reserve_bytes - advised.logits_bytes
    assert advised.worst == room // (plain + copies) // TOKEN_MULTIPLE * TOKEN_MULTIPLE


def test_single_rank_has_the_same_limit_for_any_routing(v3: Model, catalog: GpuCatalog) -> None:
    fit = place_model(v3, catalog.gpus["h200"])
    assert fit.placement is not None
    memory = fit.gpu.memory_gb.model_copy(update={"value": 4000.0})
    alone = compute_max_batched_tokens(
        fit_model(estimate_memory(v3, 8192, 10), fit.gpu.model_copy(update={"memory_gb": memory})),
        "vllm",
    )
    assert alone is not None and alone.safe == alone.even == alone.worst > 0


def test_batched_tokens_are_zero_without_free_memory(v3: Model, catalog: GpuCatalog) -> None:
    fit = place_model(v3, catalog.gpus["h200"], users=10)
    full = replace(
        fit,
        placement=replace(fit.placement, kv_bytes=0, weights_bytes=fit.gpu.memory_bytes - 10**9),
    )
    advised = compute_max_batched_tokens(full, "vllm")
    assert advised is not None and advised.safe == advised.even == advised.worst == 0


def test_dense_model_has_no_batched_tokens_limit(catalog: GpuCatalog) -> None:
    assert (
        compute_max_batched_tokens(place_model(read_model(QWEN_32B), catalog.gpus["h200"]), "vllm")
        is None
    )


# -------------------------------------------------------------------------------------------- GPUs


def test_gpu_catalog_has_consistent_entries(catalog: GpuCatalog) -> None:
    asked = {
        "h100", "h200", "a100", "b200", "mi300x", "gaudi2", "gaudi3", "l40s", "rtx6000ada", "a6000",
        "rtx4090", "rtx5090", "mac-studio",
    }  # fmt: skip
    assert asked <= catalog.gpus.keys()
    for gpu in catalog.gpus.values():
        assert gpu.tflops.fp8 is None or gpu.tflops.fp8.value >= gpu.tflops.bf16.value
        if (
            gpu.reported_mib
        ):  # a driver reports more than 10^9-byte gigabytes, and less than 2^30-byte ones
            reported = gpu.reported_mib.value * 2**20
            assert gpu.memory_gb.value * 1e9 < reported <= gpu.memory_gb.value * 2**30
    assert {source.read.year for source in catalog.sources.values()} == {2026}


def test_gpu_catalog_rejects_unknown_keys_and_invalid_values(catalog: GpuCatalog) -> None:
    values = catalog.model_dump(mode="json")
    values["gpus"]["h100"]["memory"] = 80
    with pytest.raises(ValidationError, match=r"gpus\.h100\.memory"):
        GpuCatalog.model_validate(values)
    values = catalog.model_dump(mode="json")
    values["gpus"]["h100"]["bandwidth_gb_s"]["value"] = 0
    with pytest.raises(ValidationError, match="greater than 0"):
        GpuCatalog.model_validate(values)
