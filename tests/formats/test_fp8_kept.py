"""FP8 blocks kept in compressed_tensors: the source's bits, never scaled, readable elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from safetensors.torch import load_file
from support.builds import build_all
from support.checkpoints import make_plan, make_recipe_text, make_tiny_config, write_checkpoint
from support.dequantized import Stored
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import pipeline, registry
from quantkit.artifact import load_model
from quantkit.build import block_plan
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Config
from quantkit.errors import NumericsError, RecipeError
from quantkit.io import package_data
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.plan import sources
from quantkit.plan.plan import Plan, SourceFacts
from quantkit.recipe.parse import parse_recipe
from quantkit.report import make
from quantkit.verify.shallow import verify_artifact

GPTQ = "{method: gptq, bits: 4, group_size: 64, symmetric: true}"
EXPERTS = '{match: "re:.*\\\\.experts\\\\..*", quantize: default}'
LATENT = f'[{EXPERTS}, {{match: "*.kv_b_proj", keep: bf16}}, {{match: "*", keep: source}}]'
"""kv_b_proj in BF16: variant B of formats/README.md. The preset experts-only is variant A."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 in FP8 with partial blocks at the edges.

    One dense block, one block with 8 experts, one MTP block.
    """
    return write_checkpoint(
        tmp_path_factory.mktemp("v3") / "source", make_tiny_config("deepseek_v3"), fp8=True
    )


def build(folder: Path, output: Path, **keys: str) -> pipeline.BuildResult:
    """Build with little text."""
    little = {
        "calibration": "{set: tiny-v3, sequences: 16, length: 64, min_expert_tokens: 1}",
        "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 64}",
        "format": "compressed_tensors",
    }
    (result,) = build_all(folder, output, **(little | keys))
    return result


def make_ct_plan(folder: Path, **keys: str) -> Plan:
    """Return the plan of a small recipe for compressed_tensors."""
    return make_plan(folder, **{"quantize": GPTQ, "format": "compressed_tensors", **keys})


def list_fp8_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan about FP8, and about inputs that are not rescaled."""
    return [x for x in plan.warnings if "FP8" in x or "not rescaled" in x]


def list_unscaled_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan about inputs that are not rescaled."""
    return [warning for warning in plan.warnings if "not rescaled" in warning]


def list_plan_faults(folder: Path, **keys: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        make_ct_plan(folder, **keys)
    return list(raised.value.faults)


def read_fp8_bytes(folder: Path) -> dict[str, Tensor]:
    """Return every FP8 weight as bytes, and its scales under DeepSeek's name."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    inverse = {
        name: tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale")) for name in names
    }
    assert all(scale is not None and scale.dtype == torch.float32 for scale in inverse.values())
    weights = {name: tensors[name].view(torch.uint8) for name in names}
    return {
        **weights,
        **{f"{name}_scale_inv": scale for name, scale in inverse.items() if scale is not None},
    }


# --- bits and readers


@pytest.mark.parametrize(
    ("rules", "bf16"), [("experts-only", ()), (LATENT, ("kv_b_proj",))], ids=["A", "B"]
)
def test_kept_bytes_equal_source(
    source: Path, tmp_path: Path, rules: str, bf16: tuple[str, ...]
) -> None:
    """All of the source's FP8, MTP included, except quantized linears and `keep: bf16`."""
    result = build(source, tmp_path / "a", rules=rules, quantize=GPTQ)
    kept, original_bytes = read_fp8_bytes(result.path), read_fp8_bytes(source)
    expected = {
        name: bits
        for name, bits in original_bytes.items()
        if not name.startswith("model.layers.1.mlp.experts.")
        and not any(part in name for part in bf16)
    }
    assert sorted(kept) == sorted(expected) and any(
        name.startswith("model.layers.2.mlp.experts.") for name in kept
    )
    assert all(torch.equal(kept[name], bits) for name, bits in expected.items())
    read, original = Checkpoint.open(result.path), Checkpoint.open(source)
    for name in (
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    ):
        assert torch.equal(read.read([name])[name], original.read([name])[name])
    assert verify_artifact(result.path).status == "not judged"
    stored = {role.role: role.stored for role in result.fidelity.artifact.roles}
    assert stored["mlp"] == "F8_E4M3 128x128"
    assert stored["attention"] == ("F8_E4M3 128x128, BF16" if bf16 else "F8_E4M3 128x128")
    assert result.fidelity.fallbacks == ()
    assert any("inputs rounded to FP8" in note for note in result.fidelity.artifact.notes)


