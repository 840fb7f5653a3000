"""Mixtures without a table: experts are derived, proven one by one, and never mistaken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.builds import build
from support.checkpoints import make_recipe_text, make_tiny_config
from support.underived_models import family, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit import pipeline, registry
from quantkit.artifact import load_model
from quantkit.contracts import PROTECTED_ROLES, Block, Config, Experts, Layout, LinearGroup, Scheme
from quantkit.errors import CheckpointError
from quantkit.models import derive, expert_checks, layer_states, logit_checks
from quantkit.models import experts as expert_runs
from quantkit.models.experts import BlockRun, Gating
from quantkit.models.layers import make_meta_model
from quantkit.plan.decisions import Decision
from quantkit.plan.engine_limits import find_unsupported_engines
from quantkit.plan.match_checkpoint import check_model_class, match_layout
from quantkit.plan.plan import load_architecture
from quantkit.recipe.parse import parse_recipe

pytestmark = pytest.mark.usefixtures("quick_builds")


def derive_layout(config: dict[str, object]) -> Layout:
    return derive.derive_layout(Config(values=config))


def describe_group(block: Block, group: LinearGroup) -> tuple[object, ...]:
    """Return readers, whether experts read it too, and the absorber with its rows."""
    absorber = group.absorber
    widths = {x.name: x.in_features for x in block.linears}
    rows = None
    if absorber and absorber.module in widths:
        whole = range(widths[group.readers[0]])
        rows = tuple(absorber.rows.index() if absorber.rows else whole)
    return frozenset(group.readers), group.routed_experts, absorber and absorber.module, rows


# ---------------------------------------------------------------------------------- derived layouts


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_derived_mixture_equals_its_table(model_type: str) -> None:
    """Same linears with the same roles, experts, kept tensors, readers and absorbers."""
    config = make_tiny_config(model_type, num_nextn_predict_layers=0)
    table = registry.get_architecture(model_type).layout(Config(values=config))
    derived = derive_layout(config)
    assert {x.name: x for x in derived.linears} == {x.name: x for x in table.linears}
    for block, expected in zip(derived.blocks, table.blocks, strict=True):
        assert block.experts == expected.experts
        assert {x.name: x.shape for x in block.others} == {x.name: x.shape for x in expected.others}
        assert {describe_group(block, x) for x in block.groups} == {
            describe_group(expected, x) for x in expected.groups
        }
        assert set(block.fused) == set(expected.fused)


def test_sum_of_experts_before_a_norm_is_returned_inside_the_layer() -> None:
    inside = {
        name: derive_layout(family(name)).blocks[0].experts for name in ("olmoe", "flex_olmo")
    }
    assert inside["olmoe"] and not inside["olmoe"].inside
    assert inside["flex_olmo"] and inside["flex_olmo"].inside


def test_experts_have_their_names_in_the_checkpoint() -> None:
    block = derive_layout(family("minimax_m2")).blocks[0]
    assert block.experts == Experts(
        module="model.layers.0.block_sparse_moe.experts",
        router="model.layers.0.block_sparse_moe.gate",
        count=8,
        top_k=2,
        hidden=128,
        intermediate=128,
        gate="w1",
        up="w3",
        down="w2",
    )
    names = [x.name for x in block.linears if x.role == "routed_expert"]
    assert names[:3] == [f"{block.experts.module}.0.{x}" for x in ("w1", "w3", "w2")]
    assert "model.layers.0.block_sparse_moe.e_score_correction_bias" in {
        x.name for x in block.others
    }


def test_experts_stored_together_are_named_one_by_one() -> None:
    """With Mixtral's names, which vLLM reads for this family."""
    block = derive_layout(family("granitemoe")).blocks[0]
    experts = block.experts
    assert experts and experts.linear(3, experts.up) == (
        "model.layers.0.block_sparse_moe.experts.3.w3"
    )
    assert experts.inside  # the layer multiplies the sum by residual_multiplier
    assert [x.name.removeprefix(block.name) for x in block.stacked] == [
        ".block_sparse_moe.input_linear.weight",
        ".block_sparse_moe.output_linear.weight",
    ]


def test_router_whose_weight_multiplies_the_input_of_experts() -> None:
    """Their input is none of the block's others: it is not scaled, and the router is one."""
    block = derive_layout(family("llama4_text")).blocks[0]
    assert block.experts and block.experts.scaled_inputs
    assert not any(group.routed_experts for group in block.groups)
    assert [x.name for x in block.linears if x.role == "router"] == [
        "model.layers.0.feed_forward.router"
    ]
    assert all(x.transposed for x in block.stacked)


