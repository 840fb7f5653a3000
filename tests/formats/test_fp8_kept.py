"""What an FP8 source keeps in compressed_tensors: the same bits, untouched by folding, and read back by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from safetensors.torch import load_file
from support.builds import build_all
from support.checkpoints import planned, recipe_text, tiny_config, write_checkpoint
from support.dequantized import Stored
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import pipeline, registry
from quantkit.artifact import load_model
from quantkit.build import context
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Config
from quantkit.errors import NumericsError, RecipeError
from quantkit.io import package_data
from quantkit.models import full_model
from quantkit.models.layers import meta_model
from quantkit.plan import sources
from quantkit.plan.plan import Plan, SourceFacts
from quantkit.recipe.parse import parse
from quantkit.report import make
from quantkit.verify.shallow import verify

GPTQ = "{method: gptq, bits: 4, group_size: 64, symmetric: true}"
EXPERTS = '{match: "re:.*\\\\.experts\\\\..*", quantize: default}'
LATENT = f'[{EXPERTS}, {{match: "*.kv_b_proj", keep: bf16}}, {{match: "*", keep: source}}]'
"""kv_b_proj in BF16: variant B of FORMATS.md 3.6. The preset experts-only keeps it in FP8: variant A."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 in FP8, blocks at the edges partial: one dense block, one with 8 experts, one MTP block."""
    return write_checkpoint(
        tmp_path_factory.mktemp("v3") / "source", tiny_config("deepseek_v3"), fp8=True
    )


def build(folder: Path, output: Path, **keys: str) -> pipeline.BuildResult:
    """A build over little text."""
    little = {
        "calibration": "{set: tiny-v3, sequences: 16, length: 64, min_expert_tokens: 1}",
        "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 64}",
        "format": "compressed_tensors",
    }
    (outcome,) = build_all(folder, output, **(little | keys))
    return outcome


def plan_of(folder: Path, **keys: str) -> Plan:
    """The plan of a small recipe for compressed_tensors."""
    return planned(folder, **{"quantize": GPTQ, "format": "compressed_tensors", **keys})