@pytest.mark.parametrize("rules", ["experts-only", LATENT], ids=["A", "B"])
def test_transformers_loads_codes_next_to_fp8(rules: str, tmp_path: Path) -> None:
    """Weights bit for bit; logits equal once the inputs are no longer rounded to FP8."""
    folder = write_checkpoint(
        tmp_path / "s", make_tiny_config("deepseek_v3", num_nextn_predict_layers=0), fp8=True
    )
    plain = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
    result = build(folder, tmp_path / "a", rules=rules, quantize=plain)
    ours = Stored.open(result.path).model()
    unpacked = load_model.load_model(result.path, device="cpu", dtype="float32").state_dict()
    assert all(torch.equal(unpacked[key], value) for key, value in ours.state_dict().items())
    model: Any
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        result.path, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    assert not any(loading_info.values()), loading_info
    tokens = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    # experts stay in the scales' bfloat16 and would compute in it
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    with torch.no_grad():
        model(tokens)  # the first forward unpacks the remaining weights
        loaded, stored = model.state_dict(), ours.state_dict()
        assert not [
            key for key in stored if not torch.equal(loaded[key].bfloat16(), stored[key].bfloat16())
        ]
        ours.load_state_dict({key: loaded[key] for key in stored})
        model.apply(disable_quantization)
        assert torch.allclose(model(tokens).logits, ours(tokens).logits, atol=1e-4, rtol=1e-4)


def test_format_without_fp8_stores_same_weights_in_bf16(source: Path, tmp_path: Path) -> None:
    """Two artifacts of one solve: FP8 blocks in one equal the BF16 weights of the other."""
    formats = {"format": "[gptq, compressed_tensors]", "quantize": GPTQ, "rules": LATENT}
    gptq, mixed = (
        Checkpoint.open(result.path) for result in build_all(source, tmp_path / "a", **formats)
    )
    fp8_names = {name for name, spec in mixed.specs.items() if spec.dtype == "F8_E4M3"}
    assert fp8_names and all(gptq.specs[name].dtype == "BF16" for name in fp8_names)
    assert all(torch.equal(gptq.read([name])[name], mixed.read([name])[name]) for name in fp8_names)


@pytest.mark.slow
def test_fp8_demo_recipe_end_to_end(tmp_path: Path) -> None:
    """The figures of recipes/tiny-v3-gptq4-fp8.yaml, and the artifact in transformers.

    transformers rounds the inputs of FP8 layers to FP8, as engines do, which costs once or twice as
    much KL again.
    """
    text = (package_data.locate_folder("recipes") / "tiny-v3-gptq4-fp8.yaml").read_text()
    recipe = parse_recipe(
        text,
        "tiny-v3-gptq4-fp8.yaml",
        {"output.path": str(tmp_path / "a"), "compute.device": "cpu"},
    )
    results = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
    )
    (result,) = results
    kl = result.fidelity.distribution[0].kl_mean
    assert kl is not None and kl.value is not None and 0.00005 < kl.value < 0.0004
    # 7.9 MB with BF16 instead of FP8
    assert (result.path / "model.safetensors").stat().st_size < 5_600_000
    source = package_data.locate_model("builtin:tiny-v3")
    kept, original_bytes = read_fp8_bytes(result.path), read_fp8_bytes(source)
    assert len(kept) == 2 * 32 and all(
        torch.equal(bits, original_bytes[name]) for name, bits in kept.items()
    )
    model: Any
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        result.path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    checkpoint = Checkpoint.open(source)
    meta = make_meta_model(checkpoint.config, torch.device("cpu"), torch.float32)
    original = full_model.make_model(
        meta,
        registry.get_architecture("deepseek_v3").layout(checkpoint.config),
        full_model.make_reader(checkpoint),
    )
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    lines = (
        (package_data.locate_folder("calibration") / "tiny-v3-heldout.jsonl")
        .read_text()
        .splitlines()[:60]
    )
    batches = [
        torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:200]]) for line in lines
    ]
    with torch.no_grad():
        # [tokens, vocabulary]
        p = torch.cat([original(ids).logits[0] for ids in batches]).log_softmax(-1)
        q = torch.cat([model(ids).logits[0] for ids in batches]).log_softmax(-1)
    kl_divergence = (p.exp() * (p - q)).sum(-1)  # [tokens]; few router near-ties dominate the mean
    assert 0.0001 < float(kl_divergence.mean()) < 0.003
    assert 1e-7 < float(kl_divergence.median()) < 1e-5
    assert float((p.argmax(-1) == q.argmax(-1)).float().mean()) > 0.98