def find_refusing(model_type: str, format_name: str) -> dict[str, str]:
    """Return the engines that cannot load quantized experts of a type, with the reason."""
    config = family(model_type)
    layout = derive_layout(config)
    experts = {x.name: x for x in layout.linears if x.role == "routed_expert"}
    scheme = Scheme(bits=4, group_size=32, symmetric=True, scale_dtype="bfloat16")
    decisions = {
        name: Decision(linear=linear, block=None, action="quantize", rule="all", scheme=scheme)
        for name, linear in experts.items()
    }
    output = registry.get_format(format_name)
    return {**find_unsupported_engines(output, Config(values=config), layout, decisions)}


def test_transformers_skips_single_experts_that_it_stores_together() -> None:
    """Loading an artifact of granitemoe leaves its experts without values; llama4's are replaced by
    a list of modules for two methods.
    """
    reason = find_refusing("granitemoe", "compressed_tensors")["transformers"]
    assert reason.startswith(
        "loads the experts of granitemoe as tensors with all experts of a layer"
    )
    assert "transformers" in find_refusing("granitemoe", "dense")
    assert find_refusing("llama4_text", "compressed_tensors") == {}
    assert "transformers" in find_refusing("llama4_text", "dense")
    assert find_refusing("olmoe", "compressed_tensors") == {}


def test_mixture_with_streams_and_experts_by_token_id() -> None:
    """Experts read one stream's width; their sum is returned inside; the table stays integers."""
    layout = derive_layout(family("deepseek_v4"))
    assert layout.state_width == 2 * 128 + 1
    assert all(x.experts and x.experts.inside and x.experts.hidden == 128 for x in layout.blocks)
    tables = {spec.name: spec for spec in layout.blocks[0].others if spec.dtype != "BF16"}
    assert {name: (x.dtype, x.shape) for name, x in tables.items()} == {
        "model.layers.0.ffn.gate.tid2eid": ("I64", (768, 2))
    }
    assert not layout.equal_lengths  # the proof ran a padded batch of two lengths


def test_experts_without_a_gate() -> None:
    """The square of a ReLU lies between their projections: no row of up absorbs a scale."""
    experts = derive_layout(family("nemotron_h")).blocks[1].experts
    assert experts and experts.gate is None and not experts.scales_down
    assert experts.projections == ("up_proj", "down_proj")


def test_experts_with_biases() -> None:
    """gpt_oss: gate and up row by row in turn, clamped, and up is read with 1 added."""
    block = derive_layout(family("gpt_oss")).blocks[0]
    found = block.experts
    assert found and found.bias and not found.scales_down
    assert all(x.bias for x in block.linears if x.role == "routed_expert")
    assert [(x.name.rpartition(".")[2], x.transposed, x.interleaved) for x in block.stacked] == [
        ("gate_up_proj", True, True),
        ("gate_up_proj_bias", False, True),
        ("down_proj", True, False),
        ("down_proj_bias", False, False),
    ]
    assert [x.name.removeprefix(block.name) for x in block.linears if x.role == "router"] == [
        ".mlp.router"
    ]
    kept = {x.name.removeprefix(block.name) for x in block.others}
    assert {".mlp.router.bias", ".self_attn.sinks"} <= kept
    (group,) = (x for x in block.groups if x.routed_experts)
    assert group.absorber and group.absorber.module.endswith("post_attention_layernorm")


def test_experts_in_matrices_of_two_dimensions() -> None:
    """DBRX: rows of all experts follow one another; its sizes are in nested configurations."""
    block = derive_layout(family("dbrx")).blocks[0]
    assert block.experts and block.experts.count == 4 and block.experts.scales_down
    assert [(x.name.rpartition(".")[2], *x.projections, x.transposed) for x in block.stacked] == [
        ("w1", "gate_proj", False),
        ("v1", "up_proj", False),
        ("w2", "down_proj", True),
    ]
    assert all(x.flat for x in block.stacked)