def faults_of(folder: Path, **keys: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        plan_of(folder, **keys)
    return list(raised.value.faults)


def fp8_bits(folder: Path) -> dict[str, Tensor]:
    """Every FP8 weight as bytes, with its scales under the name that DeepSeek gives them."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    inverse = {
        name: tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale")) for name in names
    }
    assert all(scale is not None and scale.dtype == torch.float32 for scale in inverse.values())
    found = {name: tensors[name].view(torch.uint8) for name in names}
    return {
        **found,
        **{f"{name}_scale_inv": scale for name, scale in inverse.items() if scale is not None},
    }


# ---------------------------------------------------------------------------------------------- bits and readers


@pytest.mark.parametrize(
    ("rules", "bf16"), [("experts-only", ()), (LATENT, ("kv_b_proj",))], ids=["A", "B"]
)
def test_every_kept_bit_is_the_sources(
    source: Path, tmp_path: Path, rules: str, bf16: tuple[str, ...]
) -> None:
    """All that the source holds in FP8, the MTP block included, but what is quantized and what a rule wants in BF16."""
    outcome = build(source, tmp_path / "a", rules=rules, quantize=GPTQ)
    kept, wanted = fp8_bits(outcome.path), fp8_bits(source)
    left = {
        name: bits
        for name, bits in wanted.items()
        if not name.startswith("model.layers.1.mlp.experts.")
        and not any(part in name for part in bf16)
    }
    assert sorted(kept) == sorted(left) and any(
        name.startswith("model.layers.2.mlp.experts.") for name in kept
    )
    assert all(torch.equal(kept[name], bits) for name, bits in left.items())
    read, original = Checkpoint.open(outcome.path), Checkpoint.open(source)
    for name in (
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    ):
        assert torch.equal(read.read([name])[name], original.read([name])[name])
    assert verify(outcome.path).status == "not judged"
    stored = {role.role: role.stored for role in outcome.fidelity.artifact.roles}
    assert stored["mlp"] == "F8_E4M3 128x128"
    assert stored["attention"] == ("F8_E4M3 128x128, BF16" if bf16 else "F8_E4M3 128x128")
    assert outcome.fidelity.fallbacks == ()
    assert any(
        "inputs rounded to FP8 on the way" in note for note in outcome.fidelity.artifact.notes
    )


@pytest.mark.parametrize("rules", ["experts-only", LATENT], ids=["A", "B"])
def test_transformers_loads_codes_beside_fp8(rules: str, tmp_path: Path) -> None:
    """Every weight bit for bit; the logits those of the weights once inputs are not rounded to FP8 on the way."""
    folder = write_checkpoint(
        tmp_path / "s", tiny_config("deepseek_v3", num_nextn_predict_layers=0), fp8=True
    )
    plain = "{method: rtn, bits: 4, group_size: 64, symmetric: true}"
    outcome = build(folder, tmp_path / "a", rules=rules, quantize=plain)
    ours = Stored.open(outcome.path).model()
    own = load_model.load(outcome.path, device="cpu", dtype="float32").state_dict()
    assert all(torch.equal(own[key], value) for key, value in ours.state_dict().items())
    theirs: Any
    theirs, told = AutoModelForCausalLM.from_pretrained(
        outcome.path, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    assert not any(told.values()), told
    tokens = torch.randint(0, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    for (
        weight
    ) in theirs.parameters():  # experts are left in the scales' bfloat16, and would compute in it
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    with torch.no_grad():
        theirs(tokens)  # the first forward unpacks what is still packed
        loaded, stored = theirs.state_dict(), ours.state_dict()
        assert not [
            key for key in stored if not torch.equal(loaded[key].bfloat16(), stored[key].bfloat16())
        ]
        ours.load_state_dict({key: loaded[key] for key in stored})
        theirs.apply(disable_quantization)
        assert torch.allclose(theirs(tokens).logits, ours(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_format_without_fp8_stores_the_same_weights(source: Path, tmp_path: Path) -> None:
    """Two artifacts of one solve: the blocks in one are the BF16 of the other."""
    formats = {"format": "[gptq, compressed_tensors]", "quantize": GPTQ, "rules": LATENT}
    gptq, mixed = (
        Checkpoint.open(outcome.path) for outcome in build_all(source, tmp_path / "a", **formats)
    )
    held = {name for name, spec in mixed.specs.items() if spec.dtype == "F8_E4M3"}
    assert held and all(gptq.specs[name].dtype == "BF16" for name in held)
    assert all(torch.equal(gptq.read([name])[name], mixed.read([name])[name]) for name in held)


@pytest.mark.slow
def test_the_demo_in_fp8_end_to_end(tmp_path: Path) -> None:
    """recipes/tiny-v3-gptq4-fp8.yaml as it ships: its figures, and what transformers makes of the artifact.

    transformers rounds the inputs of FP8 layers to FP8, as engines do: that costs as much again, or twice as much.
    """
    text = (package_data.folder("recipes") / "tiny-v3-gptq4-fp8.yaml").read_text()
    recipe = parse(
        text,
        "tiny-v3-gptq4-fp8.yaml",
        {"output.path": str(tmp_path / "a"), "compute.device": "cpu"},
    )
    done = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda _: None,
        on_progress=lambda _: None,
    )
    (outcome,) = done
    kl = outcome.fidelity.distribution[0].kl_mean
    assert kl is not None and kl.value is not None and 0.00005 < kl.value < 0.0004
    assert (
        outcome.path / "model.safetensors"
    ).stat().st_size < 5_600_000  # 7.9 MB with BF16 in place of FP8
    source = package_data.resolve_model("builtin:tiny-v3")
    kept, wanted = fp8_bits(outcome.path), fp8_bits(source)
    assert len(kept) == 2 * 32 and all(
        torch.equal(bits, wanted[name]) for name, bits in kept.items()
    )
    theirs: Any
    theirs, told = AutoModelForCausalLM.from_pretrained(
        outcome.path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    for weight in theirs.parameters():
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    opened = Checkpoint.open(source)
    bones = meta_model(opened.config, torch.device("cpu"), torch.float32)
    original = full_model.model(
        bones, registry.architecture("deepseek_v3").layout(opened.config), full_model.reader(opened)
    )
    tokenizer = AutoTokenizer.from_pretrained(outcome.path)
    lines = (
        (package_data.folder("calibration") / "tiny-v3-heldout.jsonl").read_text().splitlines()[:60]
    )
    batches = [
        torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:200]]) for line in lines
    ]
    with torch.no_grad():
        p = torch.cat([original(ids).logits[0] for ids in batches]).log_softmax(
            -1
        )  # [tokens, vocabulary]
        q = torch.cat([theirs(ids).logits[0] for ids in batches]).log_softmax(-1)
    lost = (p.exp() * (p - q)).sum(
        -1
    )  # [tokens]; a few near-ties of the router make up most of the mean
    assert 0.0001 < float(lost.mean()) < 0.003 and 1e-7 < float(lost.median()) < 1e-5
    assert float((p.argmax(-1) == q.argmax(-1)).float().mean()) > 0.98


# --------------------------------------------------------------------------------------------------------- folding

AWQ = "{method: awq, bits: 4, group_size: 64, symmetric: true}"


def test_awq_does_not_scale_into_kept_bits(source: Path, tmp_path: Path) -> None:
    """The input of the experts is read by a shared expert in FP8: it keeps its scale, which every reader's record says.

    What lies within an expert is scaled all the same.
    """
    outcome = build(source, tmp_path / "a", quantize=AWQ)
    kept, wanted = fp8_bits(outcome.path), fp8_bits(source)
    assert kept and all(torch.equal(bits, wanted[name]) for name, bits in kept.items())
    (taken,) = outcome.fidelity.fallbacks
    assert taken.kind == "fp8-unscaled"
    experts = [module for module in outcome.fidelity.modules if ".experts." in module.name]
    assert set(taken.modules) == {
        module.name for module in experts if not module.name.endswith("down_proj")
    }
    assert not any(module.rescaled for module in experts if not module.name.endswith("down_proj"))
    assert any(module.rescaled for module in experts if module.name.endswith("down_proj"))
    (warning,) = plan_of(source, quantize=AWQ).warnings
    assert warning.startswith(
        "1 inputs are not rescaled, because a linear that reads or makes them stays in FP8"
    )


def test_readers_in_bf16_are_scaled_again(source: Path, tmp_path: Path) -> None:
    rules = (
        f'[{EXPERTS}, {{match: "*.shared_experts.*", keep: bf16}}, {{match: "*", keep: source}}]'
    )
    assert plan_of(source, quantize=AWQ, rules=rules).warnings == ()
    outcome = build(source, tmp_path / "a", quantize=AWQ, rules=rules)
    assert outcome.fidelity.fallbacks == ()
    assert any(
        module.rescaled for module in outcome.fidelity.modules if module.name.endswith("up_proj")
    )


def test_folding_into_kept_bits_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check behind the rule: bits are copied only when they stand for the weight that was measured."""
    monkeypatch.setattr(context, "held_by_fp8", lambda block, group, decisions: False)
    with pytest.raises(
        NumericsError,
        match="expected the source's values, as its FP8 blocks are kept, found others",
    ):
        build(source, tmp_path / "a", quantize=AWQ)


# ---------------------------------------------------------------------------------------------------------- plans


def test_plan_tells_fp8_from_bf16(source: Path) -> None:
    plan = plan_of(source, rules=LATENT)
    kept = {name: d.keep for name, d in plan.decisions.items() if d.action == "keep"}
    assert {kept[f"model.layers.{layer}.self_attn.kv_b_proj"] for layer in (0, 1, 2)} == {"bf16"}
    assert {kept[f"model.layers.{layer}.self_attn.o_proj"] for layer in (0, 1, 2)} == {"fp8"}
    assert kept["model.layers.2.mlp.experts.0.up_proj"] == "fp8" and kept["lm_head"] == "source"
    specs = {spec.name: spec for shard in plan.shards for spec in shard.tensors}
    scale = specs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale"]
    weight = specs["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert weight.dtype == "F8_E4M3" and scale.dtype == "F32"
    assert scale.shape == (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))


def test_fp8_is_no_reason_to_refuse_a_format_that_cannot_hold_it(source: Path) -> None:
    plan = plan_of(source, format="gptq")
    assert {d.keep for d in plan.decisions.values()} == {"source"}
    assert plan.warnings == ("format gptq cannot hold FP8 blocks: what is kept is stored as BF16",)
    told = {row.role: row.reason for row in make.roles(plan)}
    assert (
        told["attention"]
        == "kept by experts-only[1] (*), mtp: keep; BF16 because format gptq cannot hold FP8"
    )
    assert told["router"] == "kept by experts-only[1] (*), mtp: keep"
    assert told["routed_expert"].startswith(
        r"experts-only[0] (re:.*\.experts\.\d+\.[^.]+), mtp: keep"
    )
    some = plan_of(source, format="gptq", rules='[{match: "*.experts.*", quantize: default}]')
    told = {row.role: row.reason for row in make.roles(some)}
    assert told["router"].startswith("only a rule that names it quantizes it")
    assert (
        told["attention"]
        == "no rule matches it, mtp: keep; BF16 because format gptq cannot hold FP8"
    )
    everything = plan_of(source, rules='[{match: "*", keep: source}]', calibration="null")
    assert {row.reason for row in make.roles(everything) if row.role == "attention"} == {
        "kept by rules[0] (*), mtp: keep; BF16 because nothing is quantized"
    }
    assert "F8_E4M3" not in {spec.dtype for shard in everything.shards for spec in shard.tensors}


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        (
            '[{match: "*.shared_experts.*", quantize: default}, {match: "*", keep: source}]',
            "rules[1]: transformers multiplies an expert's FP8 weight by its block scales as if there were one per "
            "weight; quantize the routed experts, or use keep: bf16 "
            "(model.layers.1.mlp.experts.0.gate_proj and 23 more)",
        ),
        (
            f'[{EXPERTS}, {{match: "*.q_a_proj", keep: bf16}}, {{match: "*", keep: source}}]',
            "model.layers.0: vLLM and SGLang merge these linears when loading, so they need one decision, found 2: "
            "model.layers.0.self_attn.q_a_proj (rules[1]: keep), model.layers.0.self_attn.kv_a_proj_with_mqa "
            "(rules[2]: keep in FP8)",
        ),
    ],
)
def test_what_no_engine_reads_is_refused(source: Path, rules: str, fault: str) -> None:
    assert f"r.yaml: {fault}" in faults_of(source, rules=rules)


