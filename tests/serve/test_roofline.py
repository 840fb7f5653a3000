"""Bounds of speed and advice on batches, against arithmetic done by hand and routing that is simulated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from quantkit.io.package_data import locate_folder
from quantkit.recipe.parse import parse_recipe
from quantkit.serve.sizing import roofline
from quantkit.serve.sizing.batch import (
    RESERVE,
    RUNTIME_BYTES,
    STEP,
    compute_max_batched_tokens,
    routed_bytes,
)
from quantkit.serve.sizing.fit import Fit, fit_model
from quantkit.serve.sizing.gpus import Gpu, GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import estimate_memory
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES, Server
from quantkit.serve.sizing.model import Mixture, Model
from quantkit.serve.sizing.read import plan_recipe_models, read_model
from quantkit.serve.sizing.tables import iterate_link_notes

QWEN_32B = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"


@pytest.fixture(scope="module")
def cards() -> GpuCatalog:
    return read_gpus()


@pytest.fixture(scope="module")
def v3() -> Model:
    (found,) = plan_recipe_models(
        parse_recipe((locate_folder("recipes") / "v3-gptq4-fp8.yaml").read_text(), "v3-gptq4-fp8")
    )
    return found


def placed(model: Model, card: Gpu, context: int = 8192, users: int = 10) -> Fit:
    found = fit_model(estimate_memory(model, context, users), card)
    assert found.placement is not None
    return found


# ------------------------------------------------------------------------------------------------------------- decoding


def test_a_dense_model_decodes_as_fast_as_its_weights_are_read(cards: GpuCatalog) -> None:
    model, card = read_model(QWEN_32B), cards.cards["h200"]
    found = placed(model, card, users=1)
    assert found.placement is not None and found.placement.cards == 1
    read = model.weights.n_bytes - 152_064 * 5120 * 2  # of the embedding one row
    one = roofline.decode(found, 1, 0)
    assert one.tokens_per_s == pytest.approx(4.8e12 / read)
    assert one.limit == "memory"
    later = roofline.decode(found, 1, 8192)
    assert later.tokens_per_s == pytest.approx(4.8e12 / (read + 8192 * 262_144))


def test_many_users_share_what_is_read_until_arithmetic_is_the_limit(cards: GpuCatalog) -> None:
    model = read_model(QWEN_32B)
    found = placed(model, cards.cards["h100"], users=1)
    assert found.placement is not None
    tp = found.placement.tp
    few, many = roofline.decode(found, 8, 0), roofline.decode(found, 4096, 0)
    assert few.tokens_per_s == pytest.approx(8 * roofline.decode(found, 1, 0).tokens_per_s)
    assert many.limit in ("arithmetic", "interconnect")
    flops = 2 * roofline.active_parameters(model)
    assert many.tokens_per_s <= tp * 989.4e12 / flops * 1.0001


def test_a_pipeline_is_no_faster_for_one_user_and_adds_up_for_many(cards: GpuCatalog) -> None:
    model, card = read_model(QWEN_32B), cards.cards["h200"]
    one = placed(model, card, users=8)
    assert one.placement is not None
    two = replace(one, placement=replace(one.placement, pp=2))
    assert roofline.decode(two, 1, 0).tokens_per_s == pytest.approx(
        roofline.decode(one, 1, 0).tokens_per_s
    )
    assert (
        0.9
        < roofline.decode(two, 8, 0).tokens_per_s / roofline.decode(one, 4, 0).tokens_per_s / 2
        < 1.1
    )


@pytest.mark.parametrize(
    ("count", "top_k", "batch"), [(256, 8, 1), (256, 8, 32), (128, 8, 128), (8, 2, 3)]
)
def test_distinct_experts_are_those_that_simulated_tokens_hit(
    count: int, top_k: int, batch: int
) -> None:
    draw = np.random.default_rng(0)
    trials = 400
    hits = [
        len(set(draw.permuted(np.tile(np.arange(count), (batch, 1)), axis=1)[:, :top_k].ravel()))
        for _ in range(trials)
    ]
    expected = Mixture(count=count, top_k=top_k, intermediate=1, layers=1).distinct(batch)
    assert expected == pytest.approx(np.mean(hits), abs=4 * np.std(hits) / trials**0.5 + 1e-9)


def test_a_mixture_reads_the_experts_that_are_hit(v3: Model) -> None:
    dense = roofline.active_bytes(v3, 0)
    assert roofline.active_bytes(v3, 1) == pytest.approx(dense + v3.routed.n_bytes * 8 / 256)
    assert roofline.active_bytes(v3, 10_000) == pytest.approx(dense + v3.routed.n_bytes)
    assert dense + v3.routed.n_bytes == v3.weights.n_bytes - v3.embedding.n_bytes


def test_v3_has_37_billion_parameters_at_work_per_token(v3: Model) -> None:
    assert roofline.active_parameters(v3) + v3.embedding.parameters == pytest.approx(
        37.6e9, rel=0.01
    )


# --------------------------------------------------------------------------------------------------- prefill and links


def test_prefill_is_bounded_by_flops_at_the_rate_of_the_stored_weights(cards: GpuCatalog) -> None:
    """A short prompt: two flops per parameter; FP8 weights at FP8's rate, where a card has one."""
    model = read_model("deepseek-ai/DeepSeek-V3")
    inside = sum((layer.dense for layer in model.layers), model.layers[0].dense).parameters
    inside -= model.layers[0].dense.parameters
    active = inside + model.routed.parameters * 8 / 256 + model.head.parameters
    for key, fast in (("h200", True), ("a100", False)):
        found = placed(model, cards.cards[key], context=1, users=1)
        assert found.placement is not None
        flops = found.card.tflops.fp8 if fast else found.card.tflops.bf16
        assert flops is not None
        most = found.placement.cards * flops.value * 1e12 / (2 * (active - model.head.parameters))
        bound = roofline.prefill(found, linked=False).tokens_per_s
        assert bound <= most
        assert bound == pytest.approx(
            most, rel=0.08
        )  # routers and norms in BF16; stages of unequal length