def test_biases_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of experts differs without them."""
    monkeypatch.setattr(expert_runs, "project", lambda x, own, name: x @ own[f"{name}.weight"].T)
    assert "the experts model.layers.0.mlp.experts give another sum" in refuse(family("gpt_oss"))


def test_routers_and_gates_have_a_role_that_no_general_rule_selects() -> None:
    """Also a router of a class of its own, which is no nn.Linear."""
    assert "router" in PROTECTED_ROLES
    for block in derive_layout(family("qwen3_next")).blocks:
        routers = {x.name.removeprefix(block.name) for x in block.linears if x.role == "router"}
        assert routers == {".mlp.gate", ".mlp.shared_expert_gate"}
        (group,) = (group for group in block.groups if group.routed_experts)
        assert {f"{block.name}{name}" for name in routers} <= set(group.readers)


@pytest.mark.parametrize("selected", [64, 4])
def test_indexer_that_selects_every_token_absorbs_no_scale(selected: int) -> None:
    """The proof's texts have 20 tokens: 64 selected ones are all of them, and no weight of the
    indexer changes the output. Its key norm has the width of its queries' input.
    """
    block = derive_layout(family("axk2", index_topk=selected, num_hidden_layers=1)).blocks[0]
    absorbers = {x.readers[0].removeprefix(f"{block.name}."): x.absorber for x in block.groups}
    assert absorbers["self_attn.indexer.wq_b"] is None
    scaled = {name for name, absorber in absorbers.items() if absorber}
    assert scaled == {"self_attn.kv_b_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}


def test_number_of_experts_is_that_of_the_real_model() -> None:
    """The checks run on fewer experts."""
    layout = derive_layout(family("olmoe", num_experts=48, num_hidden_layers=1))
    experts = layout.blocks[0].experts
    assert experts and experts.count == 48
    assert sum(x.role == "routed_expert" for x in layout.linears) == 3 * 48


def test_kimi_k2_is_deepseek_v3() -> None:
    """Under a model type that transformers does not know; its class is DeepseekV3ForCausalLM."""
    known = Config(values=make_tiny_config("deepseek_v3"))
    config = Config(values={**known.values, "model_type": "kimi_k2"})
    architecture = load_architecture(config)
    assert architecture.layout(config) == load_architecture(known).layout(known)
    assert match_layout(architecture, config, None, "here").layout.blocks[1].experts
    check_model_class(config, "config.json")
    assert make_meta_model(config, torch.device("cpu"), torch.float32).config.q_lora_rank == 128


# ---------------------------------------------------------------------------------- rejected models


def refuse(config: dict[str, object]) -> str:
    """Return the reason why a config is rejected."""
    with pytest.raises(CheckpointError) as caught:
        derive.derive_architecture(Config(values=config))
    return str(caught.value).partition("derived: ")[2]


def test_gate_and_up_in_the_wrong_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Gating.__call__

    def swap(gating: Gating, gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        return run(gating, up, gate)

    monkeypatch.setattr(Gating, "__call__", swap)
    assert "run one by one, the experts model.layers.0.mlp.experts give another sum" in refuse(
        family("olmoe")
    )


def test_blocks_are_compared_on_states_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding changes the logits of a deep mixture; here they are made different."""
    monkeypatch.setattr(logit_checks, "compute_logits", lambda *_: torch.zeros(1))
    assert derive_layout(family("olmoe")).blocks[0].experts
    monkeypatch.setattr(
        layer_states, "run_block_batches", lambda *x: (BlockRun(out=2 * rows) for rows in x[3])
    )
    assert "gives other logits than transformers" in refuse(family("olmoe"))


def test_sum_that_cannot_be_returned_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm follows the experts, and the tap's answer is not used."""
    monkeypatch.setattr(expert_checks, "keep_inside", lambda block: block)
    assert "its layer gives other states than transformers' own" in refuse(family("flex_olmo"))


# ---------------------------------------------------------------------------- from plan to artifact


@pytest.mark.parametrize("model_type", ["olmoe", "granitemoe", "nemotron_h", "deepseek_v4"])
def test_reported_kl_equals_that_of_two_transformers_models(
    model_type: str, tmp_path: Path
) -> None:
    """Source and artifact run by transformers' own forward, with its own experts."""
    folder = write_model(tmp_path / "source", family(model_type))
    keys = {
        "rules": "all-linear",
        "quantize": "{method: awq, rounding: gptq, bits: 4, group_size: 64}",
        "format": "compressed_tensors",
        "calibration": "{set: tiny-v3, sequences: 8, length: 64, min_expert_tokens: 8}",
        "fidelity": "{set: tiny-v3-heldout, windows: 3, length: 64}",
    }
    keys["quantize"] = keys["quantize"].replace("}", ", symmetric: true}")
    result = build(folder, tmp_path / "artifact", **keys)
    names = {module.name.rpartition(".")[2] for module in result.fidelity.modules}
    expected = {
        "granitemoe": {"w1", "w2", "w3"},
        "deepseek_v4": {"w1", "w2", "w3"},
    }.get(model_type, {"up_proj", "down_proj"})
    assert expected <= names and not names & {"gate", "layer", "router"}
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    artifact = load_model.load_model(result.path, device="cpu", dtype="float32")
    recipe = parse_recipe(make_recipe_text(folder, tmp_path / "artifact", **keys), "test.yaml")
    tokens, lost = pipeline.tokenize(recipe, folder).tokens["fidelity"], []
    with torch.no_grad():
        for number in range(tokens.n_sequences):
            ids = tokens.sequence(number).long()[None]
            p, q = (x(ids).logits[0, :-1].double().log_softmax(-1) for x in (source, artifact))
            lost.append((p.exp() * (p - q)).sum(-1))
    reported = result.fidelity.distribution[0].kl_mean
    assert reported is not None and reported.value is not None and reported.value > 1e-4
    assert reported.value == pytest.approx(float(torch.cat(lost).mean()), rel=1e-3)