def test_fused_rows_must_fill_whole_blocks(tmp_path: Path) -> None:
    """vLLM puts one linear under another: only the last may end within a block."""
    folder = write_checkpoint(tmp_path / "s", tiny_config("llama"), fp8=True)
    rules = '[{match: "*.mlp.*", quantize: default}, {match: "*", keep: source}]'
    (fault,) = faults_of(folder, rules=rules)
    assert (
        "vLLM and SGLang merge this linear with others when loading, which its 64 rows in FP8 blocks"
        in fault
    )
    keep = '[{match: "*.mlp.*", quantize: default}, {match: "re:.*[qkv]_proj", keep: bf16}, {match: "*", keep: source}]'
    plan = plan_of(folder, rules=keep)
    assert plan.decisions["model.layers.0.self_attn.o_proj"].keep == "fp8"


def test_blocks_of_another_size_are_refused(tmp_path: Path) -> None:
    """Planned from the config alone: no checkpoint of such blocks is at hand."""
    folder = write_checkpoint(tmp_path / "s", tiny_config("deepseek_v3"), fp8=True)
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
    recipe = parse(
        recipe_text("x", tmp_path / "out", quantize=GPTQ, format="compressed_tensors"), "r.yaml"
    )
    with pytest.raises(RecipeError, match="read FP8 in blocks of 128 x 128, found 64 x 64"):
        sources.plan_recipe(recipe, facts, sources.text_tokens(recipe))