def test_a_sliding_window_bounds_what_prompts_attend_to(cards: GpuCatalog) -> None:
    layer = read_model(QWEN_32B).layers[0]
    windowed = replace(layer, attention=replace(layer.attention, window=100))
    card, context = cards.cards["h100"], 1000
    per_place = [min(place, 100) for place in range(1, context + 1)]
    flops = 2 * 40 * (128 + 128) * sum(per_place) / context
    plain = roofline.layer_seconds(windowed, None, card, 0)
    assert roofline.prompt_seconds(windowed, None, card, context) - plain == pytest.approx(
        flops / 989.4e12
    )


def test_links_are_the_limit_over_pcie_and_not_over_nvlink(v3: Model, cards: GpuCatalog) -> None:
    sent = roofline.link_bytes(v3, 8, 61)
    assert (
        sent == 61 * 2 * 7168 * 2 * 2 * 7 / 8
    )  # two sums of a BF16 vector per layer, in a ring of eight
    told = {}
    for key in ("l40s", "h100"):
        found = placed(v3, cards.cards[key], context=2048)
        made = roofline.compute_bounds(found)
        assert made is not None
        told[key] = " ".join(iterate_link_notes(found, made))
    assert (
        "The interconnect is the limit of prefill" in told["l40s"]
        and "PCIe, 32 GB/s" in told["l40s"]
    )
    assert (
        "The interconnect is not the limit of prefill" in told["h100"]
        and "NVLink, 450 GB/s" in told["h100"]
    )


# -------------------------------------------------------------------------------------------------------------- batches


def test_the_workspace_of_experts_is_what_vllm_allocates(v3: Model) -> None:
    """MarlinExperts.workspace_shapes of vLLM 0.32 for one token: M = 1, N = 2048 / 8, K = 7168, top_k = 8."""
    m, n, k, top_k = 1, 2048 // 8, 7168, 8
    workspace13, workspace2, output = m * top_k * max(n, k), m * top_k * max(2 * n, k), m * k
    assert v3.mixture is not None
    assert routed_bytes(v3, v3.mixture, 8) == 2 * (workspace13 + workspace2 + output)


@pytest.mark.parametrize("server", GPU_ENGINES)
def test_advice_fits_into_what_an_engine_leaves_and_shows_it(
    v3: Model, cards: GpuCatalog, server: Server
) -> None:
    for key in ("h100", "h200", "mi300x"):
        found = placed(v3, cards.cards[key])
        advised = compute_max_batched_tokens(found, server)
        assert advised is not None and found.placement is not None
        held, memory = (
            found.placement.weights_bytes + found.placement.kv_bytes,
            found.card.memory_bytes,
        )
        left = {"vllm": 0.90 * memory - held, "sglang": 0.15 * memory}
        assert advised.free_bytes == pytest.approx(left[server])
        assert advised.used == advised.safe * advised.per_token
        assert (
            advised.used + advised.left + RUNTIME_BYTES + advised.logits_bytes == advised.free_bytes
        )
        assert advised.left >= RESERVE * advised.free_bytes - 1
        one_step_more = advised.used + STEP * advised.per_token
        full = (
            one_step_more + RUNTIME_BYTES + advised.logits_bytes
            > (1 - RESERVE) * advised.free_bytes
        )
        assert full or advised.safe == found.needs.users * found.needs.context
        assert advised.safe % STEP == 0 and advised.worst <= advised.even <= advised.safe