# --- scaling

AWQ = "{method: awq, bits: 4, group_size: 64, symmetric: true}"


def test_awq_does_not_scale_fp8_weights(source: Path, tmp_path: Path) -> None:
    """A shared expert in FP8 reads the experts' input, so that input is not scaled.

    Every reader's record says so. Inputs within an expert are scaled.
    """
    result = build(source, tmp_path / "a", quantize=AWQ)
    kept, original_bytes = read_fp8_bytes(result.path), read_fp8_bytes(source)
    assert kept and all(torch.equal(bits, original_bytes[name]) for name, bits in kept.items())
    (fallback,) = result.fidelity.fallbacks
    assert fallback.kind == "fp8-unscaled"
    experts = [module for module in result.fidelity.modules if ".experts." in module.name]
    assert set(fallback.modules) == {
        module.name for module in experts if not module.name.endswith("down_proj")
    }
    assert not any(module.rescaled for module in experts if not module.name.endswith("down_proj"))
    assert any(module.rescaled for module in experts if module.name.endswith("down_proj"))
    (warning,) = list_unscaled_warnings(make_ct_plan(source, quantize=AWQ))
    assert warning.startswith(
        "1 inputs are not rescaled, because a linear that reads or produces them keeps its stored "
        "bits, e.g. "
    )


def test_awq_scales_bf16_readers(source: Path, tmp_path: Path) -> None:
    rules = (
        f'[{EXPERTS}, {{match: "*.shared_experts.*", keep: bf16}}, {{match: "*", keep: source}}]'
    )
    assert list_unscaled_warnings(make_ct_plan(source, quantize=AWQ, rules=rules)) == []
    result = build(source, tmp_path / "a", quantize=AWQ, rules=rules)
    assert result.fidelity.fallbacks == ()
    assert any(
        module.rescaled for module in result.fidelity.modules if module.name.endswith("up_proj")
    )