def test_a_step_holds_no_more_than_all_requests(cards: GpuCatalog) -> None:
    """10 users of 512 tokens were told 2,237,184."""
    (tiny,) = plan_recipe_models(
        parse_recipe((locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(), "tiny-v3-awq4")
    )
    for server in GPU_ENGINES:
        advised = compute_max_batched_tokens(placed(tiny, cards.cards["rtx4090"], 512), server)
        assert advised is not None and advised.safe == advised.even == advised.worst == 10 * 512


def test_in_the_worst_case_a_rank_holds_the_tokens_of_all_ranks(
    v3: Model, cards: GpuCatalog
) -> None:
    """Four ranks of 64 experts each: 4 x 8 copies of full width reach one rank for each of its own tokens."""
    found = placed(v3, cards.cards["h200"])
    advised = compute_max_batched_tokens(found, "vllm")
    assert advised is not None and found.placement is not None and found.placement.tp == 4
    plain = advised.per_token - advised.routed_per_token
    copies = 2 * (4 * 8 * (max(2 * 2048, 7168) + max(2048, 7168)) + 7168)
    room = advised.free_bytes - RUNTIME_BYTES - advised.reserve_bytes - advised.logits_bytes
    assert advised.worst == room // (plain + copies) // STEP * STEP


def test_one_rank_is_sent_all_in_any_case(v3: Model, cards: GpuCatalog) -> None:
    found = placed(v3, cards.cards["h200"])
    assert found.placement is not None
    memory = found.card.memory_gb.model_copy(update={"value": 4000.0})
    alone = compute_max_batched_tokens(
        fit_model(
            estimate_memory(v3, 8192, 10), found.card.model_copy(update={"memory_gb": memory})
        ),
        "vllm",
    )
    assert alone is not None and alone.safe == alone.even == alone.worst > 0


def test_advice_does_not_ask_for_more_than_nothing(v3: Model, cards: GpuCatalog) -> None:
    found = placed(v3, cards.cards["h200"], users=10)
    full = replace(
        found,
        placement=replace(
            found.placement, kv_bytes=0, weights_bytes=found.card.memory_bytes - 10**9
        ),
    )
    advised = compute_max_batched_tokens(full, "vllm")
    assert advised is not None and advised.safe == advised.even == advised.worst == 0


def test_dense_models_get_no_advice_on_experts(cards: GpuCatalog) -> None:
    assert (
        compute_max_batched_tokens(placed(read_model(QWEN_32B), cards.cards["h200"]), "vllm")
        is None
    )


# ---------------------------------------------------------------------------------------------------------------- cards


def test_the_cards_of_the_data_file(cards: GpuCatalog) -> None:
    asked = {
        "h100", "h200", "a100", "b200", "mi300x", "gaudi2", "gaudi3", "l40s", "rtx6000ada", "a6000", "rtx4090",
        "rtx5090", "mac-studio",
    }  # fmt: skip
    assert asked <= cards.cards.keys()
    for card in cards.cards.values():
        assert card.tflops.fp8 is None or card.tflops.fp8.value >= card.tflops.bf16.value
        if (
            card.reported_mib
        ):  # a driver reports more than 10^9-byte gigabytes, and less than 2^30-byte ones
            reported = card.reported_mib.value * 2**20
            assert card.memory_gb.value * 1e9 < reported <= card.memory_gb.value * 2**30
    assert {source.read.year for source in cards.sources.values()} == {2026}


def test_the_card_file_refuses_unknown_keys_and_figures(cards: GpuCatalog) -> None:
    values = cards.model_dump(mode="json")
    values["cards"]["h100"]["memory"] = 80
    with pytest.raises(ValidationError, match=r"cards\.h100\.memory"):
        GpuCatalog.model_validate(values)
    values = cards.model_dump(mode="json")
    values["cards"]["h100"]["bandwidth_gb_s"]["value"] = 0
    with pytest.raises(ValidationError, match="greater than 0"):
        GpuCatalog.model_validate(values)