def test_scaling_fp8_weights_raises(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 bytes are copied only if they still represent the measured weight."""
    monkeypatch.setattr(
        block_plan, "is_unscaled_for_kept_bits", lambda block, group, decisions: False
    )
    with pytest.raises(
        NumericsError,
        match="expected the source's values, because its FP8 blocks are kept, found others",
    ):
        build(source, tmp_path / "a", quantize=AWQ)


# --- plans


def test_plan_distinguishes_fp8_from_bf16(source: Path) -> None:
    plan = make_ct_plan(source, rules=LATENT)
    kept = {name: d.keep for name, d in plan.decisions.items() if d.action == "keep"}
    assert {kept[f"model.layers.{layer}.self_attn.kv_b_proj"] for layer in (0, 1, 2)} == {"bf16"}
    assert {kept[f"model.layers.{layer}.self_attn.o_proj"] for layer in (0, 1, 2)} == {"fp8"}
    assert kept["model.layers.2.mlp.experts.0.up_proj"] == "fp8" and kept["lm_head"] == "source"
    specs = {spec.name: spec for shard in plan.shards for spec in shard.tensors}
    scale = specs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale"]
    weight = specs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert weight.dtype == "F8_E4M3" and scale.dtype == "F32"
    assert scale.shape == (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))


def test_format_without_fp8_keeps_bf16_with_warning(source: Path) -> None:
    plan = make_ct_plan(source, format="gptq")
    assert {d.keep for d in plan.decisions.values()} == {"source"}
    assert list_fp8_warnings(plan) == [
        "format gptq cannot hold FP8 blocks: kept weights are stored as BF16"
    ]
    reasons = {row.role: row.reason for row in make.summarize_roles(plan)}
    assert (
        reasons["attention"]
        == "kept by experts-only[1] (*), mtp: keep; BF16 because format gptq cannot hold FP8"
    )
    assert reasons["router"] == "kept by experts-only[1] (*), mtp: keep"
    assert reasons["routed_expert"].startswith(
        r"experts-only[0] (re:.*\.experts\.\d+\.[^.]+), mtp: keep"
    )
    partial = make_ct_plan(
        source, format="gptq", rules='[{match: "*.experts.*", quantize: default}]'
    )
    reasons = {row.role: row.reason for row in make.summarize_roles(partial)}
    assert reasons["router"].startswith("only a rule that names it quantizes it")
    assert (
        reasons["attention"]
        == "no rule matches it, mtp: keep; BF16 because format gptq cannot hold FP8"
    )
    everything = make_ct_plan(source, rules='[{match: "*", keep: source}]', calibration="null")
    assert {row.reason for row in make.summarize_roles(everything) if row.role == "attention"} == {
        "kept by rules[0] (*), mtp: keep; BF16 because nothing is quantized"
    }
    assert "F8_E4M3" not in {spec.dtype for shard in everything.shards for spec in shard.tensors}


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        (
            '[{match: "*.shared_experts.*", quantize: default}, {match: "*", keep: source}]',
            "rules[1]: transformers multiplies an expert's FP8 weight by its block scales as if "
            "there were one per weight; quantize the routed experts, or use keep: bf16 "
            "(model.layers.1.mlp.experts.0.gate_proj and 23 more)",
        ),
        (
            f'[{EXPERTS}, {{match: "*.q_a_proj", keep: bf16}}, {{match: "*", keep: source}}]',
            "model.layers.0: vLLM and SGLang merge these linears when loading, so they need one "
            "decision, found 2: model.layers.0.self_attn.q_a_proj (rules[1]: keep), "
            "model.layers.0.self_attn.kv_a_proj_with_mqa (rules[2]: keep in FP8)",
        ),
    ],
)
def test_plan_rejects_fp8_that_no_engine_reads(source: Path, rules: str, fault: str) -> None:
    assert f"r.yaml: {fault}" in list_plan_faults(source, rules=rules)


def test_plan_rejects_fused_rows_of_partial_blocks(tmp_path: Path) -> None:
    """vLLM concatenates fused linears: only the last may end within a block."""
    folder = write_checkpoint(tmp_path / "s", make_tiny_config("llama"), fp8=True)
    rules = '[{match: "*.mlp.*", quantize: default}, {match: "*", keep: source}]'
    (fault,) = list_plan_faults(folder, rules=rules)
    assert (
        "vLLM and SGLang merge this linear with others when loading; expected a multiple of 128 "
        "rows (the FP8 block), found 64" in fault
    )
    keep = (
        '[{match: "*.mlp.*", quantize: default}, {match: "re:.*[qkv]_proj", keep: bf16}, '
        '{match: "*", keep: source}]'
    )
    plan = make_ct_plan(folder, rules=keep)
    assert plan.decisions["model.layers.0.self_attn.o_proj"].keep == "fp8"


def test_plan_rejects_other_block_sizes(tmp_path: Path) -> None:
    """The plan uses the config alone; there is no checkpoint of such blocks."""
    folder = write_checkpoint(tmp_path / "s", make_tiny_config("deepseek_v3"), fp8=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    facts = SourceFacts(
        model="x",
        revision=None,
        config=Config(values=config),
        specs=None,
        fingerprint=None,
        where="config.json",
    )
    recipe = parse_recipe(
        make_recipe_text("x", tmp_path / "out", quantize=GPTQ, format="compressed_tensors"),
        "r.yaml",
    )
    with pytest.raises(RecipeError, match="read FP8 in blocks of 128 x 128, found 64 x 64"):
        sources.plan_recipe(recipe, facts)
